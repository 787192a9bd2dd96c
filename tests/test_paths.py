"""One root, atomic writes, and run folders that are loaded, made, refused, waited for and taken up again."""

from __future__ import annotations

import fcntl
import json
import selectors
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, start_python

from abd_core import paths
from abd_core.config import Config, option
from abd_core.paths import Run, RunError, atomic, load_or_make, read_json, sha256, write_json


@dataclass(frozen=True, kw_only=True)
class Example(Config):
    value: int = option(1, "a value")


class Maker:
    """Writes a file, counts its calls, and may fail half-way."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls, self.error, self.found = 0, error, []

    def __call__(self, folder: Path) -> Mapping[str, Any]:
        self.calls += 1
        self.found = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        (folder / "half.txt").write_text("half")
        (folder / "resume.pt").write_text("where I was")
        if self.error:
            raise self.error
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / "whole.txt").write_text(f"call {self.calls}")
        return {"calls": self.calls}


def made(maker: Callable, value: int = 1, inputs: dict[str, str] | None = None, **options: bool) -> Run:
    return load_or_make("example", Example(value=value), inputs or {}, maker, **options)


# --- atomic -------------------------------------------------------------------------------------------------


def test_an_atomic_write_replaces_the_file_at_its_end(tmp_path: Path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with atomic(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("exists", [True, False])
def test_an_atomic_write_that_fails_leaves_what_was_there_and_nothing_else(exists: bool, tmp_path: Path):
    target = tmp_path / "file.txt"
    if exists:
        target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic(target) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == ({"file.txt": "old"} if exists else {})


def test_two_writers_of_one_process_id_do_not_share_a_temporary_file(tmp_path: Path):
    with atomic(tmp_path / "a.txt") as first, atomic(tmp_path / "a.txt") as second:
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "a.txt").read_text() == "1"
    assert first.match(".*.tmp")  # which is what `load_or_make` removes


@pytest.mark.parametrize("folder", ["file.txt", "missing"])
def test_a_file_that_has_no_folder_is_refused_in_one_line(folder: str, tmp_path: Path):
    (tmp_path / "file.txt").touch()
    with pytest.raises(RunError, match=rf"x.csv cannot be written: {tmp_path / folder} is no folder$"):
        write_json(tmp_path / folder / "x.csv", {})


def test_json_comes_back_as_it_was_written(tmp_path: Path):
    record = {"ü": [1, 2.5, None, True], "a": {"b": "c"}}
    write_json(tmp_path / "r.json", record)
    assert read_json(tmp_path / "r.json") == record


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"{'a': 1}"])
def test_a_file_that_is_not_json_is_refused_in_one_line(content: bytes, tmp_path: Path):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(RunError, match=r"damaged file: .*r\.json: not JSON") as error:
        read_json(tmp_path / "r.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("function", [read_json, sha256])
def test_a_missing_file_is_named(function: Callable[[Path], object], tmp_path: Path):
    with pytest.raises(RunError, match=r"missing file: .*none\.txt"):
        function(tmp_path / "none.txt")


def test_the_checksum_is_sha256(tmp_path: Path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- load or make -------------------------------------------------------------------------------------------


def test_a_run_is_made_once_and_then_loaded(runs: Path):
    maker = Maker()
    first, again = made(maker), made(maker)
    assert maker.calls == 1
    assert (again.folder, again.metrics) == (first.folder, first.metrics)
    assert first.metrics["calls"] == 1 and first.metrics["seconds"] >= 0
    assert first.name == f"example/{first.folder.name}" and first.folder.parent.parent == runs
    assert again.file("sub/whole.txt").read_text() == "call 1"


def test_a_finished_folder_holds_its_config_inputs_environment_metrics_and_checksums(runs: Path):
    run = made(Maker(), inputs={"weights": "abc"})
    record = read_json(run.file("config.json"))
    assert (record["stage"], record["config"], record["inputs"]) == ("example", {"value": 1}, {"weights": "abc"})
    assert {"python", "torch", "open_clip", "device", "threads", "git_sha"} == record["environment"].keys()
    assert read_json(run.file("metrics.json")) == run.metrics
    assert set(read_json(run.file("manifest.json"))) == {"config.json", "half.txt", "sub/whole.txt"}


def test_without_git_a_run_has_no_revision(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert paths.environment()["git_sha"] is None


def test_what_was_left_to_resume_from_is_removed_at_the_end(runs: Path):
    assert not list(made(Maker()).folder.glob("resume.*"))


@pytest.mark.parametrize(("left", "timed"), [(".half.txt.7.tmp", True), ("resume.pt", False), ("part.txt", False)])
def test_what_a_killed_process_left_half_written_is_removed_and_its_time_is_not_guessed(
    left: str, timed: bool, runs: Path
):
    folder = made(Maker()).folder
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "config.json":
            path.unlink()
    shutil.rmtree(folder / "sub")
    (folder / left).write_text("half")
    again = made(Maker())
    assert (again.metrics["seconds"] is not None) == timed
    assert (folder / left).exists() == (left == "part.txt")


@pytest.mark.parametrize(
    "other",
    [
        {"value": 2},
        {"inputs": {"weights": "def"}},
        {"inputs": {}},
    ],
)
def test_another_config_or_input_is_another_folder(other: dict, runs: Path):
    maker = Maker()
    one = made(maker, inputs={"weights": "abc"})
    two = made(maker, **{"inputs": {"weights": "abc"}, **other})
    assert one.folder != two.folder and maker.calls == 2


def test_force_makes_it_anew_from_an_empty_folder(runs: Path):
    maker = Maker()
    first = made(maker)
    (first.folder / "sub" / "stale.txt").write_text("of another time")
    again = made(maker, force=True)
    assert (maker.calls, again.folder, again.metrics["calls"]) == (2, first.folder, 2)
    assert maker.found == ["config.json"]
    assert again.file("sub/whole.txt").read_text() == "call 2"
    assert not again.file("sub/stale.txt").exists()


def test_an_exception_leaves_an_unfinished_run_that_is_taken_up_again(runs: Path):
    with pytest.raises(ZeroDivisionError):
        made(Maker(error=ZeroDivisionError()))
    folder = next((runs / "example").iterdir())
    assert not (folder / "metrics.json").exists()
    maker = Maker()
    run = made(maker)
    assert (run.folder, maker.calls) == (folder, 1)
    assert maker.found == ["config.json", "half.txt", "resume.pt"]


@pytest.mark.parametrize(
    "tamper",
    [
        lambda record: {**record, "config": {"value": 2}},
        lambda record: {**record, "inputs": {"weights": "abc"}},
        lambda record: {**record, "stage": "other"},
        lambda record: {},
        lambda record: [],
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_config_is_refused_and_left_alone(tamper: Callable, finished: bool, runs: Path):
    path = made(Maker()).file("config.json")
    if not finished:
        path.with_name("metrics.json").unlink()
    path.write_text(json.dumps(tamper(json.loads(path.read_text()))))
    maker = Maker()
    with pytest.raises(RunError, match=rf"{path.parent} holds a run of another config: .*force=True") as error:
        made(maker)
    assert maker.calls == 0 and "\n" not in str(error.value)
    assert made(maker, force=True).metrics["calls"] == 1


@pytest.mark.parametrize("name", ["half.txt", "sub/whole.txt", "config.json"])
def test_a_damaged_file_of_a_finished_run_is_refused_and_named(name: str, runs: Path):
    run = made(Maker())
    content = run.file(name).read_text()
    run.file(name).write_text(content + " ")
    with pytest.raises(RunError, match=rf"damaged file: {run.file(name)}: .*force=True"):
        made(Maker())
    run.file(name).write_text(content)
    assert made(Maker()).metrics == run.metrics


@pytest.mark.parametrize("name", ["half.txt", "sub/whole.txt", "manifest.json"])
def test_a_missing_file_of_a_finished_run_is_named(name: str, runs: Path):
    run = made(Maker())
    run.file(name).unlink()
    with pytest.raises(RunError, match=f"missing file: {run.file(name)}"):
        made(Maker())


@pytest.mark.parametrize("name", ["metrics.json", "manifest.json", "config.json"])
def test_a_record_that_is_no_json_is_refused_and_named(name: str, runs: Path):
    run = made(Maker())
    run.file(name).write_text("{")
    with pytest.raises(RunError, match=f"damaged file: {run.file(name)}"):
        made(Maker())


def test_a_folder_that_is_removed_while_its_lock_is_waited_for_is_made_again(runs: Path, monkeypatch):
    folder, flock, calls = made(Maker()).folder, fcntl.flock, []

    def removed_meanwhile(lock: object, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:  # as its holder does whose input is bad
            shutil.rmtree(folder)
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    assert made(Maker()).file("half.txt").exists()


# --- two processes ------------------------------------------------------------------------------------------

CHILD = """
import time
from pathlib import Path
from test_paths import made

