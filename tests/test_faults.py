"""Stages that are killed, find the disk full, or meet another process; the long form is `make test-faults`.

The harness does the work, here as there; these tests also show that it would notice a broken promise.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from faults import harness
from safetensors.torch import save_file

from abd_core import train

HARNESS = ROOT / "tests" / "faults" / "harness.py"


def disturbed(table: Path, *arguments: str) -> list[dict[str, str]]:
    command = [sys.executable, str(HARNESS), "--output", str(table), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with table.open(newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.slow
def test_every_stage_survives_a_kill_a_full_disk_and_company_and_no_row_is_measured_twice(tmp_path: Path):
    faults = ("SIGKILL", "full disk", "two processes", "worker dies")
    short = ["--kills", "1", "--others", "1", "--faults", *faults]
    rows = disturbed(tmp_path / "faults.csv", *short)
    assert [(row["fault"], row["stage"]) for row in rows] == [
        (fault, stage) for fault in faults for stage in harness.VARIANTS
    ]
    assert {row["survived"] for row in rows} == {"yes"}
    assert sum(int(row["reads"]) for row in rows) > 100
    kept = (tmp_path / "faults.csv").read_bytes()
    disturbed(tmp_path / "faults.csv", *short)
    assert (tmp_path / "faults.csv").read_bytes() == kept


@pytest.mark.long
@pytest.mark.slow
def test_every_stage_survives_every_fault_of_the_harness(tmp_path: Path):
    rows = disturbed(tmp_path / "faults.csv", "--kills", "3", "--others", "2")
    assert {row["fault"] for row in rows} == set(harness.FAULTS)
    assert {row["survived"] for row in rows} == {"yes"}


# --- the harness would notice ---------------------------------------------------------------------------------------

FILES = ("metrics.json", "model.safetensors", "history.csv", "resume.pt")


@pytest.fixture
def place(tmp_path: Path) -> harness.Place:
    folder = tmp_path / "runs" / "poison" / "0123456789ab"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text('{"eval": [1, 2, 3]}\n')
    save_file({"weights": torch.arange(100.0)}, folder / "model.safetensors")
    (folder / "history.csv").write_text("epoch,loss\n1,0.25\n2,0.125\n")
    train.save_resume(folder / "resume.pt", {"step": 3, "model": torch.arange(100.0)})
    return harness.Place(tmp_path / "runs", tmp_path)


def test_whole_files_are_read(place: harness.Place):
    assert (harness.read_all(place), harness.saved_step(place)) == (len(FILES), 3)


@pytest.mark.parametrize("name", FILES)
def test_half_a_file_is_noticed(name: str, place: harness.Place):
    folder = place.folder()
    assert folder is not None
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(harness.Broken, match=name):
        harness.read_all(place)


class Ended:
    """Stands for a process that ran to its end."""

    code = 0

    def __init__(self, folder: Path, **said: object) -> None:
        self.said = {"folder": str(folder), "metrics": {"ca": 0.5, "seconds": 1}, "began": [3], **said}

    def result(self) -> dict:
        return self.said


def test_other_metrics_other_weights_and_work_done_again_are_noticed(place: harness.Place):
    folder = place.folder()
    assert folder is not None
    (folder / "resume.pt").unlink()
    same = harness.Reference({"ca": 0.5, "seconds": 2}, harness.tensors(folder), 1.0, 1)
    harness.compare(Ended(folder), same, step=3)
    with pytest.raises(harness.Broken, match="other metrics"):
        harness.compare(Ended(folder, metrics={"ca": 0.6}), same, step=3)
    with pytest.raises(harness.Broken, match="saved was step 4"):
        harness.compare(Ended(folder), same, step=4)
    other = harness.Reference(same.metrics, {"model.safetensors: weights": torch.zeros(100)}, 1.0, 1)
    with pytest.raises(harness.Broken, match="other weights"):
        harness.compare(Ended(folder), other, step=3)
    (folder / ".model.safetensors.7.tmp").touch()
    with pytest.raises(harness.Broken, match="half-done"):
        harness.compare(Ended(folder), same, step=3)
