"""Image-caption pairs from tables and tars: the same pairs from each, in the same pixels, whoever reads them."""

from __future__ import annotations

import io
import json
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import miniature
import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from abd_core import formats, sources
from abd_core.config import AbdError, ConfigError
from abd_core.formats import ImageError, ImagePairs, Index, check, decode, load_image_pairs, read_index
from abd_core.paths import RunError, cache_dir, readers_told

PAIRS = miniature.samples()
KINDS = ("cleanclip", "open_clip", "parquet", "huggingface", "webdataset")


@pytest.fixture(autouse=True)
def _no_workers(runs: Path, monkeypatch: pytest.MonkeyPatch):
    """Nor what another test has left in the cache."""
    (runs / "cache").unlink()
    monkeypatch.setenv("ABD_WORKERS", "0")


def written(folder: Path, kind: str, pairs=PAIRS) -> str:
    """The pairs in one of `KINDS`; returns their address."""
    if kind == "webdataset":
        return miniature.write_shards(folder, pairs)
    return str(miniature.write_table(folder, kind, pairs))


def loaded(address: str, **options) -> ImagePairs:
    return load_image_pairs(address, **{"resolution": 24, **options})


def in_memory(folder: Path, address: str) -> str:
    """All files of the folder in fsspec's memory; returns the address there."""
    memory = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/copy/{folder.name}/{path.relative_to(folder)}", path.read_bytes())
    return address.replace(str(folder), f"memory://copy/{folder.name}")


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["local", "file", "memory"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_pairs(kind: str, where: str, tmp_path: Path):
    address = written(tmp_path / kind, kind)
    if where == "memory":
        address = in_memory(tmp_path / kind, address)
    elif where == "file":
        address = f"file://{address}"
    pairs = loaded(address)
    by_caption = {caption: number for number, caption in enumerate(pairs.captions(torch.arange(len(pairs))))}
    assert by_caption.keys() == {caption for *_, caption in PAIRS} and len(pairs) == len(PAIRS)
    places = torch.tensor([by_caption[caption] for *_, caption in PAIRS])
    expected = torch.from_numpy(np.stack([decode(data, 24) for _, data, _ in PAIRS]))
    assert torch.equal((pairs.images(places) * 255).round().to(torch.uint8), expected)
    assert len(set(pairs.ids)) == len(pairs)


@pytest.mark.parametrize("text", ["txt", "json"])
def test_a_tar_s_captions_are_its_texts_or_else_its_records(text: str, tmp_path: Path):
    table = read_index(miniature.write_shards(tmp_path, PAIRS, text=text)).table
    assert Counter(table["caption"].to_pylist()) == Counter(caption for *_, caption in PAIRS)


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "JPG", "png", "webp"])
def test_a_tar_s_images_are_of_any_usual_kind(ending: str, tmp_path: Path):
    kind = {"jpg": "JPEG", "jpeg": "JPEG"}.get(ending.lower(), ending.upper())
    (tmp_path / "a.tar").write_bytes(
        miniature.tar_bytes([(f"x.{ending}", miniature.picture(3, kind=kind)), ("x.txt", b"three")])
    )
    pairs = loaded(str(tmp_path / "a.tar"))
    assert list(pairs.ids) == ["a/x"] and pairs.images(torch.tensor([0])).shape == (1, 3, 24, 24)


def test_images_in_a_parquet_file_are_bytes_with_a_path_or_without_or_a_path_alone(tmp_path: Path):
    images = [{"bytes": PAIRS[i][1], "path": None if i else "a.jpg"} for i in range(2)]
    (tmp_path / "beside.jpg").write_bytes(PAIRS[2][1])
    table = pa.table({"image": [*images, {"bytes": None, "path": "beside.jpg"}], "caption": ["x", None, "z"]})
    pq.write_table(table, tmp_path / "structs.parquet")
    plain = pa.table({"text": ["x", "", "z"], "width": [1] * 3, "jpg": [data for _, data, _ in PAIRS[:3]]})
    pq.write_table(plain, tmp_path / "raw.parquet")
    structs, raw = loaded(f"{tmp_path}/structs.parquet"), loaded(f"{tmp_path}/raw.parquet", columns="jpg,text")
    assert (list(structs.ids), list(raw.ids)) == (["a.jpg", "structs/1", "beside.jpg"], ["raw/0", "raw/1", "raw/2"])
    expected = torch.from_numpy(np.stack([decode(data, 24) for _, data, _ in PAIRS[:3]])) / 255
    for pairs in (structs, raw):
        assert torch.equal(pairs.images(torch.arange(3)), expected)
        assert pairs.captions(torch.arange(3)) == ["x", "", "z"]


