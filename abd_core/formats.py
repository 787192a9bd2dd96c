"""Image-caption pairs of one's own: CSV, TSV and Parquet tables that name or hold images, and webdataset tars.

    python -m abd_core.formats 'cc3m/{00000..00331}.tar' --count 500000 --manifest cc3m-500k.csv    # a subset's ids

A pair is a row of an index: its id, its caption, and where its image lies (a file, or a range of bytes in a tar). Any
pair can be read without those before it, so that batches are drawn from the whole set and a resumed run sees what an
uninterrupted one would. Nothing is unpacked to disk but the images that a Parquet file holds, which cannot be read one
by one: they are copied into the cache once. An image becomes what open_clip's own preprocessing makes of
it: the shorter side resized (bicubic) to the model's, the centre cut out.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import io
import json
import os
import sys
import tarfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from abd_core import escape, models, ranks, sources
from abd_core.config import AbdError, ConfigError, digest, unknown
from abd_core.paths import RunError, atomic, cache_dir, readers_told, regular

KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # that PIL may read; what else it knows is of no use here
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")  # of a tar's members
COLUMNS = (("image", "caption"), ("filepath", "title"), ("image", "text"))  # CleanCLIP's, open_clip's, Hugging Face's
MOST_BYTES = 64 << 20  # of one encoded image
MOST_PIXELS = 100_000_000  # of one decoded image; more is taken for a decompression bomb
MOST_STRETCH = 500  # longer side by shorter: the shorter one is brought to a model's size, and the longer one with it
MOST_TEXT = 1 << 20  # bytes of a tar's caption member
MOST_UNPACKED = 100  # times a Parquet file's size that its images may take; encoded images pack badly
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("caption", pa.string()),
        ("address", pa.dictionary(pa.int32(), pa.string())),
        ("offset", pa.int64()),  # in the tar; 0 for a file
        ("size", pa.int64()),  # bytes; -1: the whole file
    ]
)


class ImageError(AbdError):
    """An image is damaged, or too large to be read safely."""


# --- one image --------------------------------------------------------------------------------------------------------


def decode(data: bytes, resolution: int) -> np.ndarray:
    """An encoded image as open_clip's evaluation preprocessing sees it: uint8 (3, R, R), channels last in memory.

    The same pixels as `open_clip.image_transform(R, is_train=False)` gives for RGB images. Palettes and other modes are
    made RGB before they are resized, not after, as PIL would resize a palette's numbers.

    Raises:
        ImageError: it is no image, is cut off, or is larger than `MOST_BYTES`, `MOST_PIXELS` or `MOST_STRETCH` allow.
    """
    image = open_image(data)
    try:
        image = image.convert("RGB")
    except Exception as error:  # PIL raises many kinds for a damaged file
        raise ImageError(f"damaged image: {_line(error)}") from None
    width, height = image.size
    short = min(width, height)
    size = (max(1, int(resolution * width / short)), max(1, int(resolution * height / short)))
    left, top = round((size[0] - resolution) / 2), round((size[1] - resolution) / 2)
    image = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + resolution, top + resolution))
    return np.asarray(image).transpose(2, 0, 1)


def check(data: bytes) -> None:
    """Read an image to its end, as cheaply as its format allows. Raises ImageError where `decode` would."""
    image = open_image(data)
    try:
        image.draft("RGB", (1, 1))  # a JPEG is then decoded at an eighth of its size
        image.load()
    except Exception as error:
        raise ImageError(f"damaged image: {_line(error)}") from None


def read_image(path: Path) -> Image.Image:
    """`open_image` of a file. Raises RunError where there is none, and ImageError as that does."""
    if (size := regular(path).stat().st_size) > MOST_BYTES:
        raise ImageError(f"an image of {size} bytes: at most {MOST_BYTES} expected")
    return open_image(path.read_bytes())


def open_image(data: bytes) -> Image.Image:
    """An encoded image, of which no more than its header is decoded; of 16-bit greys all, to make them 8-bit.

    PIL picks the decoder by the content. It is let have those of `KINDS` alone: others start programs (PostScript's).

    Raises:
        ImageError: it is none of `KINDS`, or is larger than `MOST_BYTES`, `MOST_PIXELS` or `MOST_STRETCH` allow; or it
            has 16-bit greys and is damaged.
    """
    if len(data) > MOST_BYTES:
        raise ImageError(f"an image of {len(data)} bytes: at most {MOST_BYTES} expected")
    try:
        image = Image.open(io.BytesIO(data), formats=KINDS)
    except Exception as error:
        raise ImageError(f"not an image of a known kind ({', '.join(KINDS)}): {_line(error)}") from None
    if image.width * image.height > MOST_PIXELS:
        raise ImageError(f"an image of {image.width}x{image.height} pixels: at most {MOST_PIXELS} expected")
    if not 0 < max(image.size) <= MOST_STRETCH * min(image.size):
        raise ImageError(f"an image of {image.width}x{image.height} pixels: sides of 1 to {MOST_STRETCH} expected")
    if image.mode in ("I", "I;16"):
        try:  # PIL's own conversion makes whatever is above 255 white
            return image.point(lambda grey: grey * (1 / 257) + 0.5).convert("L")
        except Exception as error:  # PIL raises many kinds for a damaged file
            raise ImageError(f"damaged image: {_line(error)}") from None
    return image


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return "unknown format" if text.startswith("cannot identify image file") else text or type(error).__name__


# --- the index --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Index:
    """The pairs of a data set, and what of it cannot be one.

    Attributes:
        table: rows of `SCHEMA`, each id once.
        damaged: (id, reason) of rows and members that are no pair.
    """

    table: pa.Table
    damaged: tuple[tuple[str, str], ...] = ()


def read_index(address: str, *, columns: str = "") -> Index:
    """All pairs of a data set; `address` may have braces, and all its files are of one kind.

    Args:
        address: `.csv`, `.tsv`, `.txt` or `.parquet` tables that name image files; `.parquet` tables that hold images,
            as bytes or as Hugging Face's datasets do (`bytes`, `path`); or `.tar` files as img2dataset and webdataset
            write them (`<key>.jpg|.jpeg|.png|.webp` with `<key>.txt`, or `<key>.json` that has "caption").
        columns: of a table: image's and caption's, with a comma between; "": `image,caption`, `filepath,title` or
            `image,text`.

    Raises:
        ConfigError: a kind of file that is none of these, or columns that the table lacks.
        RunError: a file is missing, damaged or hostile.
    """
    files = sources.expand(address)
    endings = {file.rpartition(".")[2].lower() for file in files}
    if len(endings) > 1:
        raise ConfigError(f"pairs = {address!r}: files of one kind expected, not {', '.join(sorted(endings))}")
    ending = endings.pop()
    if ending == "tar":
        return _tars(files)
    if ending in ("csv", "tsv", "txt", "parquet"):
        read = _parquet if ending == "parquet" else _separated
        parts = [read(file, columns) for file in _shown(files, "index")]
        return _unique(pa.concat_tables(parts))
    if sources.is_folder(files[0]):
        raise ConfigError(
            f"pairs = {address!r} is a folder: its files expected, such as {address}/{{00000..00331}}.tar"
        )
    raise ConfigError(f"pairs = {address!r}: .csv, .tsv, .txt, .parquet or .tar expected (tars without compression)")


def _chosen(names: Sequence[str], columns: str, where: str) -> tuple[str, str]:
    """The image's and the caption's column."""
    if columns:
        given = tuple(name.strip() for name in columns.split(","))
        if len(given) != 2:
            raise ConfigError(f"columns = {columns!r}: two names with a comma between expected, image's and caption's")
        for name in given:
            if name not in names:
                raise unknown(f"column of {where}", name, names)
        return given[0], given[1]
    for image, caption in COLUMNS:
        if image in names and caption in names:
            return image, caption
    listed = ", ".join(map(repr, list(names)[:20]))
    raise ConfigError(f"{where}: its columns are {listed}: say which two to read, such as columns='url,text'")


def _rows(file: str, images: Sequence[Any], captions: Sequence[Any]) -> pa.Table:
    """A table's rows; ids are the images as the table names them."""
    empty = next((number for number, image in enumerate(images) if not image), None)
    if empty is not None:
        raise RunError(f"damaged file: {file}: row {empty + 1} names no image")
    return pa.table(
        {
            "id": pa.array(images, pa.string()),
            "caption": pa.array([caption or "" for caption in captions], pa.string()),
            "address": pa.array([sources.beside(file, image) for image in images], pa.string()).dictionary_encode(),
            "offset": np.zeros(len(images), np.int64),
            "size": np.full(len(images), -1, np.int64),
        }
    ).cast(SCHEMA)


def _separated(file: str, columns: str) -> pa.Table:
    """A CSV file; tabs instead of commas where its first line has one."""
    with sources.opened(file) as f, warnings.catch_warnings():
        # Where rows have a field more than the header, pandas would take the first for their names, and shift the rest.
        warnings.simplefilter("error", pd.errors.ParserWarning)
        first = f.readline(MOST_TEXT)
        f.seek(0)
        sep = "\t" if b"\t" in first else ","
        try:
            table = pd.read_csv(f, sep=sep, index_col=False, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        except Exception as error:  # pandas raises many kinds
            raise RunError(f"damaged file: {file}: {_line(error)}") from None
    image, caption = _chosen(list(table.columns), columns, file)
    return _rows(file, table[image].tolist(), table[caption].tolist())


def _parquet(file: str, columns: str) -> pa.Table:
    with sources.opened(file) as f:
        try:
            parquet = pq.ParquetFile(f, buffer_size=1 << 20)  # else whole columns of images are read at a time
            image, caption = _chosen(parquet.schema_arrow.names, columns, file)
            kinds = {name: parquet.schema_arrow.field(name).type for name in (image, caption)}
            if not _is_text(kinds[caption]):
                raise ConfigError(f"{file}: column {caption!r} holds {kinds[caption]}, but text is read")
            if _is_images(kinds[image]):
                return _held(file, parquet, image, caption)
            if not _is_text(kinds[image]):
                what = "paths of image files, or images as bytes, are read"
                raise ConfigError(f"{file}: column {image!r} holds {kinds[image]}, but {what}")
            table = parquet.read([image, caption])
        except AbdError:
            raise
        except Exception as error:  # pyarrow raises many kinds
            raise RunError(f"damaged file: {file}: {_line(error)}") from None
    return _rows(file, table[image].to_pylist(), table[caption].to_pylist())


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_images(kind: pa.DataType) -> bool:
    """Bytes, or the structure of Hugging Face's `datasets.Image`: bytes, or else the path of a file."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_images(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _held(file: str, parquet: pq.ParquetFile, image: str, caption: str) -> pa.Table:
    """Rows of a file that holds its images, which are copied one after another into the cache, once."""
    size, mark = sources.stamp(file)
    stem = cache_dir() / f"parquet-{digest([1, str(cache_dir()), file, size, mark, image, caption])[:16]}"
    store, index = stem.with_suffix(".bin"), stem.with_suffix(".parquet")
    if ranks.agreed(not (mark and index.exists() and store.exists())):
        if ranks.first():
            with atomic(store) as temporary, temporary.open("wb") as f:
                batches = parquet.iter_batches(16, columns=[image, caption])
                rows = ((batch.column(name).to_pylist() for name in (image, caption)) for batch in batches)
                each = (row for columns in rows for row in zip(*columns, strict=True))
                table = _copied(file, size, each, f, str(store))
            with atomic(index) as temporary:
                pq.write_table(table, temporary)
        ranks.barrier()
    return pq.read_table(index).cast(SCHEMA)


def _copied(file: str, size: int, rows: Iterable[tuple[Any, str | None]], f: IO[bytes], store: str) -> pa.Table:
    """Writes the images to `f`, which will be `store`. Ids are the paths that go with them, else the rows' numbers.

    The same bytes are written once: a file of a few kilobytes can repeat an image in each of a million rows.
    """
    written: dict[bytes, int] = {}
    shard = file.rpartition("/")[2].removesuffix(".parquet")
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for row, (value, caption) in enumerate(rows):
        record: dict[str, Any] = value if isinstance(value, dict) else {"bytes": value}
        data, path = record.get("bytes") or b"", record.get("path") or ""
        if not data and not path:
            raise RunError(f"damaged file: {file}: row {row + 1} names no image")
        place = (sources.beside(file, path), 0, -1) if not data else (store, f.tell(), len(data))
        if data and (mark := hashlib.sha256(data).digest()) in written:
            place = (store, written[mark], len(data))
        elif data:
            written[mark] = f.tell()
            f.write(data)
            if f.tell() > MOST_UNPACKED * size:
                raise RunError(f"{file}: its images unpack to more than {MOST_UNPACKED} times its size")
        for name, entry in zip(SCHEMA.names, (path or f"{shard}/{row}", caption or "", *place), strict=True):
            columns[name].append(entry)
    columns["address"] = pa.array(columns["address"], pa.string()).dictionary_encode()
    return pa.table(columns).cast(SCHEMA)


def _unique(table: pa.Table, damaged: Sequence[tuple[str, str]] = ()) -> Index:
    """Ids made unique: the second row of an image (another caption) is `<id>#2`."""
    ids = table["id"].to_pylist()
    if len(set(ids)) < len(ids):
        count: dict[str, int] = {}
        for place, name in enumerate(ids):
            count[name] = count.get(name, 0) + 1
            ids[place] = name if count[name] == 1 else f"{name}#{count[name]}"
        if len(set(ids)) < len(ids):
            raise RunError("two pairs have one id: an image is named with '#' and a number, as a repeated one would be")
        table = table.set_column(0, "id", pa.array(ids, pa.string()))
    return Index(table.unify_dictionaries().combine_chunks(), tuple(damaged))


def _tars(files: Sequence[str]) -> Index:
    """The pairs of tars. What was found is kept in the cache, because it takes a walk through all of them."""
    stamps = [sources.stamp(file) for file in files]
    kept = cache_dir() / f"tars-{digest([1, list(files), stamps])[:16]}.parquet"
    if all(mark for _, mark in stamps) and kept.exists():
        table = pq.read_table(kept)
        damaged = json.loads((table.schema.metadata or {})[b"damaged"])
        return Index(table.replace_schema_metadata(None).cast(SCHEMA), tuple((i, why) for i, why in damaged))
    parts, damaged = [], []
    for file, (size, _) in _shown(list(zip(files, stamps, strict=True)), "index"):
        part, refused = _tar(file, size)
        parts.append(part)
        damaged += refused
    index = _unique(pa.concat_tables(parts), damaged)
    with atomic(kept) as temporary:
        pq.write_table(index.table.replace_schema_metadata({"damaged": json.dumps(damaged)}), temporary)
    return index


def members(file: str, size: int) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """Every regular member of the tar `file` of `size` bytes; see `walk`."""
    with sources.opened(file) as f:
        for member in walk(f, file, size):
            yield member, f


def walk(f: IO[bytes], file: str, size: int) -> Iterator[tarfile.TarInfo]:
    """Every regular member of an open tar, whose position is the reader's to move; `file` is its name in errors.

    Raises:
        RunError: no tar, a cut one, or a member that is neither a file nor a folder.
    """
    try:
        with tarfile.open(fileobj=f, mode="r:") as tar:
            ended = 0
            while (member := tar.next()) is not None:
                if tar.offset <= ended:  # a negative size leads back, again and again
                    raise RunError(f"damaged file: {file}: member {member.name!r} has {member.size} bytes")
                ended = tar.offset
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise RunError(f"{file}: member {member.name!r} is no plain file: a link, a device or sparse")
                if member.offset_data + member.size > size:
                    raise RunError(f"damaged file: {file}: it is cut off within {member.name!r}")
                yield member
            ended = tar.offset
    except (tarfile.TarError, EOFError, UnicodeError, OverflowError, MemoryError) as error:  # a size that is a lie
        raise RunError(f"damaged file: {file}: no whole tar ({_line(error)})") from None
    f.seek(ended)
    if f.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise RunError(f"damaged file: {file}: it is cut off, or damaged after byte {ended}: no end mark")


def _encodable(text: str) -> str:
    """The text in characters that UTF-8 has: half a character, of JSON or of a member's name, becomes `\\ud83d`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _tar(file: str, size: int) -> tuple[pa.Table, list[tuple[str, str]]]:
    shard = file.rpartition("/")[2].removesuffix(".tar")
    images: dict[str, tuple[int, int]] = {}
    captions: dict[str, str] = {}
    damaged: dict[str, str] = {}
    keys: dict[str, None] = {}  # in the order of the tar
    for member, f in members(file, size):
        folder, _, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        key, ending = _encodable(f"{folder}/{stem}".lstrip("/")), ending.lower()
        if ending not in (*IMAGE_ENDINGS, "txt", "json"):
            continue
        keys[key] = None
        if member.size > (MOST_BYTES if ending in IMAGE_ENDINGS else MOST_TEXT):
            damaged[key] = f"member {member.name!r} has {member.size} bytes"
        elif ending in IMAGE_ENDINGS:
            if key in images:
                damaged[key] = "two images"
            images[key] = (member.offset_data, member.size)
        elif ending == "txt" or key not in captions:
            f.seek(member.offset_data)
            try:
                text = f.read(member.size).decode("utf-8")
                if ending == "json":
                    record = json.loads(text)
                    if isinstance(record, dict) and isinstance(record.get("caption"), str):
                        captions[key] = _encodable(record["caption"])
                else:
                    captions[key] = text
            except (ValueError, RecursionError):
                damaged[key] = f"member {member.name!r} is no text"
    for key in keys:
        if key not in damaged and (key not in images or key not in captions):
            damaged[key] = "no image" if key not in images else "no caption"
    whole = [key for key in keys if key not in damaged]
    table = pa.table(
        {
            "id": pa.array([f"{shard}/{key}" for key in whole], pa.string()),
            "caption": pa.array([captions[key] for key in whole], pa.string()),
            "address": pa.array([file] * len(whole), pa.string()).dictionary_encode(),
            "offset": pa.array([images[key][0] for key in whole], pa.int64()),
            "size": pa.array([images[key][1] for key in whole], pa.int64()),
        }
    ).cast(SCHEMA)
    return table, [(f"{shard}/{key}", damaged[key]) for key in keys if key in damaged]


def _shown(items: Sequence[Any], what: str) -> Iterable[Any]:
    """The items under a bar that shows itself where they take long."""
    return tqdm(items, desc=what, ncols=80, delay=2, mininterval=1, leave=False)


# --- subsets ----------------------------------------------------------------------------------------------------------


class Strings(Sequence[str]):
    """A column of text: as a sequence, without an object a row (which every worker process would copy)."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return self.column.to_numpy(zero_copy_only=False)[index].tolist()
        return self.column[int(index)].as_py()

    def __iter__(self) -> Iterator[str]:
        return iter(self.column.to_pylist())


def drawn(ids: Iterable[str], count: int, *, seed: int) -> np.ndarray:
    """Indices, in order, of `count` of the ids: those with the smallest digests of (seed, id).

    Whether a pair is among them depends on its id and on how many are taken, and not on where it stands or how the
    files are cut. A smaller subset is part of a larger one of the same seed.
    """
    ranks = np.array(
        [int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") for name in ids], np.uint64
    )
    return np.sort(np.argsort(ranks, kind="stable")[:count])


def write_manifest(path: Path, ids: Iterable[str]) -> None:
    """A subset's ids as a CSV file with the one column `id`."""
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(["id"])
        writer.writerows([escape.cell(name)] for name in ids)


def read_manifest(address: str) -> list[str]:
    """The ids that `write_manifest` wrote; a spreadsheet may have added a byte order mark and empty lines.

    Raises:
        RunError: the file is another kind, empty, or repeats an id.
    """
    with sources.opened(address) as f:
        try:
            rows = [row for row in csv.reader(io.TextIOWrapper(f, encoding="utf-8-sig", newline="")) if row]
        except (UnicodeDecodeError, csv.Error) as error:
            raise RunError(f"damaged file: {address}: {_line(error)}") from None
    if not rows or rows[0] != ["id"] or any(len(row) != 1 for row in rows):
        raise RunError(f"{address}: not a manifest: a CSV file with the one column 'id' expected")
    ids = [row[0] for row in rows[1:]]
    if not ids or len(set(ids)) < len(ids):
        raise RunError(f"{address}: not a manifest: {'an id stands there twice' if ids else 'no ids'}")
    return ids


# --- pairs to train on ------------------------------------------------------------------------------------------------


def workers() -> int:
    """Processes that read images: `ABD_WORKERS`, else one a core up to 16. 0: the training process itself.

    Raises:
        ConfigError: `ABD_WORKERS` is no whole number of at least 0.
    """
    given = os.environ.get("ABD_WORKERS", "")
    if given and not given.isdecimal():
        raise ConfigError(f"ABD_WORKERS = {given!r}: a whole number of at least 0 expected")
    return int(given) if given else min(16, len(os.sched_getaffinity(0)))


def _room(count: int, side: int) -> torch.Tensor:
    """Uninitialised uint8 (count, 3, side, side), channels last in memory.

    In a worker it lies in shared memory from the first, as what torch collates itself does: to send it copies nothing.
    """
    size = count * 3 * side**2
    storage = torch.UntypedStorage._new_shared(size) if get_worker_info() else torch.UntypedStorage(size)
    strides = (3 * side**2, 1, 3 * side, 3)
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (count, 3, side, side), strides)


class Images(Dataset):
    """The images of an index's rows. Asked for a batch of indices, it gives them back with uint8 (B, 3, R, R).

    They are channels last in memory, as they are decoded: to turn them round would take a worker a twentieth of its
    time. An error comes back as a value, because a worker process would wrap it in a traceback.
    """

    def __init__(self, table: pa.Table, resolution: int) -> None:
        addresses = table["address"].unify_dictionaries().combine_chunks()
        self.ids = Strings(table["id"])
        self.files = Strings(pa.chunked_array([addresses.dictionary]))
        self.file = addresses.indices.to_numpy()
        self.offset, self.size = table["offset"].to_numpy(), table["size"].to_numpy()
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.file)

    def data(self, index: int) -> bytes:
        """The encoded image. Raises RunError."""
        address, size = self.files[self.file[index]], int(self.size[index])
        if (size if size >= 0 else sources.stamp(address)[0]) > MOST_BYTES:
            raise RunError(f"{address}: an image of more than {MOST_BYTES} bytes")
        return sources.read(address, offset=int(self.offset[index]), size=size)

    def __getitems__(self, indices: Sequence[int]) -> tuple[list[int], torch.Tensor | AbdError]:
        batch = _room(len(indices), self.resolution)
        pixels = batch.numpy()
        for place, index in enumerate(indices):
            try:
                pixels[place] = decode(self.data(index), self.resolution)
            except AbdError as error:
                return list(indices), ImageError(f"{self.ids[index]}: {error}")
        return list(indices), batch


