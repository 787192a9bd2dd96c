"""Labelled images: ImageNet's own layouts give the right 50,000 labels, and any folder of classes is a test set."""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import fsspec
import miniature
import numpy as np
import open_clip
import pytest
import torch

from abd_core import labelled, sources
from abd_core.config import AbdError, ConfigError
from abd_core.formats import decode
from abd_core.labelled import is_imagenet, load_labelled, read_labelled
from abd_core.paths import RunError, cache_dir
from abd_core.text import wordnet

_TIMM = Path(find_spec("timm").origin).parent  # comes with open_clip
SYNSETS = (_TIMM / "data" / "_info" / "imagenet_synsets.txt").read_text().split()
CRANES, MAILLOTS = (134, 517), (638, 639)


@pytest.fixture(autouse=True)
def _fresh_cache(runs: Path, monkeypatch: pytest.MonkeyPatch):
    if (runs / "cache").is_symlink():
        (runs / "cache").unlink()
    monkeypatch.setenv("ABD_WORKERS", "0")


def imagenet_folders(folder: Path, *, each: int = 1) -> Path:
    """A thousand folders by WordNet id; their images are links to one file."""
    folder.mkdir()
    (folder.parent / "one.jpg").write_bytes(miniature.picture(0))
    for wnid in SYNSETS:
        (folder / wnid).mkdir()
        for i in range(each):
            os.link(folder.parent / "one.jpg", folder / wnid / f"{wnid}_{i}.JPEG")
    return folder


def flat(count: int, *, seed: int = 0) -> list[int]:
    """A label for each of so many flat files; the first of them are the classes that tables on the web confuse."""
    labels = [*CRANES, *MAILLOTS, *np.random.default_rng(seed).integers(0, 1000, count - 4).tolist()]
    return labels


def write_flat(folder: Path, labels: list[int]) -> Path:
    folder.mkdir()
    for number, _ in enumerate(labels, 1):
        (folder / f"ILSVRC2012_val_{number:08}.JPEG").write_bytes(miniature.picture(number % 7))
    return folder


def write_devkit(folder: Path, labels: list[int], *, packed: bool = False, wnids=SYNSETS) -> Path:
    meta, truth = miniature.devkit_files(wnids, labels)
    if packed:
        path = folder / "ILSVRC2012_devkit_t12.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            miniature.add(tar, f"ILSVRC2012_devkit_t12/{labelled.META}", meta)
            miniature.add(tar, f"ILSVRC2012_devkit_t12/{labelled.GROUND_TRUTH}", truth)
        return path
    path = folder / "ILSVRC2012_devkit_t12"
    (path / "data").mkdir(parents=True)
    (path / labelled.META).write_bytes(meta)
    (path / labelled.GROUND_TRUTH).write_bytes(truth)
    return path


# --- which class is which ---------------------------------------------------------------------------------------------


def test_the_recognised_ids_are_imagenet_s():
    assert len(SYNSETS) == 1000 and sorted(SYNSETS) == SYNSETS and is_imagenet(SYNSETS)
    assert not is_imagenet(SYNSETS[::-1]) and not is_imagenet(SYNSETS[:-1])


def test_open_clip_s_names_stand_in_the_order_of_the_sorted_ids():
    """WordNet's own names of an id share a word with open_clip's name in nearly all classes; by luck they would not."""

    def words(text: str) -> set[str]:
        return set(re.findall(r"[a-z]+", text.lower()))

    reader = wordnet()
    synsets = [reader.synset_from_pos_and_offset("n", int(wnid[1:])) for wnid in SYNSETS]
    theirs = [words(" ".join([*s.lemma_names(), s.definition()]).replace("_", " ")) for s in synsets]
    ours = [words(name) for name in open_clip.IMAGENET_CLASSNAMES]
    agree = sum(bool(a & b) for a, b in zip(ours, theirs, strict=True))
    shifted = sum(bool(a & b) for a, b in zip(ours[1:] + ours[:1], theirs, strict=True))
    assert agree > 970 and shifted < 300


