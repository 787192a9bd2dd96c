"""What the benchmarks share: turns, ratios and the table."""

import csv
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).parent.parent


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module, with a table of its own."""
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    import measure

    monkeypatch.setattr(measure, "TABLE", tmp_path / "results.csv")
    return measure


def table(measure: ModuleType) -> list[dict[str, str]]:
    with measure.TABLE.open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def test_variants_take_turns_there_and_back_and_the_first_turn_is_not_counted(measure: ModuleType):
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    taken = measure.seconds(calls, repeats=3, in_a_row=2)
    assert "".join(called) == "ccbbaa" + "aabbcc" + "ccbbaa" + "aabbcc"
    assert {name: len(turns) for name, turns in taken.items()} == dict.fromkeys("abc", 3)


def test_what_a_call_is_given_is_made_outside_of_its_time(measure: ModuleType, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(measure, "_now", lambda: now[0])

    def spend(seconds: float) -> float:
        now[0] += seconds
        return seconds

    taken = measure.seconds({"a": spend}, repeats=2, given={"a": lambda: spend(5.0)})
    assert taken == {"a": [5.0, 5.0]}


def test_a_machine_that_slows_down_leaves_ratios_as_they_are(measure: ModuleType):
    drift = [1.0, 1.1, 3.0, 3.1, 7.0, 9.0]
    ratio, within = measure.compared([2 * d for d in drift], drift[:-1])  # the last turn was cut short
    assert ratio == within[0] == within[1] == 2


def test_an_interval_holds_the_ratio_and_widens_with_the_turns_differences(measure: ModuleType):
    first = [1.0] * 9
    steady = [1 / (2 + 0.01 * i) for i in range(-4, 5)]
    restless = [1 / (2 + 0.1 * i) for i in range(-4, 5)]
    widths = []
    for own in (steady, restless):
        ratio, (low, high) = measure.compared(first, own)
        assert ratio == pytest.approx(2) and low < ratio < high
        widths.append(high - low)
    assert widths[1] == pytest.approx(10 * widths[0])


def test_few_turns_have_a_ratio_but_no_interval(measure: ModuleType):
    assert measure.compared([6.0] * measure.FEWEST, [2.0] * (measure.FEWEST - 1)) == (3.0, None)


def test_a_figure_takes_the_place_of_its_own_case_and_no_other(measure: ModuleType):
    for case, milliseconds in (("small", 4.0), ("large", 8.0), ("small", 2.0)):
        report = measure.Report("one")
        report.times(case, "step", {"plain": [1e-3 * milliseconds] * 5, "ours": [1e-3] * 5})
        report.write()
    other = measure.Report("two")
    other.note("small", "plain", "step", "ms", 1.0)
    other.write()
    found = {(row["benchmark"], row["case"], row["variant"]): (row["value"], row["ratio"]) for row in table(measure)}
    assert found == {
        ("one", "large", "plain"): ("8", "1"),
        ("one", "large", "ours"): ("1", "8"),
        ("one", "small", "plain"): ("2", "1"),
        ("one", "small", "ours"): ("1", "2"),
        ("two", "small", "plain"): ("1", ""),
    }


def test_what_is_compared_beside_its_own_first_one_is_not_compared_with_the_lone_one(measure: ModuleType):
    report = measure.Report("one")
    taken = {"plain": [9.0] * 5, "ours": [1.0] * 5}
    found = report.times("case", "step", taken, beside={"ours": [2.0] * 5}, calls=12)
    report.write()
    assert found == {"plain": 9.0, "ours": 1.0}
    ours = next(row for row in table(measure) if row["variant"] == "ours")
    assert {key: ours[key] for key in ("ratio", "ratio_low", "ratio_high", "n")} == {
        "ratio": "2",
        "ratio_low": "2",
        "ratio_high": "2",
        "n": "60",
    }