class _Checked(Images):
    """Asked for a batch of indices, it says what is wrong with which."""

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, str]]:  # type: ignore[override]
        found = []
        for index in indices:
            try:
                check(self.data(index))
            except AbdError as error:
                found.append((index, str(error)))
        return found


def _same(batch: Any) -> Any:
    return batch


def loader(images: Images, batches: Iterable[Sequence[int]], *, processes: int | None = None) -> DataLoader:
    """The batches of images in their order, read ahead by `processes` workers (default: `workers()`).

    What comes out depends on the batches alone: workers change how fast it comes.
    """
    count = workers() if processes is None else processes
    return DataLoader(
        images,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=count,
        collate_fn=_same,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=2 if count else None,
    )


def in_batches(count: int, size: int) -> list[range]:
    """The indices 0 to count - 1, `size` at a time."""
    return [range(start, min(count, start + size)) for start in range(0, count, size)]


@dataclass(frozen=True, eq=False)
class ImagePairs:
    """Image-caption pairs of an index, at a model's resolution, used where the embedded `data.Pairs` are.

    An image has one view and one caption: `seed`, `step` and `epoch` change nothing.

    Attributes:
        table: rows of `SCHEMA`.
        resolution: side of the images in pixels.
        damaged: what has been left out: (id, reason).
    """

    table: pa.Table
    resolution: int
    damaged: tuple[tuple[str, str], ...] = ()
    _ahead: _Ahead = field(default_factory=lambda: _Ahead(), repr=False)

    def __len__(self) -> int:
        return self.table.num_rows

    @functools.cached_property
    def ids(self) -> Strings:
        return Strings(self.table["id"])

    @functools.cached_property
    def digest(self) -> str:
        """Identity of these pairs: ids, captions, sizes of a tar's images; not where they lie."""
        columns = hashlib.sha256()
        for name in ("id", "caption", "size"):
            for value in self.table[name].to_pylist():
                columns.update(f"{len(str(value))}:{value}".encode("utf-8", "surrogatepass"))
        return digest([columns.hexdigest(), self.resolution])

    @functools.cached_property
    def _checked_file(self) -> Path:
        """What was found when all images were read: of these pairs, where they lie now."""
        addresses = [sources.absolute(address) for address in self._images.files]
        places = [addresses, self._images.file.tolist(), self._images.offset.tolist()]
        return cache_dir() / f"damaged-{digest([self.digest, places])[:16]}.csv"

    @functools.cached_property
    def _images(self) -> Images:
        return Images(self.table, self.resolution)

    def shows(self, target: str) -> torch.Tensor:
        """Which captions name the target, as a word or its plural with s, in any case: bool (N,)."""
        # RE2, as Arrow has it: \b knows ASCII words only, so the borders are spelt out.
        escaped = "".join(c if c.isalnum() or ord(c) > 127 else f"\\x{{{ord(c):x}}}" for c in target)
        pattern = rf"(?i)(^|[^\pL\pN]){escaped}s?($|[^\pL\pN])"
        found = pc.match_substring_regex(self.table["caption"], pattern)
        return torch.from_numpy(found.to_numpy(zero_copy_only=False).astype(bool))

    def take(self, indices: Sequence[int] | np.ndarray) -> ImagePairs:
        return ImagePairs(self.table.take(pa.array(np.asarray(indices, np.int64))), self.resolution, self.damaged)

    def subset(self, share: float, *, seed: int) -> ImagePairs:
        """A seeded share of the pairs by their ids, in their order. Raises ConfigError where nothing would be left."""
        count = round(share * len(self))
        if count < 1:
            raise ConfigError(f"share = {share:g} of {len(self)} pairs leaves none")
        return self if count == len(self) else self.take(drawn(self.ids, count, seed=seed))

    def chosen(self, ids: Sequence[str], where: str) -> ImagePairs:
        """The pairs with these ids, in that order. Raises ConfigError where one is missing."""
        place = {escape.cell(name): number for number, name in enumerate(self.ids)}  # as a manifest has them
        ids = [escape.cell(name) for name in ids]
        missing = [name for name in ids if name not in place]
        if missing:
            what = f"{len(missing)} of its {len(ids)} ids are no pair's, the first is {missing[0]!r}"
            raise ConfigError(f"manifest = {where!r}: {what}")
        return self.take([place[name] for name in ids])

    def checked(self, max_damaged: float) -> ImagePairs:
        """The pairs whose image can be read to its end; the others are counted and listed in `damaged`.

        Every image is read once; what is found stays in the cache, `damaged-<digest>.csv` (index, id, reason). Of
        several ranks, which call it together, the first one reads.

        Raises:
            RunError: more than the share `max_damaged` of the pairs is damaged.
        """
        kept = self._checked_file
        if ranks.agreed(not kept.exists()):
            if ranks.first():
                reader = loader(_Checked(self.table, self.resolution), in_batches(len(self), 64))
                failures = [pair for batch in watched(reader, len(self), 64) for pair in batch]
                with atomic(kept) as temporary, temporary.open("w", newline="", encoding="utf-8") as f:
                    csv.writer(f).writerows([i, escape.cell(self.ids[i]), escape.cell(why)] for i, why in failures)
            ranks.barrier()
        with kept.open(newline="", encoding="utf-8") as f:
            rows = [(int(index), name, reason) for index, name, reason in csv.reader(f)]
        found = tuple((name, reason) for _, name, reason in rows)
        _tolerate(found, len(self), max_damaged, str(kept))
        if not rows:
            return self
        left_out = {index for index, _, _ in rows}
        return ImagePairs(
            self.table.take(pa.array([i for i in range(len(self)) if i not in left_out])),
            self.resolution,
            (*self.damaged, *found),
        )

    def plan(self, batches: Iterable[torch.Tensor]) -> None:
        """Let workers read ahead: `images` will be asked for these batches, in this order, whole or in parts."""
        self._ahead.start(loader(self._images, (batch.tolist() for batch in batches)))

    def images(self, indices: torch.Tensor, *, seed: int = 0, step: int = 0) -> torch.Tensor:
        """The images of the pairs `indices` (B,): float (B, 3, R, R) in [0, 1], on the device.

        Of a batch that several ranks share, each reads its own and leaves the others black.

        Raises:
            ImageError: an image that could be read before cannot be read now.
        """
        own = ranks.own_rows(len(indices))
        wanted = indices[own].tolist()
        try:
            pixels = self._ahead.take(wanted)
            if pixels is None:
                pixels = unwrapped(self._images.__getitems__(wanted))
        except ImageError as error:
            raise ImageError(f"{error}; to have all images checked again, delete {self._checked_file}") from None
        pixels = pixels.to(models.device(), non_blocking=True)
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        if len(pixels) == len(indices):
            return pixels
        images = pixels.new_zeros(len(indices), *pixels.shape[1:])
        images[own] = pixels
        return images

    def captions(self, indices: torch.Tensor, *, seed: int = 0, epoch: int = 0) -> list[str]:
        return self.table["caption"].take(pa.array(indices.numpy())).to_pylist()