@pytest.mark.parametrize(
    ("label", "wnid", "name", "meaning"),
    [
        (134, "n02012849", "crane bird", "long-necked wading bird"),
        (517, "n03126707", "construction crane", "lifts and moves heavy objects"),
        (638, "n03710637", "tights", "close-fitting .* leotards|woman's one-piece|tights"),
        (639, "n03710721", "one-piece bathing suit", "one-piece bathing suit"),
    ],
)
def test_the_classes_that_share_a_name_are_told_apart_by_id(label: int, wnid: str, name: str, meaning: str):
    assert SYNSETS[label] == wnid and open_clip.IMAGENET_CLASSNAMES[label] == name
    assert re.search(meaning, wordnet().synset_from_pos_and_offset("n", int(wnid[1:])).definition())


def test_going_by_wordnet_s_first_name_gives_the_known_wrong_labels():
    """The two fewer names than classes are why tables on the web mislabel 100 images."""
    reader = wordnet()
    first = [reader.synset_from_pos_and_offset("n", int(wnid[1:])).lemma_names()[0].lower() for wnid in SYNSETS]
    twice = {name for name, count in Counter(first).items() if count > 1}
    wrong = [label for label, name in enumerate(first) if first.index(name) != label]
    assert {"crane", "maillot"} <= twice and {517, 639} <= set(wrong)


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_folders_by_wordnet_id_get_open_clip_s_names(tmp_path: Path):
    found = read_labelled(str(imagenet_folders(tmp_path / "val")))
    assert found.class_names == tuple(open_clip.IMAGENET_CLASSNAMES)
    shown = dict(zip(found.table["id"].to_pylist(), found.labels.tolist(), strict=True))
    assert shown == {f"{wnid}/{wnid}_0.JPEG": label for label, wnid in enumerate(SYNSETS)}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("where", ["folder", "tar", "memory"])
def test_flat_files_get_the_devkit_s_labels_in_the_models_order(where: str, packed: bool, tmp_path: Path):
    labels = flat(40)
    images, devkit = str(write_flat(tmp_path / "val", labels)), str(write_devkit(tmp_path, labels, packed=packed))
    if where == "tar":
        files = sorted((tmp_path / "val").iterdir(), reverse=True)
        (tmp_path / "val.tar").write_bytes(miniature.tar_bytes([(p.name, p.read_bytes()) for p in files]))
        images = f"{images}.tar"
    if where == "memory":
        memory = fsspec.filesystem("memory")
        for path in (p for p in tmp_path.rglob("*") if p.is_file()):
            memory.pipe_file(f"/in{packed}/{path.relative_to(tmp_path)}", path.read_bytes())
        images, devkit = (path.replace(str(tmp_path), f"memory://in{packed}") for path in (images, devkit))
    found = read_labelled(images, devkit=devkit)
    assert found.labels.tolist() == labels and found.class_names == tuple(open_clip.IMAGENET_CLASSNAMES)
    names = found.table["id"].to_pylist()
    assert names == [f"ILSVRC2012_val_{number:08}.JPEG" for number in range(1, 41)]


def test_the_devkit_s_own_numbers_are_another_order(tmp_path: Path):
    wnids, truth = labelled.read_devkit(str(write_devkit(tmp_path, flat(40))))
    assert sorted(wnids.values()) == SYNSETS
    assert [number - 1 for number in truth] != flat(40)


@pytest.mark.parametrize("form", ["names", "pairs"])
def test_any_folders_are_a_test_set_with_a_file_of_names(form: str, tmp_path: Path):
    folder = miniature.write_folders(tmp_path / "val", each=3)
    names = [f"a {thing}" for thing in miniature.THINGS]
    lines = names if form == "names" else [f"{t}\ta {t}" for t in reversed(miniature.THINGS)]
    (tmp_path / "names.txt").write_text("\n".join(lines) + "\n\n")
    found = read_labelled(str(folder), classes=str(tmp_path / "names.txt"))
    assert found.class_names == tuple(names)
    folders = [name.partition("/")[0] for name in found.table["id"].to_pylist()]
    assert [miniature.THINGS[label] for label in found.labels] == folders


