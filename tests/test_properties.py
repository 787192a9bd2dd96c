"""Properties of whatever comes from outside, over inputs that hypothesis makes up; `make fuzz` runs them for hours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from fuzz.targets import TARGETS
from hypothesis import HealthCheck, given, settings


@pytest.mark.parametrize("name", TARGETS)
def test_any_input_is_taken_or_refused_in_one_line(name: str):
    target = TARGETS[name]
    run = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    run(given(target.strategy)(target.check))()


@pytest.mark.parametrize("crash", [RuntimeError("no"), AssertionError("no")])
def test_another_exception_would_be_noticed(crash: Exception):
    from fuzz.targets import as_file

    def read(path: object) -> None:
        raise crash

    with pytest.raises(type(crash)):
        as_file(read, "x")(b"")


def test_the_long_form_writes_a_row_a_target(tmp_path: Path):
    table = tmp_path / "fuzz.csv"
    command = [sys.executable, ROOT / "tests" / "fuzz" / "fuzz.py", "--minutes", "0.01", "--output", table]
    subprocess.run([*command, "--targets", "record", "manifest"], check=True, timeout=300, capture_output=True)
    rows = pd.read_csv(table)
    assert rows["target"].tolist() == ["manifest", "record"]
    assert (rows["examples"] > 0).all() and (rows["crashes"] == 0).all()
