"""The page "Add your own" (book/add_your_own.md), followed word by word in a copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT

PAGE = (ROOT / "book" / "add_your_own.md").read_text()
CODE = re.findall(r"^```(?:python|text)\n(.*?)^```$", PAGE, re.M | re.S)
SMALL = """
from pathlib import Path
from abd_core import grid

assert "BadNet-Checkerboard" in grid.GRIDS["zoo"].attacks and "blur" in grid.GRIDS["table1"].defences
grid.ATTACKS["BadNet-Checkerboard"] |= {"limit": 128, "poison_epochs": 1}
grid.DEFENCES["blur"] |= {"epochs": 1, "share": 1.0}
cells = grid.select(["zoo"], attacks=["BadNet-Checkerboard"], seeds=[0])
cells = [cell for cell in cells if cell.defence == "none"] + [grid.Cell("BadNet-Checkerboard", "blur", 0, "eval")]
failed = grid.run(cells, output=Path("mine.csv"))
assert not failed, failed

from abd_core import plots
from abd_core.results import read_results
print(plots.table(read_results(Path("mine.csv")), ["BadNet-Checkerboard"], ["none", "blur"]))
"""


def appended(path: Path, before: str, block: str, line: str) -> None:
    """`block` above the registry that begins with `before`, and `line` as the registry's last."""
    text = path.read_text()
    head, tail = text.split(before)
    end = re.search(r"^    \)$|^}$", tail, re.M)
    assert end
    path.write_text(f"{head}{block}\n\n{before}{tail[: end.start()]}{line}{tail[end.start() :]}")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("abd_core", "book"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    attack, attack_line, touched, defence, defence_line = CODE
    (tmp_path / "tests").mkdir()
    for name in ("conftest.py", "test_triggers.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    appended(tmp_path / "abd_core" / "triggers.py", "TRIGGERS: dict", attack, attack_line)
    appended(tmp_path / "tests" / "test_triggers.py", "TOUCHED = {", "", touched)
    appended(tmp_path / "abd_core" / "defences.py", "DEFENCES: dict", defence, defence_line)
    return tmp_path


def test_one_class_and_one_line_put_an_attack_and_a_defence_into_the_grid_and_its_table(copy: Path):
    environment = {**os.environ, "PYTHONPATH": str(copy), "ABD_RUNS": str(copy / "runs"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SMALL], cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(copy / "mine.csv")
    assert set(zip(table["attack"], table["defence"], strict=True)) == {
        ("BadNet-Checkerboard", "none"),
        ("BadNet-Checkerboard", "blur"),
    }
    assert {"ca_top1", "asr", "ra"} <= set(table["metric"]) and table["value"].between(0, 1).all()
    assert re.search(r"BadNet-Checkerboard +none .*\n +blur ", done.stdout), done.stdout
    asked = subprocess.run(
        [*f"{sys.executable} -m pytest -q -n0 tests/test_triggers.py -k".split(), "checkerboard or covers_every"],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode == 0 and asked.stdout.count(".") > 10, asked.stdout