def test_folders_that_are_links_are_followed_but_in_no_circle(tmp_path: Path):
    for name in ("cat", "dog"):
        (tmp_path / "store" / name).mkdir(parents=True)
        (tmp_path / "store" / name / "1.jpg").write_bytes(b"image")
    (tmp_path / "val").mkdir()
    for name, target in (("cat", "cat"), ("dog", "dog"), ("kitten", "cat")):
        (tmp_path / "val" / name).symlink_to(tmp_path / "store" / target)
    (tmp_path / "store" / "cat" / "up").symlink_to(tmp_path / "val")
    (tmp_path / "store" / "dog" / "self").symlink_to(".")
    found = dict(sources.listing(str(tmp_path / "val")))
    assert {"cat/1.jpg", "dog/1.jpg", "kitten/1.jpg"} <= found.keys() and set(found.values()) == {5}
    assert "dog/self/1.jpg" not in found and not any(path.count("cat/") > 1 for path in found)


def test_what_is_no_test_set_is_refused_in_one_line(tmp_path: Path):
    labels = flat(10)
    val, kit = write_flat(tmp_path / "val", labels), write_devkit(tmp_path, labels)
    things = miniature.write_folders(tmp_path / "things", each=1)
    few = miniature.write_folders(tmp_path / "few", each=1, names=SYNSETS[:5])
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    other = write_devkit(tmp_path / "other", labels, wnids=[*SYNSETS[:-1], "n99999999"])
    short = tmp_path / "short"
    short.mkdir()
    write_devkit(short, labels[:9])
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(b"no archive")
    for images, options, line in [
        (val, {}, "ImageNet's flat files need its devkit"),
        (things, {}, "give their names in test_classes"),
        (few, {}, "not ImageNet's 1,000 WordNet ids"),
        (tmp_path / "nowhere", {}, "missing file"),
        (tmp_path / "empty", {}, "no images in it"),
        (val, {"devkit": str(other)}, "not ILSVRC 2012's devkit"),
        (val, {"devkit": str(short / "ILSVRC2012_devkit_t12")}, "the devkit labels 1 to 9"),
        (things, {"devkit": str(kit)}, "0 files ILSVRC2012_val_"),
        (val, {"devkit": str(broken)}, "damaged file"),
        (val, {"devkit": str(tmp_path / "empty")}, "missing file"),
        (val, {"devkit": str(kit), "classes": "x.txt"}, "names the classes already"),
    ]:
        with pytest.raises(AbdError, match=line) as error:
            read_labelled(str(images), **options)
        assert "\n" not in str(error.value)


# --- as a test set ----------------------------------------------------------------------------------------------------


@pytest.fixture
def things(tmp_path: Path) -> dict[str, str]:
    """A folder of six classes with ten images each, and their names."""
    miniature.write_folders(tmp_path / "things", each=10)
    (tmp_path / "names.txt").write_text("\n".join(miniature.THINGS))
    return {"images": str(tmp_path / "things"), "classes": str(tmp_path / "names.txt")}


def test_a_test_set_has_the_decoded_images_and_open_clip_s_templates(things: dict[str, str]):
    whole = load_labelled(**things, split="eval", resolution=24, dev_share=0)
    assert whole.images.shape == (60, 3, 24, 24) and whole.images.dtype == torch.uint8
    for index in (0, 17, 59):
        label = int(whole.labels[index])
        folder = Path(things["images"]) / miniature.THINGS[label]
        assert any(np.array_equal(decode(p.read_bytes(), 24), whole.images[index].numpy()) for p in folder.iterdir())
    assert len({image.numpy().tobytes() for image in whole.images}) == 60
    assert len(whole.templates) == 80 and whole.templates[0].format("cat") == "a bad photo of a cat."


