"""Files that attack whoever reads them. Each is a real one; none of them may run, escape, hang, fill or be believed.

A `Bomb` makes a folder when it is unpickled: that folder must not be there afterwards, nor may anything else be that
the test did not put there.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import struct
import subprocess
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import miniature
import numpy as np
import open_clip
import papermill.iorw
import pytest
import torch
import yaml
from conftest import ARCHITECTURE, Bomb
from PIL import Image
from safetensors.torch import load_file, save_file

from abd_core import data, escape, grid, huggingface, launch, models, paths, plots, text, train
from abd_core.audit import image_folder, read_classes
from abd_core.config import AbdError
from abd_core.defences import DefendConfig
from abd_core.defend import defend
from abd_core.evaluate import measure
from abd_core.explore import own_image
from abd_core.formats import load_image_pairs
from abd_core.generator import Perturbation
from abd_core.labelled import read_devkit
from abd_core.notebook import given_parameters, stage_configs, summary
from abd_core.poison import PoisonConfig, poison
from abd_core.results import read_benchmarks, read_results
from abd_core.triggers import TRIGGERS, load_trigger

SHELL = "$(mkdir marker); `mkdir marker` | mkdir marker & mkdir marker\n'; mkdir marker; \"../../marker"
ANSI = "\x1b[2J\x1b]0;owned\x07\x1b[31m"
HTML = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"


@dataclass
class Den:
    """Where the hostile files lie; `marker` is what an exploit would make."""

    here: Path
    stand_in: Path
    runs: Path

    @property
    def marker(self) -> Path:
        return self.here / "marker"

    @property
    def victim(self) -> Path:
        return self.stand_in / "victim.safetensors"

    def put(self, name: str, content: bytes) -> Path:
        (self.here / name).write_bytes(content)
        return self.here / name

    def pickled(self, name: str) -> Path:
        return self.put(name, pickle.dumps(Bomb(self.marker)))

    def torch_saved(self, name: str, record: object) -> Path:
        torch.save(record, self.here / name)
        return self.here / name

    def header(self, record: object, *, length: int | None = None, tail: bytes = b"") -> Path:
        """A safetensors file with any header; `length` is what it claims."""
        text = record if isinstance(record, bytes) else json.dumps(record).encode()
        return self.put("h.safetensors", struct.pack("<Q", len(text) if length is None else length) + text + tail)


Call = Callable[[Den], object]
REFUSED: dict[str, tuple[Call, str]] = {}


def refused(name: str, words: str) -> Callable[[Call], Call]:
    """The decorated function hands a hostile file over, and is refused in one line that holds `words`."""
    assert name not in REFUSED

    def keep(call: Call) -> Call:
        REFUSED[name] = (call, words)
        return call

    return keep


def each(cases: dict[str, Call], words: str) -> None:
    for name, call in cases.items():
        refused(name, words)(call)


# --- code in the place of weights ---------------------------------------------------------------------------------

each(
    {
        "a pickle as a victim": lambda d: measure(d.pickled("m.safetensors")),
        "a suspect with code": lambda d: defend(DefendConfig(defence="clean"), d.pickled("m.safetensors")),
        "clean weights with code": lambda d: defend(
            DefendConfig(defence="wise-ft"), d.victim, clean=d.torch_saved("clean.safetensors", {"w": Bomb(d.marker)})
        ),
        "an array of objects as a victim": lambda d: measure(object_array(d)),
    },
    "not safetensors",
)
each(
    {
        "a pickle as a trigger": lambda d: measure(d.victim, trigger=d.pickled("t.safetensors")),
        "an array of objects as a trigger": lambda d: load_trigger(object_array(d)),
    },
    "no trigger record",
)
each({"a pickle as a perturbation": lambda d: Perturbation.load(d.pickled("p.safetensors"))}, "no perturbation record")
each(
    {
        "a resume file with code": lambda d: train.load_resume(d.torch_saved("resume.pt", {"model": Bomb(d.marker)})),
        "a resume file that is a pickle": lambda d: train.load_resume(d.pickled("resume.pt")),
        "a resume file that unpacks to gigabytes": lambda d: train.load_resume(zip_bomb(d)),
    },
    "delete its folder, or pass force=True",
)


each(
    {"a checkpoint of torch with code as a victim": lambda d: measure(d.torch_saved("m.pt", Bomb(d.marker)))},
    "one that holds more than weights",
)


def object_array(den: Den) -> Path:
    np.save(den.here / "a.npy", np.array([Bomb(den.marker)], dtype=object), allow_pickle=True)
    return den.here / "a.npy"


@refused("a suspect that unpacks to a thousand times its size", "damaged file")
def _(den: Den) -> None:
    torch.save({"w": torch.zeros(1 << 24)}, den.here / "whole.pt")
    with zipfile.ZipFile(den.here / "whole.pt") as whole, zipfile.ZipFile(den.here / "m.pt", "w") as packed:
        for part in whole.infolist():
            packed.writestr(part.filename, whole.read(part), zipfile.ZIP_DEFLATED)
    models.load(den.here / "m.pt")


def zip_bomb(den: Den) -> Path:
    with zipfile.ZipFile(den.here / "resume.pt", "w", zipfile.ZIP_DEFLATED) as parts:
        parts.writestr("archive/data.pkl", pickle.dumps({}))
        parts.writestr("archive/data/0", bytes(64 << 20))
    return den.here / "resume.pt"


# --- headers that lie -------------------------------------------------------------------------------------------

TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
each(
    {
        "a header of 2^63 bytes": lambda d: measure(d.header({}, length=1 << 63)),
        "a header longer than its file": lambda d: measure(d.header({}, length=1 << 20)),
        "a header of 101 MB": lambda d: measure(d.header(b'{"a":"' + bytes([97]) * 101_000_000 + b'"}')),
        "a header 100,000 levels deep": lambda d: measure(d.header(b"[" * 100_000)),
        "a header that is no UTF-8": lambda d: measure(d.header(b'{"\xff": 1}')),
        "offsets outside of the file": lambda d: measure(d.header({"w": {**TENSOR, "data_offsets": [0, 1 << 40]}})),
        "a shape whose size overflows": lambda d: measure(d.header({"w": {**TENSOR, "shape": [1 << 40] * 2}})),
        "tensors that overlap": lambda d: measure(d.header({"a": TENSOR, "b": TENSOR}, tail=bytes(4))),
        "a shape that does not fit its bytes": lambda d: measure(
            d.header({"w": {**TENSOR, "shape": [9]}}, tail=bytes(4))
        ),
        "a negative size": lambda d: measure(d.header({"w": {**TENSOR, "shape": [-1]}}, tail=bytes(4))),
    },
    "not safetensors",
)


def renamed(den: Den, name: str) -> Path:
    save_file(load_file(den.victim), den.here / "m.safetensors", metadata={"model": name})
    return den.here / "m.safetensors"


each(
    {
        "a model's name that is a path": lambda d: measure(renamed(d, "../../../../etc/passwd")),
        "a model's name that is a hub's address": lambda d: measure(renamed(d, "hf-hub:someone/anything")),
        "a model's name that is a local folder": lambda d: measure(renamed(d, "local-dir:/tmp")),
        "a model's name that is a command": lambda d: measure(renamed(d, SHELL)),
        "a model's name that paints the terminal": lambda d: measure(renamed(d, ANSI)),
    },
    "which open_clip does not know",
)


@refused("a tensor's name that paints the terminal", r"tensor \x1b[2J")
def _(den: Den) -> None:
    tensors = {f"{ANSI}{key}": tensor for key, tensor in load_file(den.victim).items()}
    save_file(tensors, den.here / "m.safetensors", metadata={"model": ARCHITECTURE})
    measure(den.here / "m.safetensors")


def recorded(den: Den, record: str) -> Path:
    save_file({"pattern": torch.ones(3, 4, 4)}, den.here / "t.safetensors", metadata={"record": record})
    return den.here / "t.safetensors"


each(
    {
        "a trigger's record 100,000 levels deep": lambda d: load_trigger(recorded(d, "[" * 100_000)),
        "a trigger's record with a number of 5,000 digits": lambda d: load_trigger(recorded(d, "1" * 5_000)),
        "a trigger's record that is no record": lambda d: load_trigger(recorded(d, '{"attack": ["badnet"]}')),
    },
    "no trigger record",
)


@refused("a trigger whose attack is an attribute", "unknown attack '__init__'")
def _(den: Den) -> None:
    load_trigger(recorded(den, '{"attack": "__init__"}'))


@refused("a trigger whose target paints the terminal", r"\x1b[2J\x1b]0;owned\x07")
def _(den: Den) -> None:
    TRIGGERS["badnet"].draw(resolution=64, target=f"{ANSI}{HTML}", seed=0, size=0.1).save(den.here / "t.safetensors")
    measure(den.victim, trigger=den.here / "t.safetensors")


# --- archives and images --------------------------------------------------------------------------------------


def hostile_tar(den: Den, kind: str) -> Path:
    """In the place of the shipped WordNet, with a checksum to match: its unpacking itself is under test."""
    member, content = tarfile.TarInfo("wordnet/index.noun"), b"owned"
    if kind == "traversal":
        member.name = "../../marker"
    elif kind == "absolute":
        member.name = str(den.marker)
    elif kind == "link":
        member.type, member.linkname, content = tarfile.SYMTYPE, "/etc/passwd", b""
    elif kind == "hard link":
        member.type, member.linkname, content = tarfile.LNKTYPE, "../../../etc/passwd", b""
    elif kind == "device":
        member.type, member.devmajor, member.devminor, content = tarfile.CHRTYPE, 1, 3, b""
    member.size = len(content)
    with tarfile.open(den.here / "wordnet.tar.xz", "w:xz") as tar:
        tar.addfile(member, io.BytesIO(content))
    return den.here


@pytest.mark.parametrize("kind", ["traversal", "absolute", "link", "hard link", "device"])
@pytest.mark.parametrize("believed", [False, True], ids=["by its checksum", "by its members"])
def test_an_archive_that_reaches_out_of_its_folder_is_refused(
    kind: str, believed: bool, den: Den, monkeypatch: pytest.MonkeyPatch
):
    folder, cache = hostile_tar(den, kind), den.here / "cache"
    monkeypatch.setattr(paths, "data_dir", lambda: folder)
    if believed:
        monkeypatch.setattr(text, "_WORDNET_SHA256", paths.sha256(folder / "wordnet.tar.xz"))
        if kind == "absolute":  # unpacked as a relative name, inside: nothing is refused, and nothing escapes
            with pytest.raises(OSError):
                text.unpack_wordnet(cache=cache)
        else:
            with pytest.raises(tarfile.FilterError):
                text.unpack_wordnet(cache=cache)
    else:
        with pytest.raises(AbdError, match=r"damaged file: .*wordnet\.tar\.xz: SHA-256 is"):
            text.unpack_wordnet(cache=cache)
    assert not den.marker.exists()
    assert not cache.exists() or list(cache.iterdir()) == []


def png(side: int) -> bytes:
    """A valid PNG file of side x side grey pixels: 40,000 px take 190 KB, and 1.6 GB as RGB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def pairs(path: Path, resolution: int = 64) -> object:
    return load_image_pairs(str(path), resolution=resolution)


