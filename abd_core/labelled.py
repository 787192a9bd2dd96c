"""Labelled images as a zero-shot test set: ImageNet's validation images as they are distributed, or any folder.

ImageNet's 50,000 labels are in two orders: its devkit numbers the classes one way, and everybody's models, open_clip's
class names among them, number them by sorted WordNet ids. Tables on the web go by names, and as ImageNet has two cranes
and two maillots, they give the 100 images of classes 517 and 639 the labels 134 and 638. Here labels go by WordNet id.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import scipy.io
import torch

from abd_core import ranks, sources
from abd_core.config import ConfigError, digest
from abd_core.data import TestSet
from abd_core.formats import Images, in_batches, loader, members, unwrapped, walk, watched
from abd_core.paths import RunError, atomic, cache_dir, read_json, sha256, write_json

ENDINGS = ("jpeg", "jpg", "png", "webp", "bmp", "gif")
TEMPLATES = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
# SHA-256 of the 1,000 sorted WordNet ids of ILSVRC 2012, a line each. The order is that of open_clip's class names.
WNIDS = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
MOST_DEVKIT = 64 << 20  # bytes of the devkit, unpacked; it has 5 MB
DECODING = 2  # counts the ways in which images have been decoded: the cache holds what the present one makes of them
GROUND_TRUTH, META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"


@dataclass(frozen=True)
class Labelled:
    """Labelled images by their places.

    Attributes:
        table: rows as of `formats.SCHEMA`, captions empty.
        labels: int64 (N,), indices into `class_names`.
        class_names: K names.
    """

    table: pa.Table
    labels: np.ndarray
    class_names: tuple[str, ...]


def read_labelled(images: str, *, classes: str = "", devkit: str = "") -> Labelled:
    """Where the labelled images of a test set are, and what they show.

    Args:
        images: a folder with a folder a class; ImageNet's 1,000 may be recognised by their names. Or, with `devkit`, a
            folder or a tar of `ILSVRC2012_val_00000001.JPEG` and so on.
        classes: a text file that names the classes, for any other folder: a line a class, `<folder><tab><name>`, or the
            name alone, where the lines go with the sorted folders. It is not needed for ImageNet's 1,000 folders.
        devkit: ImageNet's `ILSVRC2012_devkit_t12`, as a folder or as the `.tar.gz` that it comes in.

    Raises:
        ConfigError: the images need names of classes, or the names do not go with the folders.
        RunError: a file is missing or damaged, or the images are not those that the devkit labels.
    """
    if devkit:
        if classes:
            raise ConfigError(f"test_classes = {classes!r}: the devkit {devkit!r} names the classes already")
        return _flat(images, devkit)
    found = [(path, size) for path, size in sources.listing(images) if _ending(path) in ENDINGS]
    if not found:
        raise RunError(f"test_images = {images!r}: no images in it ({', '.join(ENDINGS)})")
    if flat := [path for path, _ in found if "/" not in path]:
        raise ConfigError(
            f"test_images = {images!r}: a folder a class expected, but {len(flat)} images lie in it directly, such as "
            f"{flat[0]!r}; ImageNet's flat files need its devkit"
        )
    folders = sorted({path.partition("/")[0] for path, _ in found})
    names = _named(folders, classes, images)
    number = {folder: place for place, folder in enumerate(folders)}
    labels = np.array([number[path.partition("/")[0]] for path, _ in found], np.int64)
    return Labelled(_table([(path, sources.within(images, path), 0, size) for path, size in found]), labels, names)


def _ending(path: str) -> str:
    return path.rpartition(".")[2].lower()


def _table(rows: Sequence[tuple[str, str, int, int]]) -> pa.Table:
    """Rows of (id, address, offset, size) as an index without captions."""
    ids, addresses, offsets, sizes = zip(*rows, strict=True)
    try:
        return pa.table(
            {
                "id": pa.array(ids, pa.string()),
                "address": pa.array(addresses, pa.string()).dictionary_encode(),
                "offset": pa.array(offsets, pa.int64()),
                "size": pa.array(sizes, pa.int64()),
            }
        )
    except UnicodeEncodeError as error:
        raise RunError(f"{error.object}: a file name that is not UTF-8") from None


def is_imagenet(folders: Sequence[str]) -> bool:
    """Whether these sorted names are the WordNet ids of ImageNet's 1,000 classes."""
    return hashlib.sha256("\n".join(folders).encode("utf-8", "surrogatepass")).hexdigest() == WNIDS