def test_a_share_of_each_class_is_for_development_and_the_rest_for_evaluation(things: dict[str, str]):
    def pixels(split: str, share: float) -> Counter:
        test = load_labelled(**things, split=split, resolution=24, dev_share=share)
        assert test.split == split
        return Counter(image.numpy().tobytes() for image in test.images)

    dev, rest, larger = pixels("dev", 0.2), pixels("eval", 0.2), pixels("dev", 0.3)
    assert (dev.total(), rest.total(), larger.total()) == (12, 48, 18)
    assert not dev & rest and dev <= larger
    assert load_labelled(**things, split="dev", resolution=24, dev_share=0.2).labels.bincount().tolist() == [2] * 6
    assert pixels("dev", 0) == pixels("eval", 0) == dev + rest


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_share_that_leaves_a_split_empty_is_refused(share: float, things: dict[str, str]):
    with pytest.raises(ConfigError, match="dev_share"):
        load_labelled(**things, split="dev", resolution=24, dev_share=share)


def test_images_are_decoded_once_and_what_is_written_to_them_stays_in_memory(things: dict[str, str], monkeypatch):
    first = load_labelled(**things, split="eval", resolution=24)
    assert [path.stat().st_size for path in cache_dir().glob("test-*.bin")] == [60 * 3 * 24 * 24]
    kept = first.images.clone()
    first.images.zero_()
    monkeypatch.setattr(labelled, "loader", None)
    again = load_labelled(**things, split="eval", resolution=24)
    assert torch.equal(again.images, kept) and again.digest == first.digest


def test_an_image_that_is_replaced_by_one_of_the_same_size_is_read_again(things: dict[str, str]):
    def pixels() -> torch.Tensor:
        return load_labelled(**things, split="eval", resolution=24).images

    image = Path(things["images"]) / "cat" / "3.JPEG"
    first, size = pixels(), image.stat().st_size
    other = miniature.picture(5)
    image.write_bytes((other + bytes(size))[:size] if len(other) <= size else other[: size - 2] + b"\xff\xd9")
    assert image.stat().st_size == size and not torch.equal(pixels(), first)


def test_the_digest_tells_test_sets_apart(things: dict[str, str], tmp_path: Path):
    def of(**changes) -> str:
        return load_labelled(**{**things, "split": "eval", "resolution": 24, "dev_share": 0.1, **changes}).digest

    (tmp_path / "other.txt").write_text("\n".join(f"the {thing}" for thing in miniature.THINGS))
    digests = [of(), of(split="dev"), of(dev_share=0.2), of(resolution=32), of(classes=str(tmp_path / "other.txt"))]
    image = Path(things["images"]) / "cat" / "3.JPEG"
    image.write_bytes(miniature.picture(5)[:-2] + b"\xff\xd9\x00")
    assert len({*digests, of()}) == 6


def test_a_damaged_image_is_named(things: dict[str, str]):
    image = Path(things["images"]) / "cat" / "3.JPEG"
    image.write_bytes(image.read_bytes()[:-80])
    with pytest.raises(AbdError, match=r"cat/3.JPEG: damaged image") as error:
        load_labelled(**things, split="eval", resolution=24)
    assert "\n" not in str(error.value)


def test_a_damaged_cache_is_written_again(things: dict[str, str]):
    first = load_labelled(**things, split="eval", resolution=24).images.clone()
    (path,) = cache_dir().glob("test-*.bin")
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(load_labelled(**things, split="eval", resolution=24).images, first)


def test_a_labelled_tar_that_is_cut_is_refused(tmp_path: Path):
    data = miniature.tar_bytes([("ILSVRC2012_val_00000001.JPEG", miniature.picture(1))])
    (tmp_path / "val.tar").write_bytes(data[:700])
    with pytest.raises(RunError, match=r"cut off|no whole tar"):
        read_labelled(str(tmp_path / "val.tar"), devkit=str(write_devkit(tmp_path, flat(5))))
