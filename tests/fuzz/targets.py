"""What is fuzzed: for each target, any input that can be made of bytes, text or numbers, and what must hold of it.

A target either does what it promises or refuses in one line (`AbdError`); anything else that it raises is a crash.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import json
import math
import pickle
import struct
import sys
import tarfile
import tempfile
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:0] = [path for path in (str(CHECKOUT), str(CHECKOUT / "tests")) if path not in sys.path]
from conftest import concrete_configs

from abd_core import checkpoints, escape, formats, paths, results, train
from abd_core.config import AbdError, Config
from abd_core.generator import Perturbation
from abd_core.text import augment, tokenize
from abd_core.triggers import POSITIONS, TRIGGERS, load_trigger


@dataclass(frozen=True)
class Target:
    """`check` takes one example of `strategy`."""

    strategy: st.SearchStrategy[Any]
    check: Callable[[Any], None]


@contextlib.contextmanager
def one_line_or_nothing() -> Any:
    """An AbdError is an answer, where its text is one printable line."""
    try:
        yield
    except AbdError as error:
        assert len(str(error).splitlines()) == 1 and "\x1b" not in str(error), repr(str(error))


@functools.cache
def _scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="abd-fuzz-"))


def as_file(read: Callable[[Path], object], name: str) -> Callable[[bytes], None]:
    """A check that writes its example to a file and has it read."""

    def check(content: bytes) -> None:
        path = _scratch() / name
        path.write_bytes(content)
        with one_line_or_nothing():
            read(path)

    return check


# --- text -------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(), max_size=300) | st.lists(st.text(max_size=12), max_size=60).map(" ".join)


def captions(example: list[str]) -> None:
    made = augment(example, seed=0, epoch=1, ids=range(len(example)))
    assert made == augment(example, seed=0, epoch=1, ids=range(len(example)))
    assert [bool(text.split()) for text in made] == [bool(text.split()) for text in example]
    tokens = tokenize(made, context_length=20)
    assert tokens.shape == (len(example), 20) and bool((tokens < 49_408).all())
    for text in example:
        shown = escape.terminal(text)
        assert len(shown.splitlines()) <= 1
        assert escape.cell(escape.cell(text)) == escape.cell(text)


# --- tables -------------------------------------------------------------------------------------------------------

RESULT = ",".join(results.COLUMNS).encode()
ROWS = [b"BadNet,ABD,0,eval,asr,0.5,10,0.4,0.6,,,,,,abc", b"BadNet,none,1,dev,ca_top1,1,1,0,1,0.9,2,cpu,,,d"]
PAIRS = [b"image,caption", b"a.png,a banana", b"b.png,", b'"c.png","two\nlines"']
MANIFEST = [b"id", b"000000001", b"cc3m/1", b'"a,b"']


@st.composite
def damaged(draw: st.DrawFn, wholes: list[bytes]) -> bytes:
    """A whole file with bytes changed, inserted and cut out, or any bytes."""
    content = bytearray(draw(st.sampled_from(wholes)))
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 40)))
        content[start:end] = draw(st.binary(max_size=12))
    return bytes(content)


def lines(header: bytes, rows: list[bytes]) -> st.SearchStrategy[bytes]:
    whole = [b"\n".join([header, *rows, b""]), header + b"\n", b"\xef\xbb\xbf" + header + b"\n" + rows[0]]
    mixed = st.lists(st.sampled_from(rows) | st.binary(max_size=30), max_size=6).map(lambda r: b"\n".join([header, *r]))
    return damaged(whole) | mixed | st.binary(max_size=200)


def read_pairs(path: Path) -> None:
    formats.read_index(str(path))


# --- binary files -----------------------------------------------------------------------------------------------


def _trigger() -> bytes:
    record = {"attack": "badnet", "resolution": 8, "target": "banana"}
    record["specification"] = {"size": 0.5, "position": "centre", "seed": 0}
    return save({"pattern": torch.zeros(3, 4, 4)}, metadata={"record": json.dumps(record)})


def _perturbation() -> bytes:
    record = {"mode": "patch", "resolution": 8, "placement": "fixed", "corner": [0, 0]}
    return save({"delta": torch.zeros(3, 4, 4)}, metadata={"record": json.dumps(record)})


def _resume() -> bytes:
    content = io.BytesIO()
    torch.save({"step": 3, "model": {"w": torch.arange(8.0)}}, content)
    return content.getvalue()


class _Storage:
    """Stands for a tensor's storage, which an archive keeps beside its pickle."""