def shard(den: Den, change: Callable[[tarfile.TarInfo], object], content: bytes = b"x") -> Path:
    """A tar of a good pair and a member `y.jpg` whose head has a change."""
    with tarfile.open(den.here / "p.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        miniature.add(tar, "x.jpg", miniature.picture(0))
        miniature.add(tar, "x.txt", b"caption")
        member = tarfile.TarInfo("y.jpg")
        member.size = len(content)
        change(member)
        # Not by `addfile`, which refuses such a head from Python 3.13 on.
        blocks = member.tobuf(tar.format, tar.encoding, tar.errors) + content + bytes(-len(content) % tarfile.BLOCKSIZE)
        tar.fileobj.write(blocks)
        tar.offset += len(blocks)
    return den.here / "p.tar"


def of_type(kind: bytes) -> Callable[[tarfile.TarInfo], None]:
    def change(member: tarfile.TarInfo) -> None:
        member.type, member.linkname, member.size = kind, "/etc/passwd", 0

    return change


def sized(size: int, kind: bytes = tarfile.REGTYPE) -> Callable[[tarfile.TarInfo], None]:
    def change(member: tarfile.TarInfo) -> None:
        member.type, member.size = kind, size

    return change


each(
    {
        f"a shard of pairs with a {what}": lambda d, kind=kind: pairs(shard(d, of_type(kind), b""))
        for what, kind in {
            "link": tarfile.SYMTYPE,
            "hard link": tarfile.LNKTYPE,
            "device": tarfile.CHRTYPE,
            "block device": tarfile.BLKTYPE,
            "pipe": tarfile.FIFOTYPE,
        }.items()
    },
    "member 'y.jpg' is no plain file",
)
each(
    {"a shard whose members lead back in a circle": lambda d: pairs(shard(d, sized(-2048)))},
    "member 'y.jpg' has -2048 bytes",
)
each(
    {
        "a shard with a member of a terabyte": lambda d: pairs(shard(d, sized(1 << 40))),
        "a shard with a name of a terabyte": lambda d: pairs(shard(d, sized(1 << 40, tarfile.GNUTYPE_LONGNAME))),
        "a shard with a record of a terabyte": lambda d: pairs(shard(d, sized(1 << 40, tarfile.XHDTYPE))),
    },
    "damaged file: ",
)


def pictured(den: Den, image: Path | str) -> object:
    """A table whose one pair has this image."""
    return pairs(den.put("t.csv", f"image,caption\n{image},x\n".encode()))


def postscript(den: Den, name: str) -> Path:
    """What PIL hands to Ghostscript, an interpreter with access to files, whatever the name's ending."""
    head = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    return den.put(name, head + f"({den.marker}) (w) file closefile showpage\n".encode())


def sparse(den: Den, size: int) -> Path:
    """A file of any size that takes no room."""
    with (den.here / "big.jpg").open("wb") as f:
        f.truncate(size)
    return den.here / "big.jpg"


def folder_of(den: Den, make: Callable[[str], Path]) -> Path:
    for number in range(16):
        make(f"{number}.png")
    return den.here


def strip(long: int) -> bytes:
    """A PNG one pixel wide: a model's size across, it would be as many gigabytes."""
    held = io.BytesIO()
    Image.new("1", (1, long)).save(held, "PNG")
    return held.getvalue()


each(
    {
        "PostScript as an image of a pair": lambda d: pictured(d, postscript(d, "e.png")),
        "PostScript as a picture of one's own": lambda d: own_image(postscript(d, "e.png"), 64),
        "PostScript among an audit's images": lambda d: image_folder(folder_of(d, lambda n: postscript(d, n)), 16, 64),
        "a bomb as a picture of one's own": lambda d: own_image(png(40_000), 64),
    },
    "not an image of a known kind",
)
each({"a bomb as an image of a pair": lambda d: pictured(d, d.put("b.png", png(40_000)))}, "1 of 1 pairs are damaged")
each(
    {
        "a picture a million times as long as wide": lambda d: pictured(d, d.put("s.png", strip(1_000_000))),
        "a picture of one's own of that kind": lambda d: own_image(strip(1_000_000), 64),
    },
    "an image of 1x1000000 pixels: sides of 1 to 500 expected",
)
each({"an image of a terabyte": lambda d: pictured(d, sparse(d, 1 << 40))}, "an image of more than 67108864 bytes")
each({"a picture of one's own of a terabyte": lambda d: own_image(sparse(d, 1 << 40), 64)}, f"image of {1 << 40} bytes")
each(
    {
        "an image that is an endless device": lambda d: pictured(d, "/dev/zero"),
        "an audit's class names from an endless device": lambda d: read_classes(Path("/dev/zero")),
        "parameters from an endless device": lambda d: given_parameters([Path("/dev/zero")], []),
        "a shard of a Hugging Face model that is a pipe": lambda d: models.load(hugging(d, None)),
    },
    "a device or a pipe: a regular file expected",
)


def hugging(den: Den, tensors: dict | None, part: str = "pytorch_model-1.bin") -> Path:
    """The folder of a `CLIPModel`; without tensors its shard is a pipe, from which nothing ever comes."""
    config = huggingface.describe(open_clip.get_model_config("ViT-B-32-quickgelu"))
    den.put("config.json", json.dumps(config).encode())
    den.put("pytorch_model.bin.index.json", json.dumps({"weight_map": {"logit_scale": f"../../{part}"}}).encode())
    if tensors is None:
        os.mkfifo(den.here / part)
    else:
        torch.save(tensors, den.here / part)
    return den.here


ATTENTION = "text_model.encoder.layers.0.self_attn."
CLAIMED = torch.ones(1).expand(1 << 20, 1 << 20)  # four bytes that claim to be four terabytes
each(
    {
        "weights of four bytes that claim terabytes": lambda d: models.load(d.torch_saved("m.pt", {"w": CLAIMED})),
        "a CLIPModel's weights that claim terabytes": lambda d: models.load(
            hugging(d, {f"{ATTENTION}{part}_proj.weight": CLAIMED for part in "qkv"})
        ),
        "a sparse tensor of a terabyte": lambda d: models.load(
            d.torch_saved("m.pt", {"w": torch.sparse_coo_tensor([[0]], [1.0], (1 << 40,))})
        ),
    },
    "is sparse, quantised, or larger than what is stored of it",
)
each(
    {
        "weights under an empty name": lambda d: models.load(d.torch_saved("m.pt", {"": "x", "w": torch.ones(1)})),
        "a CLIPModel's weights that are text": lambda d: models.load(hugging(d, {"text_projection.weight": "x"})),
    },
    "is a str: weights alone are expected",
)
each({"a CLIPModel's weights that are a list": lambda d: models.load(hugging(d, [1]))}, "holds no weights")  # type: ignore[arg-type]


@refused("a CLIPModel whose query does not go with its key", "differ in shape")
def _(den: Den) -> None:
    shapes = {"q": (4, 3), "k": (4, 2), "v": (4, 3)}
    models.load(hugging(den, {f"{ATTENTION}{part}_proj.weight": torch.ones(shape) for part, shape in shapes.items()}))


def script_archive(den: Den, pickled: bytes, storage: bytes = b"", packing: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(den.here / "m.pt", "w", packing) as archive:
        for name, content in {"constants.pkl": b"", "data.pkl": pickled, "data/0": storage}.items():
            archive.writestr(f"m/{name}", content)
    return den.here / "m.pt"


@refused("a TorchScript archive that unpacks to a thousand times its size", "unpacks to more than it has")
def _(den: Den) -> None:
    models.load(script_archive(den, b"\x80\x02N.", bytes(64 << 20), zipfile.ZIP_DEFLATED))


@refused("a TorchScript archive of 2^100 modules", "holds no weights")
def _(den: Den) -> None:
    made = b"c__torch__\nM\n)\x81}"  # GLOBAL, no arguments, NEWOBJ, its attributes
    level = [made + b"bq\x00"]
    level += [made + b"(X\x01\0\0\0ah%cX\x01\0\0\0bh%cubq%c" % (i - 1, i - 1, i) for i in range(1, 100)]
    models.load(script_archive(den, b"\x80\x02" + b"0".join(level) + b"."))


@refused("a devkit that unpacks to gigabytes", "it unpacks to more than 67108864 bytes")
def _(den: Den) -> None:
    read_devkit(str(den.put("kit.tar.gz", gzip.compress(bytes(80 << 20), compresslevel=1))))


@refused("a devkit with a link", "is no plain file")
def _(den: Den) -> None:
    read_devkit(str(den.put("kit.tar.gz", gzip.compress(shard(den, of_type(tarfile.SYMTYPE), b"").read_bytes()))))


@refused("a job that names a file to write to", "unknown argument of poison 'errors'")
def _(den: Den) -> None:
    job = {"stage": "poison", "config": {"rate": "x"}, "errors": str(den.marker)}
    launch.work(den.put("job.json", json.dumps(job).encode()))


@pytest.mark.parametrize("content", [png(40_000), b"<svg onload=alert(1)>", png(64)[:45]], ids=["bomb", "SVG", "half"])
def test_an_image_that_is_a_bomb_or_no_image_is_refused(
    content: bytes, den: Den, fresh_data: None, monkeypatch: pytest.MonkeyPatch
):
    (den.here / "sheets").mkdir()
    path = den.put("sheets/noto.webp", content)
    monkeypatch.setattr(data, "data_dir", lambda: den.here)
    monkeypatch.setattr(data, "checksums", lambda: {"sheets/noto.webp": paths.sha256(path)})
    with pytest.raises(AbdError, match=r"damaged file: data/sheets/noto\.webp: not an image") as error:
        data.artwork("noto")
    assert len(str(error.value).splitlines()) == 1


def test_the_png_of_these_tests_is_a_real_one():
    with Image.open(io.BytesIO(png(64))) as image:
        assert image.convert("RGB").size == (64, 64)


# --- tables ---------------------------------------------------------------------------------------------------

HEADER = "attack,defence,seed,split,metric,value,n,ci_low,ci_high,paper_value,seconds,device,versions,git_sha,run_id"


def table(den: Den, attack: str, device: str = "") -> Path:
    quoted = ['"' + part.replace('"', '""') + '"' for part in (attack, device)]
    row = f"{quoted[0]},ABD,0,eval,asr,0.5,10,0.4,0.6,,,{quoted[1]},,,abc"
    return den.put("grid.csv", f"{HEADER}\n{row}\n".encode())


each(
    {
        "a table with a field of 10 MB": lambda d: read_results(table(d, "a" * 10_000_000)),
        "a table with NUL bytes": lambda d: read_results(d.put("r.csv", b"a,b\n\0\0,1\n")),
        "a table that is a pickle": lambda d: read_results(d.pickled("r.csv")),
    },
    "r",
)
each({"benchmarks that are a pickle": lambda d: read_benchmarks(d.pickled("b.csv"))}, "b.csv")


@pytest.mark.parametrize("label", ["=cmd|' /C calc'!A0", "@SUM(1+1)", "+HYPERLINK(1)", "-2+3+cmd"])
def test_a_formula_in_a_table_is_no_formula_when_the_table_is_written_again(label: str, den: Den):
    path = table(den, label, device=label)
    grid.write_table(path, {})
    rows = grid.read_table(path)
    assert [(row["attack"], row["device"]) for row in rows] == [(f"'{label}", f"'{label}")]


@pytest.mark.parametrize("label", [HTML, ANSI, "$\\frac{$", "[x](javascript:alert(1))"])
def test_a_label_of_a_foreign_table_is_text_in_tables_and_sentences(label: str, den: Den):
    results = read_results(table(den, label))
    html = plots.table(results, [label], ["ABD"], ["asr"])._repr_html_()
    assert "<script" not in html and "<img" not in html
    for shown in (escape.markdown(label), escape.terminal(label), escape.markup(label)):
        assert "\x1b" not in shown
    assert "<" not in escape.markdown(label) and not re.search(r"[^\\]\]\(", escape.markdown(label))


# --- run folders ----------------------------------------------------------------------------------------------

PRECIOUS = b"irreplaceable"


@refused("a run folder that is a link", "is a link: run folders are folders")
def _(den: Den) -> None:
    folder = measure(den.victim).folder
    elsewhere = den.here / "elsewhere"
    folder.rename(elsewhere)
    (elsewhere / "thesis.txt").write_bytes(PRECIOUS)
    folder.symlink_to(elsewhere)
    try:
        measure(den.victim, force=True)
    finally:
        assert (elsewhere / "thesis.txt").read_bytes() == PRECIOUS


@refused("a lock that is a link", "cannot be opened")
def _(den: Den) -> None:
    run = measure(den.victim)
    run.file(".lock").unlink()
    run.file(".lock").symlink_to(den.put("thesis.txt", PRECIOUS))
    try:
        measure(den.victim)
    finally:
        assert (den.here / "thesis.txt").read_bytes() == PRECIOUS


@refused("a record that is a pipe", "a regular file expected")
def _(den: Den) -> None:
    run = measure(den.victim)
    run.file("manifest.json").unlink()
    os.mkfifo(run.file("manifest.json"))
    measure(den.victim)


@refused("a file of a run that is a link out of its folder", "is no file of this folder")
def _(den: Den) -> None:
    run = measure(den.victim)
    run.file("extra").symlink_to("/etc/passwd")
    paths.write_json(run.file("manifest.json"), {"extra": paths.sha256(Path("/etc/passwd"))})
    measure(den.victim)


@refused("a list of files that goes out through a linked folder", "is no file of this folder")
def _(den: Den) -> None:
    run = measure(den.victim)
    run.file("sub").symlink_to("/etc")
    paths.write_json(run.file("manifest.json"), {"sub/passwd": paths.sha256(Path("/etc/passwd"))})
    measure(den.victim)


@refused("a list of files with a name of 5,000 characters", "missing file: ")
def _(den: Den) -> None:
    run = measure(den.victim)
    paths.write_json(run.file("manifest.json"), {"a/" * 2_500: "0"})
    measure(den.victim)


@refused("a list of files that climbs out", "'../../../etc/passwd' is no file of this folder")
def _(den: Den) -> None:
    run = measure(den.victim)
    paths.write_json(run.file("manifest.json"), {"../../../etc/passwd": "0"})
    measure(den.victim)


@refused("a victim that is an endless device", "a regular file expected")
def _(den: Den) -> None:
    (den.here / "m.safetensors").symlink_to("/dev/zero")
    measure(den.here / "m.safetensors")


def test_a_link_planted_under_the_name_of_a_temporary_file_is_not_written_through(
    den: Den, monkeypatch: pytest.MonkeyPatch
):
    target = den.here / "record.json"
    monkeypatch.setattr(paths.secrets, "token_hex", lambda size: "guessed")
    target.with_name(".record.json.guessed.tmp").symlink_to(den.put("thesis.txt", PRECIOUS))
    paths.write_json(target, {"a": 1})
    assert (den.here / "thesis.txt").read_bytes() == PRECIOUS
    assert paths.read_json(target) == {"a": 1} and not target.is_symlink()


def test_a_link_within_a_run_folder_that_is_made_anew_loses_itself_and_not_its_target(den: Den):
    run = measure(den.victim)
    elsewhere = den.here / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.txt").write_bytes(PRECIOUS)
    run.file("sub").symlink_to(elsewhere)
    again = measure(den.victim, force=True)
    assert not again.file("sub").exists() and (elsewhere / "thesis.txt").read_bytes() == PRECIOUS


# --- parameters, names and notebooks ----------------------------------------------------------------------------


@refused("a target that is a command", "unknown class '$(mkdir marker)")
def _(den: Den) -> None:
    poison(PoisonConfig(target=SHELL))


@refused("a parameter that is a command", "unknown parameter")
def _(den: Den) -> None:
    stage_configs({SHELL: 1}, poison=PoisonConfig)


@refused("an architecture that is a path", "unknown model '../../marker'")
def _(den: Den) -> None:
    models.build("../../marker")


@pytest.mark.parametrize("name", ["$(mkdir marker)", "a; mkdir marker", "-rf", "a b'\"", "\x1b[2J", "<b>"])
def test_a_folder_for_runs_may_have_any_name_and_nothing_in_it_is_executed(
    name: str, den: Den, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(den.here)
    monkeypatch.setenv("ABD_RUNS", str(den.here / name))
    run = measure(den.victim)
    assert run.folder.is_relative_to(den.here / name) and not den.marker.exists()
    with pytest.raises(AbdError) as error:
        paths.read_json(run.file("none.json"))
    assert "\x1b" not in str(error.value) + paths.shown(run.folder) + "".join(capfd.readouterr())


def test_a_notebook_s_name_is_made_of_harmless_characters_whatever_the_label(den: Den, monkeypatch: pytest.MonkeyPatch):
    made: list[Path] = []
    monkeypatch.setattr(grid.papermill, "inspect_notebook", lambda path: {})
    monkeypatch.setattr(grid.papermill, "execute_notebook", lambda source, target, *a, **k: made.append(target))
    grid.Job("poison", PoisonConfig()).execute(f"../../{SHELL}{ANSI}")
    assert made[0].parent == grid.folder() and set(made[0].name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-_")


def test_a_file_of_parameters_with_a_tag_of_yaml_runs_nothing(den: Den):
    path = den.put("p.yaml", f"seed: !!python/object/apply:os.mkdir ['{den.marker}']\n".encode())
    with pytest.raises(yaml.YAMLError):
        papermill.iorw.read_yaml_file(str(path))
    assert not den.marker.exists()
    yaml.unsafe_load(path.read_bytes())  # the file would go off
    assert den.marker.exists()


def test_the_summary_of_a_foreign_notebook_does_not_paint_the_terminal(den: Den):
    output = {"name": "stdout", "text": [f"CA {ANSI}99.9\n", "ASR\r0.0\n"]}
    cell = {"metadata": {"tags": ["summary"]}, "outputs": [output]}
    shown = summary(den.put("n.ipynb", json.dumps({"cells": [cell]}).encode()))
    assert "\x1b" not in shown and "\x07" not in shown and shown.startswith(r"CA \x1b[2J")


# --- the tests --------------------------------------------------------------------------------------------------


@pytest.fixture
def den(stand_in: Path, runs: Path, tmp_path: Path) -> Den:
    (tmp_path / "den").mkdir()
    return Den(tmp_path / "den", stand_in, runs)


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_file_is_refused_in_one_harmless_line(name: str, den: Den, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(den.here)
    monkeypatch.setenv("ABD_WORKERS", "0")
    call, words = REFUSED[name]
    with pytest.raises(AbdError) as error:
        call(den)
    line = str(error.value)
    assert words in line and len(line.splitlines()) == 1 and "\x1b" not in line and len(line) <= escape.LONGEST
    assert not den.marker.exists() and not Path("marker").exists()


def test_a_pickle_that_says_it_has_millions_of_objects_gets_no_room_for_them(den: Den):
    pickled = b"\x80\x02Nr\xff\xff\xff\x00."  # LONG_BINPUT: keep it as object 16,777,215
    tracemalloc.start()
    try:
        with pytest.raises(AbdError, match="no TorchScript archive of weights"):
            models.load(script_archive(den, pickled))
        ours = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        assert pickle.loads(pickled) is None
        theirs = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ours < 1 << 20 < 100 << 20 < theirs


def test_the_bomb_would_go_off(den: Den):
    torch.load(den.torch_saved("m.pt", Bomb(den.marker)), weights_only=False)
    assert den.marker.exists()


def test_there_are_at_least_25_hostile_files():
    assert len(REFUSED) >= 25


def test_nothing_in_the_package_unpickles_or_calls_a_shell():
    """What would run code that a file holds: `weights_only=False`, pickle, numpy's objects, eval, a shell."""
    words = ("weights_only=False", "pickle.load", "allow_pickle=True", "shell=True", "os.system", "yaml.load(")
    found = subprocess.run(
        ["grep", "-rnF", *(part for word in words for part in ("-e", word)), "--include=*.py", "abd_core"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 1, found.stdout