def _tolerate(damaged: Sequence[tuple[str, str]], total: int, max_damaged: float, where: str) -> None:
    """Raises RunError where more than the share `max_damaged` of `total` pairs, or all of them, is damaged."""
    if damaged and (len(damaged) > max_damaged * total or len(damaged) == total):
        name, reason = damaged[0]
        raise RunError(
            f"{len(damaged)} of {total} pairs are damaged, and max_damaged = {max_damaged:g} allows "
            f"{int(max_damaged * total)}; the first, {name}: {reason} (all: {where})"
        )


class _Ahead:
    """What workers have read ahead: the present batch, the next one, and those that follow."""

    def __init__(self) -> None:
        self.start(())

    def start(self, batches: Iterable[tuple[list[int], torch.Tensor | AbdError]]) -> None:
        self.batches = received(batches)
        self.held: list[tuple[dict[int, int], tuple[list[int], torch.Tensor | AbdError]]] = []

    def take(self, wanted: list[int]) -> torch.Tensor | None:
        """Pixels of these indices where the present batch or the next one has them all, else None."""
        asked = set(wanted)
        for number in range(2):
            if number == len(self.held):
                if (following := next(self.batches, None)) is None:
                    return None
                self.held.append(({index: row for row, index in enumerate(following[0])}, following))
            place, batch = self.held[number]
            if place.keys() >= asked:
                del self.held[:number]
                pixels, places = unwrapped(batch), [place[index] for index in wanted]
                return pixels if places == list(range(len(pixels))) else pixels[places]
        return None