def _named(folders: Sequence[str], classes: str, where: str) -> tuple[str, ...]:
    """A name for each folder."""
    if not classes:
        if is_imagenet(folders):
            return tuple(open_clip.IMAGENET_CLASSNAMES)
        if sum(bool(re.fullmatch(r"n\d{8}", folder)) for folder in folders) > 1:
            what = f"{len(folders)} folders, but not ImageNet's 1,000 WordNet ids"
            raise ConfigError(f"test_images = {where!r}: {what}; give their names in test_classes")
        raise ConfigError(f"test_images = {where!r}: {len(folders)} folders; give their names in test_classes")
    try:
        lines = [line.strip() for line in sources.read(classes).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise RunError(f"damaged file: {classes}: not text in UTF-8") from None
    rows = [[part.strip() for part in line.split("\t")] for line in lines if line]
    widths = {len(row) for row in rows}
    if widths == {1}:
        if len(rows) != len(folders):
            raise ConfigError(f"{classes}: {len(rows)} names for the {len(folders)} folders of {where}")
        return tuple(row[0] for row in rows)
    if widths != {2} or not all(all(row) for row in rows):
        raise ConfigError(f"{classes}: a line a class expected, '<folder><tab><name>', or the name alone")
    names = {row[0]: row[1] for row in rows}
    if len(names) < len(rows):
        twice = next(folder for folder, count in Counter(row[0] for row in rows).items() if count > 1)
        raise ConfigError(f"{classes}: folder {twice!r} stands there twice")
    if missing := [folder for folder in folders if folder not in names]:
        raise ConfigError(f"{classes}: no name for folder {missing[0]!r} ({len(missing)} of {len(folders)} lack one)")
    return tuple(names[folder] for folder in folders)


# --- ImageNet's flat files and its devkit -----------------------------------------------------------------------------


def _flat(images: str, devkit: str) -> Labelled:
    wnids, truth = read_devkit(devkit)
    order = sorted(wnids.values())
    label_of = {number: order.index(wnid) for number, wnid in wnids.items()}
    if images.endswith(".tar"):
        size = sources.stamp(images)[0]
        found = [(m.name, images, m.offset_data, m.size) for m, _ in members(images, size) if _is_flat(m.name)]
    else:
        listed = sources.listing(images)
        found = [(path, sources.within(images, path), 0, size) for path, size in listed if _is_flat(path)]
    found = sorted((name.rpartition("/")[2], *rest) for name, *rest in found)  # type: ignore[misc]
    numbers = [int(name[15:23]) for name, *_ in found]
    if not numbers or numbers != list(range(1, len(truth) + 1)):
        what = f"{len(found)} files ILSVRC2012_val_<number>.JPEG"
        raise RunError(f"test_images = {images!r}: {what}, but the devkit labels 1 to {len(truth)}, each once")
    labels = np.array([label_of[number] for number in truth], np.int64)
    return Labelled(_table(found), labels, tuple(open_clip.IMAGENET_CLASSNAMES))


def _is_flat(path: str) -> bool:
    return bool(re.fullmatch(r"ILSVRC2012_val_\d{8}\.JPEG", path.rpartition("/")[2]))


def read_devkit(devkit: str) -> tuple[dict[int, str], list[int]]:
    """WordNet id of each of the devkit's 1,000 class numbers, and the class number of each validation image.

    Raises:
        RunError: it is not ILSVRC 2012's devkit, or it is damaged.
    """
    meta, truth = _devkit_files(devkit)
    try:
        synsets = np.atleast_1d(scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        wnids = {
            int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0
        }  # the others are inner nodes of the tree
        numbers = [int(line) for line in truth.decode("ascii").split()]
    except Exception as error:  # SciPy raises many kinds
        raise RunError(f"damaged file: {devkit}: {type(error).__name__} in its {META} or {GROUND_TRUTH}") from None
    if not is_imagenet(sorted(wnids.values())) or not set(numbers) <= set(wnids):
        raise RunError(f"{devkit}: not ILSVRC 2012's devkit: its classes are not ImageNet's 1,000")
    return wnids, numbers


def _devkit_files(devkit: str) -> tuple[bytes, bytes]:
    if sources.is_folder(devkit):
        return sources.read(sources.within(devkit, META)), sources.read(sources.within(devkit, GROUND_TRUTH))
    with sources.opened(devkit) as f:
        try:
            content = gzip.GzipFile(fileobj=f).read(MOST_DEVKIT + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise RunError(f"damaged file: {devkit}: no whole .tar.gz ({error})") from None
    if len(content) > MOST_DEVKIT:
        raise RunError(f"{devkit}: not ILSVRC 2012's devkit: it unpacks to more than {MOST_DEVKIT} bytes")
    found: dict[str, bytes] = {}
    for member in walk(io.BytesIO(content), devkit, len(content)):
        for name in (META, GROUND_TRUTH):
            if member.name.endswith("/" + name):
                found[name] = content[member.offset_data : member.offset_data + member.size]
    if missing := [name for name in (META, GROUND_TRUTH) if name not in found]:
        raise RunError(f"{devkit}: not ILSVRC 2012's devkit: it lacks {missing[0]}")
    return found[META], found[GROUND_TRUTH]


# --- as a test set ----------------------------------------------------------------------------------------------------


def load_labelled(
    images: str, *, split: str, resolution: int, classes: str = "", devkit: str = "", dev_share: float = 0.1
) -> TestSet:
    """The images of one split at a model's resolution, as a zero-shot test set with open_clip's templates.

    A seeded share `dev_share` of each class is the split "dev", the rest is "eval"; with 0 both are all images. They
    are decoded once, into the cache (`test-<digest>.bin`, 3 R^2 bytes an image), and mapped from there into memory;
    of several ranks, which call it together, by the first one. Local images that were changed since are decoded again;
    remote ones that were replaced under the same names and sizes are not noticed: delete the file in the cache.

    Raises:
        ConfigError: see `read_labelled`; or `dev_share` leaves one of the splits without images.
        RunError: see `read_labelled`; or an image is damaged.
    """
    source = read_labelled(images, classes=classes, devkit=devkit)
    places = _places(source)
    order = np.lexsort((np.arange(len(places)), source.labels, places))  # dev first, whatever its share
    labels = torch.from_numpy(source.labels[order])
    pixels, checksum = _pixels_of(source, order, resolution)
    cut = int((places < dev_share).sum())
    if dev_share and not 0 < cut < len(labels):
        raise ConfigError(f"dev_share = {dev_share:g}: of {len(labels)} test images it puts {cut} into the dev split")
    part = slice(None) if not dev_share else slice(0, cut) if split == "dev" else slice(cut, None)
    return TestSet(
        images=pixels[part],
        labels=labels[part],
        class_names=source.class_names,
        templates=TEMPLATES,
        split=split,
        identity=digest([checksum, part.start, part.stop, labels[part].tolist(), source.class_names, TEMPLATES]),
    )


def _places(source: Labelled) -> np.ndarray:
    """Where each image stands in its class's seeded order, in (0, 1)."""
    drawn = [hashlib.sha256(f"dev/{name}".encode("utf-8", "surrogatepass")).digest() for name in _ids(source)]
    order = sorted(range(len(drawn)), key=lambda i: (source.labels[i], drawn[i]))
    sizes = np.bincount(source.labels, minlength=len(source.class_names))
    places, seen = np.empty(len(drawn)), np.zeros(len(sizes))
    for index in order:
        label = source.labels[index]
        places[index] = (seen[label] + 0.5) / sizes[label]
        seen[label] += 1
    return places


def _ids(source: Labelled) -> list[str]:
    return source.table["id"].to_pylist()


def _pixels_of(source: Labelled, order: np.ndarray, resolution: int) -> tuple[torch.Tensor, str]:
    """All images, uint8 (N, 3, R, R), mapped from the cache, and the checksum of the file there."""
    rows: dict[str, Any] = {name: source.table[name].to_pylist() for name in ("id", "address", "offset", "size")}
    marks = [sources.stamp(address) for address in dict.fromkeys(rows["address"]) if sources.is_local(address)]
    stem = cache_dir() / f"test-{digest([DECODING, rows, marks, order.tolist(), resolution])[:16]}"
    path, record = stem.with_suffix(".bin"), stem.with_suffix(".json")
    shape = (len(order), 3, resolution, resolution)
    if ranks.agreed(not (record.exists() and path.exists() and path.stat().st_size == np.prod(shape))):
        if ranks.first():
            batches = [order[list(batch)].tolist() for batch in in_batches(len(order), 64)]
            with atomic(path) as temporary, temporary.open("wb") as f:
                for batch in watched(loader(Images(source.table, resolution), batches), len(order), 64):
                    f.write(unwrapped(batch).numpy().tobytes())
            write_json(record, {"sha256": sha256(path)})
        ranks.barrier()
    # A private mapping: whoever writes to the tensor does not write to the file.
    mapped = np.memmap(path, np.uint8, mode="c", shape=shape)
    return torch.from_numpy(mapped), json.dumps(read_json(record)["sha256"])