go = Path({go!r})

def make(folder):
    while not go.exists():
        time.sleep(0.01)
    (folder / "once.txt").open("a").write("made\\n")
    return {{"made": True}}

print(made(make).file("once.txt").read_text())
"""


@pytest.mark.slow
def test_a_second_process_waits_for_the_first_and_then_loads_its_run(runs: Path, tmp_path: Path):
    go = tmp_path / "go"
    script = CHILD.format(go=str(go))
    children = [start_python(script), start_python(script)]
    with selectors.DefaultSelector() as selector:
        for child in children:  # the one that waits says so; the other one is at work, until `go`
            selector.register(child.stderr, selectors.EVENT_READ)
        (waiting, _), *_ = selector.select()
    assert "is in use by another process: waiting for it" in waiting.fileobj.readline()
    go.write_text("")
    outputs = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert [output.strip() for output, _ in outputs] == ["made", "made"]


# --- places -------------------------------------------------------------------------------------------------


def test_the_root_is_the_checkout_unless_the_environment_names_another(monkeypatch, tmp_path: Path):
    monkeypatch.delenv("ABD_ROOT", raising=False)
    assert (paths.root(), paths.data_dir()) == (ROOT, ROOT / "data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "SHA256SUMS").write_text("")
    monkeypatch.setenv("ABD_ROOT", str(tmp_path))
    assert (paths.root(), paths.data_dir()) == (tmp_path, tmp_path / "data")


def test_a_root_without_data_is_refused_in_one_line(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("ABD_ROOT", str(tmp_path))
    with pytest.raises(RunError, match=f"no data/SHA256SUMS under {tmp_path}: set ABD_ROOT to a checkout") as error:
        paths.data_dir()
    assert "\n" not in str(error.value)


def test_runs_go_to_the_checkout_unless_the_environment_names_another_place(monkeypatch, tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "SHA256SUMS").write_text("")
    monkeypatch.setenv("ABD_ROOT", str(tmp_path))
    monkeypatch.delenv("ABD_RUNS")
    assert paths.runs_dir() == (tmp_path / "runs").resolve() and (tmp_path / "runs").is_dir()
    monkeypatch.setenv("ABD_RUNS", str(tmp_path / "a" / "b"))
    assert paths.runs_dir() == (tmp_path / "a" / "b").resolve() and (tmp_path / "a" / "b").is_dir()
