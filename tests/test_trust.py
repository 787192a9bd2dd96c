"""The page "Trust and failure" shows what the harnesses measured and the tests count, and they reach their bars."""

from __future__ import annotations

from faults import figures


def test_the_page_has_the_figures_of_the_tables_and_of_the_tests():
    assert figures.PAGE.read_text(encoding="utf-8") == figures.page(), "run python tests/faults/figures.py"


def test_a_disturbance_that_was_not_survived_would_show():
    row = {"fault": "SIGKILL", "stage": "poison", "reads": "1000", "survived": "yes"}
    lines = figures.faults([row, {**row, "survived": "no"}])
    assert "| SIGKILL | 1 of 2 |" in lines and lines[-1].endswith("2,000.")


def test_what_was_measured_survived_and_nothing_crashed():
    assert [row for row in figures.rows("faults.csv") if row["survived"] != "yes"] == []
    assert [row for row in figures.rows("fuzz.csv") if row["crashes"] != "0"] == []