def test_images_in_a_parquet_file_are_copied_once_and_again_when_it_changes(tmp_path: Path, monkeypatch):
    address, copied = written(tmp_path, "huggingface"), []
    copy = formats._copied
    monkeypatch.setattr(formats, "_copied", lambda file, *rest: (copied.append(file), copy(file, *rest))[1])
    first = loaded(address)
    assert loaded(address).digest == first.digest and copied == [address]
    assert sum(path.stat().st_size for path in cache_dir().glob("parquet-*.bin")) == sum(len(d) for _, d, _ in PAIRS)
    written(tmp_path, "huggingface", PAIRS[:20])
    assert len(loaded(address)) == 20 and copied == [address, address]
    next(cache_dir().glob("parquet-*.bin")).unlink()
    next(cache_dir().glob("parquet-*.bin")).unlink()
    assert len(loaded(address)) == 20 and len(copied) == 3


def test_captions_are_read_as_they_are_written(tmp_path: Path):
    captions = ["NA", "null", "", "a, b", 'say "hi"', "naïve 猫 🐱", "two\nlines", "  spaces  ", "1e5", "TRUE"]
    pairs = [(f"{i}", miniature.picture(i), caption) for i, caption in enumerate(captions)]
    for kind in KINDS:
        index = read_index(written(tmp_path / kind, kind, pairs))
        assert sorted(index.table["caption"].to_pylist()) == sorted(captions), kind


def test_columns_are_chosen_by_name_and_tabs_are_seen(tmp_path: Path):
    (tmp_path / "a.csv").write_text("url\tpath\ttext\nu\tx.jpg\tone, two\n")
    table = read_index(str(tmp_path / "a.csv"), columns="path, text").table
    assert (table["id"].to_pylist(), table["caption"].to_pylist()) == (["x.jpg"], ["one, two"])
    assert table["address"].to_pylist() == [str(tmp_path / "x.jpg")]


def test_a_second_caption_of_an_image_is_a_pair_of_its_own(tmp_path: Path):
    (tmp_path / "a.csv").write_text("image,caption\nx.jpg,one\nx.jpg,two\ny.jpg,three\n")
    assert read_index(str(tmp_path / "a.csv")).table["id"].to_pylist() == ["x.jpg", "x.jpg#2", "y.jpg"]


def test_paths_of_a_table_are_relative_to_it_absolute_or_of_its_own_kind():
    assert sources.beside("/data/cc3m/train.csv", "images/1.jpg") == "/data/cc3m/images/1.jpg"
    assert sources.beside("/data/train.csv", "/elsewhere/1.jpg") == "/elsewhere/1.jpg"
    assert sources.beside("s3://bucket/cc3m/train.csv", "images/1.jpg") == "s3://bucket/cc3m/images/1.jpg"
    assert sources.beside("s3://bucket/train.csv", "s3://other/1.jpg") == "s3://other/1.jpg"
    for table, entry in [
        ("/a.csv", "http://host/1.jpg"),
        ("s3://b/a.csv", "/etc/passwd"),
        ("s3://b/a.csv", "file:///x"),
    ]:
        with pytest.raises(RunError, match="it names"):
            sources.beside(table, entry)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("a/{08..11}.tar", ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]),
        ("{x,y}/{0..1}", ["x/0", "x/1", "y/0", "y/1"]),
        ("plain.csv", ["plain.csv"]),
        ("{7..7}", ["7"]),
    ],
)
def test_braces_stand_for_a_range_or_a_list(address: str, expected: list[str]):
    assert sources.expand(address) == expected


@pytest.mark.parametrize("address", ["{3..1}", "{a}", "a{", "}", "{}", "{0..999999999}", "{0..9999}{0..9999}", "{0..1"])
def test_other_braces_are_refused(address: str):
    with pytest.raises(ConfigError, match="address"):
        sources.expand(address)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_image_that_a_parquet_file_repeats_is_copied_once(tmp_path: Path):
    images = [PAIRS[number % 2][1] for number in range(300)]
    pq.write_table(pa.table({"jpg": images, "text": [str(n) for n in range(300)]}), tmp_path / "a.parquet")
    pairs = loaded(str(tmp_path / "a.parquet"), columns="jpg,text")
    (store,) = cache_dir().glob("parquet-*.bin")
    assert store.stat().st_size == len(PAIRS[0][1]) + len(PAIRS[1][1])
    expected = torch.from_numpy(np.stack([decode(PAIRS[n % 2][1], 24) for n in (0, 1, 298, 299)])) / 255
    assert torch.equal(pairs.images(torch.tensor([0, 1, 298, 299])), expected)


