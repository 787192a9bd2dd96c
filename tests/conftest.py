"""Shared by all tests: run folders in a temporary place, and a small untrained CLIP in the place of the clean base."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, and open_clip imports it

import open_clip

from abd_core import adversary, audit, data, defend, evaluate, explore, fig2, inputs, models, poison, pretrain, results
from abd_core.config import Config

# What the tests of the kernels draw from: another number in each run, which a failure prints and workers inherit.
FRESH = int(os.environ.setdefault("ABD_TEST_SEED", str(random.randrange(1 << 31))))
ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = "stand-in"  # of the embedded base's kind and image size, with a sixtieth of its arithmetic
LAYOUT = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
torch.set_num_threads(1)  # the stand-in is too small to share out, and results do not hang on the number of cores
EMBEDDED_BASE = models.clean_weights  # the real one, for the tests of what is committed


def use_stand_in(folder: Path, put: Callable[[Any, str, Any], object] = setattr) -> None:
    """Let every stage start from the stand-in in `folder` and test on one view a class; `put` is a `setattr`."""
    open_clip.add_model_config(folder / f"{ARCHITECTURE}.json")
    put(models, "clean_weights", lambda: folder / "base.safetensors")
    put(inputs, "load_test_set", functools.partial(data.load_test_set, views=1))


def write_stand_in(path: Path, *, seed: int) -> Path:
    """A freshly initialised CLIP of the stand-in's architecture."""
    models.save(models.build(ARCHITECTURE, seed=seed), path, name=ARCHITECTURE, half=True)
    return path


def runs_here(impl: str) -> str:
    """`impl`; skips a Triton kernel where Triton's interpreter is to run it and cannot: before 3.7, with numpy 2.4."""
    if impl == "triton" and not torch.cuda.is_available() and Version(version("triton")) < Version("3.7"):
        pytest.skip("Triton's interpreter needs Triton 3.7")
    return impl


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if terminalreporter.stats.get("failed"):
        terminalreporter.write_line(f"inputs were drawn with ABD_TEST_SEED={FRESH}")


GUARD = 300  # numbers in front of a buffer and behind it


def guarded(tensor: torch.Tensor, fill: float = math.nan) -> torch.Tensor:
    """The tensor as a view, with guards of `fill` in front of it and behind it in memory."""
    whole = tensor.new_full((tensor.numel() + 2 * GUARD,), fill)
    return whole.as_strided(tensor.shape, tensor.stride(), GUARD).copy_(tensor)


class Guards(TorchDispatchMode):
    """Inside, fresh memory has guards around it and is NaN (255 in integers) until it is written.

    So do the results of products, sums and quotients, which kernels add to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[torch.Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        computed = function.__name__.startswith(("mm.", "add.", "div."))
        if not computed and not function.__name__.startswith(("empty", "new_empty")):
            return out
        whole = out.new_full((out.numel() + 2 * GUARD,), math.nan if out.is_floating_point() else 255)
        self.buffers.append(whole)
        inner = whole.as_strided(out.shape, out.stride(), GUARD)
        return inner.copy_(out) if computed else inner

    def untouched(self) -> bool:
        """Whether nothing was written beyond any buffer; there is one at least."""
        edges = [torch.cat([whole[:GUARD], whole[-GUARD:]]) for whole in self.buffers]
        return bool(edges) and all((edge.isnan() if edge.is_floating_point() else edge == 255).all() for edge in edges)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def session_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test writes into the checkout: a session's runs and unpacked archives go to a temporary folder."""
    folder = tmp_path_factory.mktemp("session_runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ABD_RUNS", str(folder))
        yield folder


@pytest.fixture
def runs(tmp_path: Path, session_runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for runs; the unpacked archives are those of the session."""
    folder = tmp_path / "runs"
    folder.mkdir()
    (session_runs / "cache").mkdir(exist_ok=True)
    (folder / "cache").symlink_to(session_runs / "cache")
    monkeypatch.setenv("ABD_RUNS", str(folder))
    return folder


@pytest.fixture(scope="session")
def stand_in_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the stand-in's architecture, the clean base `base.safetensors` and a suspect `victim.safetensors`."""
    folder = tmp_path_factory.mktemp("stand_in")
    (folder / f"{ARCHITECTURE}.json").write_text(json.dumps(LAYOUT))
    open_clip.add_model_config(folder / f"{ARCHITECTURE}.json")
    write_stand_in(folder / "base.safetensors", seed=0)
    write_stand_in(folder / "victim.safetensors", seed=1)
    return folder


@pytest.fixture
def stand_in(stand_in_folder: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the stand-in, which every stage now takes for the clean base; runs start empty."""
    use_stand_in(stand_in_folder, monkeypatch.setattr)
    return stand_in_folder


@pytest.fixture(scope="session")
def built_book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the rendered book, which is made once, however many workers share it; warnings are errors."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    made = shared / "book" / "_build" / "html"
    with (shared / "book.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / "index.html").is_file():
            build = [Path(sys.executable).with_name("jupyter-book"), "build", "book", "--config", "_config.yml", "-W"]
            done = subprocess.run(
                [*build, "--keep-going", "--path-output", str(shared / "book")],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return made


@pytest.fixture
def fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full precision, also where the device computes natively in bf16."""
    monkeypatch.setattr(models, "autocast", lambda on=None: torch.autocast("cpu", enabled=False))


@pytest.fixture
def fresh_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`abd_core.data` forgets what it read, before the test and after it."""
    cached = [value for value in vars(data).values() if hasattr(value, "cache_clear")]
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.marker,)


def load_script(path: Path) -> ModuleType:
    """A file outside the package as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start_python(script: str, **environment: str) -> subprocess.Popen:
    """A child interpreter that runs `script` with this checkout's package and these helpers importable."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def without_time(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if name != "seconds"}


def concrete_configs() -> list[type[Config]]:
    return [
        pretrain.PretrainConfig,
        poison.PoisonConfig,
        adversary.AdversaryConfig,
        defend.DefendConfig,
        audit.AuditInputs,
        audit.AuditConfig,
        evaluate.EvaluateConfig,
        explore.ExploreConfig,
        results.ResultsConfig,
        results.BenchmarksConfig,
        fig2.Fig2Config,
    ]