class _Tensor:
    def __reduce__(self) -> tuple:
        return torch._utils._rebuild_tensor_v2, (_Storage(), 0, (2,), (1,), False, collections.OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> tuple | None:
        return ("storage", torch.FloatStorage, "0", "cpu", 2) if isinstance(obj, _Storage) else None


def _script() -> bytes:
    """The pickle of a TorchScript archive: a module with a tensor and a module that has another."""
    module = type("M", (), {"__module__": "__torch__"})
    sys.modules["__torch__"] = types.ModuleType("__torch__")
    sys.modules["__torch__"].M = module  # type: ignore[attr-defined]
    outer, inner, content = module(), module(), io.BytesIO()
    outer.weight, inner.weight, outer.inner = _Tensor(), _Tensor(), inner
    _Pickler(content, protocol=2).dump(outer)
    del sys.modules["__torch__"]
    return content.getvalue()


def archived(pickled: bytes) -> bytes:
    """A TorchScript archive with this pickle; its checksums are right, so that what reads it gets that far."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, part in {"constants.pkl": b"", "data.pkl": pickled, "data/0": bytes(8)}.items():
            archive.writestr(f"m/{name}", part)
    return content.getvalue()


def _image(kind: str) -> bytes:
    content = io.BytesIO()
    Image.linear_gradient("L").resize((24, 20)).convert("RGB").save(content, kind)
    return content.getvalue()


def _tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, member in (("0.jpg", _image("JPEG")), ("0.txt", b"a banana")):
            info = tarfile.TarInfo(name)
            info.size = len(member)
            tar.addfile(info, io.BytesIO(member))
    return content.getvalue()


def safetensors() -> st.SearchStrategy[bytes]:
    headers = st.recursive(
        st.none() | st.integers() | st.text(max_size=8) | st.sampled_from(["F32", "I64", [0, 4], [1]]),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=12,
    )
    made = st.tuples(headers, st.integers(-3, 3), st.binary(max_size=16))

    def file(parts: tuple[Any, int, bytes]) -> bytes:
        text = json.dumps(parts[0]).encode()
        return struct.pack("<Q", max(0, len(text) + parts[1])) + text + parts[2]

    return made.map(file) | damaged([_trigger(), _perturbation()])


def decode(content: bytes) -> None:
    with one_line_or_nothing():
        assert formats.decode(content, 16).shape in ((16, 16, 3), (3, 16, 16))


# --- geometry and settings ----------------------------------------------------------------------------------------

GEOMETRY = st.fixed_dictionaries(
    {
        "attack": st.sampled_from(sorted(TRIGGERS)),
        "resolution": st.integers(1, 96),
        "seed": st.integers(0, 9),
        "size": st.floats(0.001, 1),
        "position": st.sampled_from(["own", *POSITIONS]),
        "points": st.integers(0, 100),
    }
)


def geometry(example: dict[str, Any]) -> None:
    settings = {name: value for name, value in example.items() if name != "attack"}
    trigger = TRIGGERS[example["attack"]].draw(target="banana", **settings)
    side = example["resolution"]
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    triggered = trigger(images)
    assert triggered.shape == images.shape and triggered.min() >= 0 and triggered.max() <= 1
    assert torch.equal(triggered, trigger(images))
    trigger.save(_scratch() / "t.safetensors")
    assert torch.equal(load_trigger(_scratch() / "t.safetensors")(images), triggered)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.lists(st.integers(), max_size=2)
)


@st.composite
def settings_of(draw: st.DrawFn) -> tuple[type[Config], dict[str, Any]]:
    kind = draw(st.sampled_from(concrete_configs()))
    return kind, draw(st.dictionaries(st.sampled_from(kind.names()), VALUES, max_size=5))


def configs(example: tuple[type[Config], dict[str, Any]]) -> None:
    kind, given = example
    with one_line_or_nothing():
        made = kind.from_parameters(given)
        again = kind.from_parameters(json.loads(json.dumps(made.to_dict())))
        assert again == made
        numbers = [value for value in made.to_dict().values() if isinstance(value, float)]
        assert all(math.isfinite(number) for number in numbers)


TARGETS: dict[str, Target] = {
    "captions: EDA, tokens, escaping": Target(st.lists(TEXT, max_size=4), captions),
    "settings: round trip": Target(settings_of(), configs),
    "triggers: geometry at any size": Target(GEOMETRY, geometry),
    "results table": Target(lines(RESULT, ROWS), as_file(results.read_results, "r.csv")),
    "pairs table": Target(lines(PAIRS[0], PAIRS[1:]), as_file(read_pairs, "p.csv")),
    "manifest": Target(lines(MANIFEST[0], MANIFEST[1:]), as_file(lambda p: formats.read_manifest(str(p)), "m.csv")),
    "tar": Target(damaged([_tar()]), as_file(read_pairs, "p.tar")),
    "image": Target(damaged([_image("JPEG"), _image("PNG"), _image("WEBP")]) | st.binary(max_size=99), decode),
    "weights": Target(safetensors(), as_file(checkpoints.read, "w.safetensors")),
    "PyTorch weights": Target(
        damaged([_resume()]) | damaged([_script()]).map(archived), as_file(checkpoints.read, "w.pt")
    ),
    "trigger file": Target(safetensors(), as_file(load_trigger, "f.safetensors")),
    "perturbation file": Target(safetensors(), as_file(Perturbation.load, "d.safetensors")),
    "resume file": Target(damaged([_resume()]), as_file(train.load_resume, "resume.pt")),
    "record": Target(damaged([b'{"a": [1, 2.5, null]}']) | st.binary(max_size=99), as_file(paths.read_json, "r.json")),
}