def test_a_parquet_file_whose_images_unpack_to_far_more_than_it_has_is_refused(tmp_path: Path):
    images = [bytes([number]) * (4 << 20) for number in range(8)]
    table = pa.table({"jpg": images, "text": ["x"] * len(images)})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(RunError, match=r"a\.parquet: its images unpack to more than 100 times its size"):
        loaded(str(tmp_path / "a.parquet"), columns="jpg,text")
    assert not list(cache_dir().glob("parquet-*"))


def test_columns_of_a_parquet_file_that_hold_neither_images_nor_text_are_refused(tmp_path: Path):
    path = tmp_path / "a.parquet"
    for images, captions, line in [
        ([[1, 2]], ["x"], r"column 'image' holds list<.*> paths of image files, or images as bytes"),
        ([{"path": "x.jpg"}], ["x"], "column 'image' holds struct<"),
        ([{"bytes": "text"}], ["x"], "column 'image' holds struct<"),
        ([b"bytes"], [b"x"], "column 'caption' holds binary, but text is read"),
        ([{"bytes": None, "path": None}, {"bytes": b"x", "path": None}], ["x", "y"], "row 1 names no image"),
    ]:
        pq.write_table(pa.table({"image": images, "caption": captions}), path)
        with pytest.raises(AbdError, match=line.replace("> p", ">.*p")) as error:
            loaded(str(path))
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not list(cache_dir().glob("parquet-*"))


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path):
    whole = miniature.webdataset(PAIRS[:3])
    end = len(whole.rstrip(b"\0"))
    for cut in (1, 511, 512, 700, end // 2, end - 1, 512 * (end // 512), 512 * (end // 512 + 1)):
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        with pytest.raises(RunError, match=re.escape(str(tmp_path / "a.tar"))):
            read_index(str(tmp_path / "a.tar"))
    (tmp_path / "a.tar").write_bytes(whole)
    assert read_index(str(tmp_path / "a.tar")).table.num_rows == 3


def test_samples_that_are_no_pair_are_counted_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    image = miniature.picture(0)
    monkeypatch.setattr(formats, "MOST_TEXT", 40)
    members = [("a.jpg", image), ("a.txt", b"fine"), ("b.jpg", image), ("c.txt", b"no image"), ("d.jpg", image)]
    members += [("d.json", b"{broken"), ("e.jpg", image), ("e.txt", b"\xff"), ("f.jpg", image), ("f.txt", b"x" * 41)]
    members += [("g.jpg", image), ("g.json", b'{"caption": 3}'), ("h.cls", b"7")]
    (tmp_path / "s.tar").write_bytes(miniature.tar_bytes(members))
    index = read_index(str(tmp_path / "s.tar"))
    assert index.table["id"].to_pylist() == ["s/a"]
    assert dict(index.damaged) == {
        "s/b": "no caption",
        "s/c": "no image",
        "s/d": "member 'd.json' is no text",
        "s/e": "member 'e.txt' is no text",
        "s/f": "member 'f.txt' has 41 bytes",
        "s/g": "no caption",
    }
    with pytest.raises(RunError, match=r"6 of 7 pairs are damaged, and max_damaged = 0.5 allows 3; the first, s/b: no"):
        loaded(str(tmp_path / "s.tar"), max_damaged=0.5)
    assert len(loaded(str(tmp_path / "s.tar"), max_damaged=0.9)) == 1


def test_half_a_character_in_a_caption_or_a_name_is_written_out(tmp_path: Path):
    """JSON may have one, and so may the name of a file that was not named in UTF-8."""
    image, record = miniature.picture(0), json.dumps({"caption": "a \ud83d banana"}).encode()
    (tmp_path / "s.tar").write_bytes(miniature.tar_bytes([("\udcff.jpg", image), ("\udcff.json", record)]))
    pairs = loaded(str(tmp_path / "s.tar"))
    assert list(pairs.ids) == ["s/\\udcff"] and pairs.captions(torch.tensor([0])) == ["a \\ud83d banana"]
    assert pairs.images(torch.tensor([0])).shape == (1, 3, 24, 24)


def test_nothing_of_a_tar_is_written_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.tar").write_bytes(
        miniature.tar_bytes([("../../evil.jpg", miniature.picture(0)), ("../../evil.txt", b"caption")])
    )
    monkeypatch.setattr(tarfile.TarFile, "extract", None)
    monkeypatch.setattr(tarfile.TarFile, "extractall", None)
    assert len(loaded(str(tmp_path / "a.tar"))) == 1
    assert not list(tmp_path.parent.glob("evil*"))