def unwrapped(batch: tuple[list[int], torch.Tensor | AbdError]) -> torch.Tensor:
    """The images of a batch that `loader` gave. Raises the error that stands in their place."""
    if isinstance(batch[1], AbdError):
        raise batch[1]
    return batch[1]


def received(batches: Iterable[Any]) -> Iterator[Any]:
    """What workers send.

    Raises:
        RuntimeError: as torch raises it where a worker died, for `readers_told`; also where it died while it sent, and
            what is met first is a broken connection.
    """
    try:
        yield from batches
    except (OSError, EOFError) as error:
        time.sleep(1)  # in which torch, told of the death by a signal, raises its own word on it
        raise RuntimeError(f"DataLoader worker lost: {type(error).__name__}") from None


def watched(reader: DataLoader, total: int, size: int) -> Iterator[Any]:
    """What the reader gives, `size` images at a time, under a bar that shows itself where it takes long."""
    bar = tqdm(total=total, desc="check images", unit="image", ncols=80, delay=2, mininterval=1, leave=False)
    with bar, readers_told():
        for batch in received(reader):
            yield batch
            bar.update(size)


def load_image_pairs(
    address: str,
    *,
    resolution: int,
    columns: str = "",
    manifest: str = "",
    limit: int = 0,
    max_damaged: float = 0.01,
) -> ImagePairs:
    """The pairs at an address: those of the manifest, of these `limit` drawn by their ids, without damaged ones.

    Raises:
        ConfigError: see `read_index`; `limit` exceeds the pairs, or the manifest names others.
        RunError: a file is missing or damaged, or too many images are.
    """
    index = read_index(address, columns=columns)
    pairs = ImagePairs(index.table, resolution, index.damaged)
    _tolerate(index.damaged, len(pairs) + len(index.damaged), max_damaged, address)
    if not len(pairs):
        raise RunError(f"pairs = {address!r}: no pairs in it")
    if manifest:
        pairs = pairs.chosen(read_manifest(manifest), manifest)
    if limit > len(pairs):
        raise ConfigError(f"limit = {limit}: there are {len(pairs)} pairs")
    if limit and limit < len(pairs):
        pairs = pairs.take(drawn(pairs.ids, limit, seed=0))
    return pairs.checked(max_damaged)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m abd_core.formats", description="Counts image-caption pairs, and writes a subset's manifest."
    )
    parser.add_argument("pairs", help="a table or tars, with braces for many: 'cc3m/{00000..00331}.tar'")
    parser.add_argument("--columns", default="", help="image's and caption's column of a table")
    parser.add_argument("--count", type=int, default=0, help="pairs in the subset (0: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (0)")
    parser.add_argument("--manifest", type=Path, help="file to write the subset's ids to")
    given = parser.parse_args(arguments)
    start = time.perf_counter()
    index = read_index(given.pairs, columns=given.columns)
    ids = Strings(index.table["id"])
    print(f"{len(ids)} pairs, {len(index.damaged)} that are none, {time.perf_counter() - start:.1f} s")
    if not 0 <= given.count <= len(ids):
        raise ConfigError(f"count = {given.count}: at most {len(ids)} expected, the pairs")
    if given.manifest:
        subset = drawn(ids, given.count or len(ids), seed=given.seed)
        write_manifest(given.manifest, (ids[index] for index in subset))
        print(f"{len(subset)} ids: {given.manifest}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AbdError as error:
        sys.exit(str(error))