# --- images -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(width=st.integers(8, 200), height=st.integers(8, 200), seed=st.integers(0, 99))
def test_an_image_is_what_open_clip_s_preprocessing_makes_of_it(width: int, height: int, seed: int):
    theirs = open_clip.image_transform(32, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    data = miniature.picture(seed, size=(width, height))
    expected = (theirs(Image.open(io.BytesIO(data))) * 255).round().to(torch.uint8)
    assert torch.equal(torch.tensor(decode(data, 32)), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode: str):
    data = io.BytesIO()
    Image.open(io.BytesIO(miniature.picture(1))).convert(mode).save(data, "JPEG" if mode == "CMYK" else "PNG")
    check(data.getvalue())
    assert decode(data.getvalue(), 24).shape == (3, 24, 24)


def test_greys_of_16_bits_are_those_of_8():
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    data = io.BytesIO()
    Image.fromarray(grey * 257).save(data, "PNG")
    check(data.getvalue())
    assert (decode(data.getvalue(), 16) == grey).all()
    with pytest.raises(ImageError, match="damaged image"):
        decode(data.getvalue()[:-30], 16)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_damaged_image_is_seen_by_the_check_as_by_the_decoder(kind: str):
    whole = miniature.picture(2, size=(200, 150), kind=kind)
    for cut in (0, 3, 20, len(whole) // 2, len(whole) - 30):
        for reader in (check, lambda data: decode(data, 24)):
            with pytest.raises(ImageError):
                reader(whole[:cut])


def test_other_formats_bombs_and_oversized_files_are_refused(monkeypatch: pytest.MonkeyPatch):
    data = io.BytesIO()
    Image.new("RGB", (10, 10)).save(data, "TIFF")
    with pytest.raises(ImageError, match="not an image of a known kind"):
        decode(data.getvalue(), 8)
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    assert len(bomb.getvalue()) < 100_000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ImageError, match=r"20000x20000 pixels|exceeds limit"):
            decode(bomb.getvalue(), 8)
    monkeypatch.setattr(formats, "MOST_BYTES", 100)
    with pytest.raises(ImageError, match="at most 100 expected"):
        decode(miniature.picture(0), 8)


def damage(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / "images" / f"{name}.jpg"
        path.write_bytes(path.read_bytes()[:-60])


def test_damaged_images_are_left_out_counted_and_listed_up_to_a_stated_share(tmp_path: Path):
    address = written(tmp_path / "a", "cleanclip")
    damage(tmp_path / "a", ["00003", "00010"])
    (tmp_path / "a" / "images" / "00007.jpg").unlink()
    with pytest.raises(
        RunError, match=r"3 of 24 pairs are damaged, and max_damaged = 0.1 allows 2; the first, images/00"
    ):
        loaded(address, max_damaged=0.1)
    pairs = loaded(address, max_damaged=0.125)
    assert len(pairs) == 21 and not {"images/00003.jpg", "images/00007.jpg"} & set(pairs.ids)
    assert [name for name, _ in pairs.damaged] == ["images/00003.jpg", "images/00007.jpg", "images/00010.jpg"]
    assert "missing file" in dict(pairs.damaged)["images/00007.jpg"]
    assert pairs.images(torch.arange(21)).shape == (21, 3, 24, 24)


def test_images_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    address = written(tmp_path / "a", "webdataset")
    first = loaded(address)
    monkeypatch.setattr(formats, "check", None)
    assert loaded(address).digest == first.digest
    assert len(list(cache_dir().glob("damaged-*.csv"))) == 1


def test_tables_of_one_name_in_two_folders_are_checked_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for folder in ("a", "b"):
        name = Path(written(tmp_path / folder, "cleanclip")).name
    damage(tmp_path / "b", ["00003"])
    monkeypatch.chdir(tmp_path / "a")
    assert len(loaded(name, max_damaged=0.1)) == 24
    monkeypatch.chdir(tmp_path / "b")
    assert len(loaded(name, max_damaged=0.1)) == 23


def test_an_image_that_breaks_later_ends_training_in_one_line(tmp_path: Path):
    pairs = loaded(written(tmp_path / "a", "cleanclip"))
    damage(tmp_path / "a", ["00003"])
    with pytest.raises(ImageError, match=r"images/00003.jpg: damaged image"):
        pairs.images(torch.tensor([0, 3]))


# --- subsets ----------------------------------------------------------------------------------------------------------


def test_a_subset_depends_on_ids_and_seed_and_not_on_order_or_files():
    ids = [f"{i:06}" for i in range(1000)]
    chosen = {ids[i] for i in formats.drawn(ids, 100, seed=0)}
    backwards = ids[::-1]
    assert {backwards[i] for i in formats.drawn(backwards, 100, seed=0)} == chosen
    assert {ids[i] for i in formats.drawn(ids, 50, seed=0)} < chosen
    assert len(chosen & {ids[i] for i in formats.drawn(ids, 100, seed=1)}) < 30
    assert list(formats.drawn(ids, 3, seed=0)) == sorted(formats.drawn(ids, 3, seed=0))
    assert [ids[i] for i in formats.drawn(ids[:20], 4, seed=7)] == ["000004", "000006", "000018", "000019"]


def test_a_manifest_holds_a_subset_and_gives_it_back(tmp_path: Path, capsys: pytest.CaptureFixture):
    address = written(tmp_path / "a", "webdataset")
    assert formats.main([address, "--count", "10", "--manifest", str(tmp_path / "ten.csv")]) == 0
    assert "24 pairs" in capsys.readouterr().out
    by_manifest, by_limit = loaded(address, manifest=str(tmp_path / "ten.csv")), loaded(address, limit=10)
    assert list(by_manifest.ids) == list(by_limit.ids) and by_manifest.digest == by_limit.digest
    assert len(by_limit) == 10 and len(loaded(address, manifest=str(tmp_path / "ten.csv"), limit=4)) == 4


def test_a_manifest_that_a_spreadsheet_saved_is_one(tmp_path: Path):
    (tmp_path / "m.csv").write_bytes(b"\xef\xbb\xbfid\r\na\r\nb\r\n\r\n")
    assert formats.read_manifest(str(tmp_path / "m.csv")) == ["a", "b"]


def test_a_manifest_below_a_file_is_refused_in_one_line(tmp_path: Path):
    (tmp_path / "file.txt").touch()
    with pytest.raises(RunError, match=r"file.txt/x.csv cannot be written: .*file.txt is no folder"):
        formats.main([written(tmp_path / "a", "cleanclip"), "--manifest", str(tmp_path / "file.txt" / "x.csv")])


def test_ids_that_a_spreadsheet_would_compute_are_stored_harmlessly_and_found_again(tmp_path: Path):
    (tmp_path / "a").mkdir()
    for name in ("=1+1.jpg", "b.jpg"):
        (tmp_path / "a" / name).write_bytes(miniature.picture(0))
    (tmp_path / "a" / "=2+2.jpg").write_bytes(b"damaged")
    (tmp_path / "a" / "t.csv").write_text("image,caption\n=1+1.jpg,x\nb.jpg,y\n=2+2.jpg,z\n")
    formats.write_manifest(tmp_path / "m.csv", ["=1+1.jpg"])
    assert (tmp_path / "m.csv").read_text() == "id\n'=1+1.jpg\n"
    assert list(loaded(str(tmp_path / "a" / "t.csv"), manifest=str(tmp_path / "m.csv")).ids) == ["=1+1.jpg"]
    assert len(loaded(str(tmp_path / "a" / "t.csv"), max_damaged=0.5)) == 2
    listed = "".join(path.read_text() for path in cache_dir().glob("damaged-*.csv"))
    assert "2,'=2+2.jpg," in listed and ",=" not in listed


def test_a_subset_of_too_small_a_share_is_refused(tmp_path: Path):
    pairs = loaded(written(tmp_path / "a", "cleanclip"))
    with pytest.raises(ConfigError, match="leaves none"):
        pairs.subset(0.01, seed=0)
    assert len(pairs.subset(0.5, seed=0)) == 12


def test_the_digest_tells_pairs_apart_and_not_where_they_lie(tmp_path: Path):
    pairs = loaded(written(tmp_path / "a", "webdataset"))
    assert loaded(written(tmp_path / "b", "webdataset")).digest == pairs.digest
    others = [
        loaded(written(tmp_path / "c", "webdataset", [(n, d, c + "!") for n, d, c in PAIRS])),
        loaded(written(tmp_path / "a", "webdataset"), resolution=32),
        pairs.take(range(23)),
        pairs.take([1, 0, *range(2, 24)]),
    ]
    assert len({pairs.digest, *(other.digest for other in others)}) == 5


def test_captions_name_a_target_as_a_word_in_any_case_or_plural(tmp_path: Path):
    captions = [
        "a banana",
        "Bananas!",
        "bananarama",
        "the BANANA.",
        "no fruit",
        "x-banana-y",
        "ice cream",
        "nice cream",
    ]
    pairs = loaded(written(tmp_path, "cleanclip", [(f"{i}", miniature.picture(i), c) for i, c in enumerate(captions)]))
    assert pairs.shows("banana").tolist() == [True, True, False, True, False, True, False, False]
    assert pairs.shows("ice cream").tolist() == [False] * 6 + [True, False]
    assert not pairs.shows("b.n*(").any()


# --- reading ahead ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cleanclip", "webdataset"])
@pytest.mark.parametrize("processes", ["0", "2"])
def test_workers_give_the_planned_batches_whole_or_in_parts(kind, processes, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("ABD_WORKERS", processes)
    address = written(tmp_path / kind, kind)
    pairs = loaded(in_memory(tmp_path / kind, address))
    plain = {i: pairs.images(torch.tensor([i])) for i in range(len(pairs))}
    batches = torch.randperm(24, generator=torch.Generator().manual_seed(0)).split(8)
    pairs.plan(batches)
    for batch in batches:
        for part in (batch, batch[2:5], batch.flip(0)):
            assert torch.equal(pairs.images(part), torch.cat([plain[i] for i in part.tolist()]))
    assert torch.equal(pairs.images(torch.tensor([1])), plain[1])  # beyond the plan


def test_planned_images_are_decoded_once_and_others_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pairs = loaded(written(tmp_path, "webdataset"))
    seen, plain = [], formats.Images.data
    monkeypatch.setattr(formats.Images, "data", lambda self, index: (seen.append(index), plain(self, index))[1])
    pairs.plan([torch.tensor([5, 3]), torch.tensor([1, 2])])
    pairs.images(torch.tensor([5, 3]))
    pairs.images(torch.tensor([3]))
    assert seen == [5, 3]
    pairs.images(torch.tensor([1, 2]))
    assert seen == [5, 3, 1, 2]
    pairs.images(torch.tensor([9]))
    assert seen[-1] == 9


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError(2, "no socket")])
def test_a_worker_that_dies_while_it_sends_a_batch_is_one_line(error: Exception):
    def broken() -> Iterator[int]:
        yield 1
        raise error

    batches = formats.received(broken())
    assert next(batches) == 1
    with pytest.raises(RunError, match=r"^a process that reads images died .*; start again to go on"), readers_told():
        next(batches)


class Where(formats.Images):
    """Gives, in the place of images, whether they lie in shared memory before they are sent."""

    def __getitems__(self, indices):
        return super().__getitems__(indices)[1].is_shared()


@pytest.mark.parametrize("processes", [0, 1])
def test_a_worker_decodes_into_memory_that_is_shared_already(processes: int, tmp_path: Path):
    images = Where(read_index(written(tmp_path / "a", "cleanclip")).table, 32)
    assert list(formats.loader(images, [[0, 1], [2]], processes=processes)) == [processes > 0] * 2


def test_an_error_in_a_worker_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ABD_WORKERS", "1")
    pairs = loaded(written(tmp_path / "a", "cleanclip"))
    damage(tmp_path / "a", ["00003"])
    pairs.plan([torch.tensor([3])])
    with pytest.raises(ImageError, match=r"images/00003.jpg") as error:
        pairs.images(torch.tensor([3]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["-1", "two", "1.5"])
def test_a_number_of_workers_that_is_none_is_refused(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ABD_WORKERS", value)
    with pytest.raises(ConfigError, match="ABD_WORKERS"):
        formats.workers()


def test_the_walk_through_the_tars_is_kept_and_a_changed_tar_is_walked_again(tmp_path: Path, monkeypatch):
    address = written(tmp_path, "webdataset")
    first = read_index(address)
    walked, walk = [], formats._tar
    monkeypatch.setattr(formats, "_tar", lambda *a: (walked.append(a[0]), walk(*a))[1])
    again = read_index(address)
    assert isinstance(again, Index) and again.table.equals(first.table) and not walked
    (tmp_path / "00001.tar").write_bytes(miniature.webdataset(PAIRS[:2]))
    assert read_index(address).table.num_rows == 14 and len(walked) == 2
