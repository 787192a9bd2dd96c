"""From statistics to a probability: the calibration, its halves, and what is said where there is none."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from abd_core import verdict
from abd_core.evaluate import rate
from abd_core.paths import RunError
from abd_core.verdict import MODES, STATISTICS, auc, calibrate, features, judge, left_out, performance, roc, wilson


def population(count: int = 12, *, gap: float = 3.0, seed: int = 0) -> pd.DataFrame:
    """Clean and poisoned models, of which only `drift` differs, by `gap` standard deviations."""
    draw, rows = np.random.default_rng(seed), []
    for kind in ("clean", "poisoned"):
        for i in range(count):
            values = {f"{name}_{mode}": draw.normal(1, 0.1) for name in STATISTICS for mode in MODES}
            for mode in MODES:
                values[f"drift_{mode}"] += gap * 0.1 * (kind == "poisoned")
            half, attack = ("choose", "report")[i % 2], ("badnet", "sig")[i // 2 % 2] if kind == "poisoned" else ""
            rows.append({"kind": kind, "half": half, "attack": attack, "asr": 1.0, **values})
    table = pd.DataFrame(rows)
    table["target"] = "cat"
    table[[f"suspected_{mode}" for mode in MODES]] = "cat"
    return table.assign(label=(table["kind"] == "poisoned").astype(int))


def row(drift: float) -> dict[str, float]:
    return {**dict.fromkeys(STATISTICS, 1.0), "drift": drift}


def test_a_calibration_tells_what_differs_and_ignores_what_does_not():
    fitted = calibrate(population(40, gap=6), "compared")
    assert fitted is not None
    assert fitted.probability(row(1.0)) < 0.2 and fitted.probability(row(1.6)) > 0.8
    assert fitted.weights.argmax() == STATISTICS.index("drift")
    assert (fitted.weights >= 0).all()


def test_more_of_a_statistic_never_lowers_the_probability():
    fitted = calibrate(population(10, gap=0.5), "alone")
    values = [fitted.probability(row(drift)) for drift in np.linspace(0, 3, 30)]
    assert (np.diff(values) >= 0).all()


def test_no_single_statistic_counts_without_limit():
    fitted = calibrate(population(10), "compared")
    assert fitted.probability(row(1e9)) == fitted.probability(row(1e12)) < 1


def test_the_threshold_lies_between_the_kinds_where_they_are_apart():
    rows = population(10, gap=30)
    fitted = calibrate(rows, "compared")
    table = verdict.scored(rows, fitted, "compared")
    clean, bad = (table[table["label"] == label]["probability"] for label in (0, 1))
    assert clean.max() < fitted.threshold < bad.min()
    result = performance(rows, fitted, "compared")
    assert (result["AUC"].value, result["detected"].value, result["false alarms"].value) == (1, 1, 0)
    assert result["target named"].n == 10


def test_the_threshold_keeps_false_alarms_rare_where_the_kinds_overlap():
    rows = population(60, gap=1.0)
    fitted = calibrate(rows, "compared")
    assert performance(rows, fitted, "compared")["false alarms"].value <= verdict.FALSE_ALARMS
    assert performance(rows, fitted, "compared")["detected"].value < 1


def test_both_kinds_weigh_the_same_however_many_there_are():
    rows = population(40, gap=2)
    few = rows[(rows["label"] == 0) | (rows.index % 4 == 0)]
    middle = row(1.1)
    assert calibrate(few, "compared").probability(middle) == pytest.approx(
        calibrate(rows, "compared").probability(middle), abs=0.15
    )


def test_auc_counts_couples_and_ties_half():
    assert auc(np.array([0.0, 1.0]), np.array([1.0, 2.0])).value == (1 + 1 + 0.5 + 1) / 4
    perfect = auc(np.zeros(10), np.ones(20))
    assert perfect.value == perfect.ci_high == 1 and 0.6 < perfect.ci_low < 0.8 and perfect.n == 10
    with pytest.raises(ValueError, match="empty"):
        auc(np.zeros(0), np.ones(3))


def test_wilson_is_the_interval_of_single_trials():
    import torch

    single = rate(torch.arange(20) < 5, torch.arange(20))
    assert wilson(0.25, 20) == pytest.approx((single.ci_low, single.ci_high), abs=1e-9)


def test_an_attack_is_judged_by_a_calibration_that_never_saw_it():
    rows = population(12, gap=30)
    table = left_out(rows, "compared")
    assert set(table["attack"]) == {"badnet", "sig"} and (table["detected"] == table["n"]).all()
    rows.loc[(rows["attack"] == "sig"), "drift_compared"] = 1.0  # undetectable: no other attack can help it
    assert left_out(rows, "compared").set_index("attack").loc["sig", "detected"] == 0


def test_a_verdict_says_what_it_rests_on_or_that_there_is_none(monkeypatch):
    fitted = calibrate(population(10, gap=30), "compared")
    bad = judge(row(4.0), mode="compared", calibration=fitted)
    assert bad.alarm and "'cat'" in bad.sentence("cat") and "10 clean and 10 backdoored" in bad.basis
    good = judge(row(1.0), mode="compared", calibration=fitted)
    assert not good.alarm and good.sentence("cat").startswith("No alarm")
    broken = judge(row(4.0), mode="compared", works=False, calibration=fitted)
    assert not broken.alarm and broken.probability is None and "nothing to audit" in broken.basis
    monkeypatch.setattr(verdict, "committed", lambda mode: None)
    plain = judge({**row(0.9), "response": 0.1}, mode="compared")
    assert plain.alarm and plain.probability is None and "No calibration" in plain.basis
    assert not judge({**row(0.2), "response": 0.3}, mode="alone").alarm
    assert judge({**row(0.2), "response": 0.6}, mode="alone").alarm


def test_statistics_of_other_settings_than_the_population_s_get_no_probability():
    found = judge({**row(4.0), "response": 0.0}, mode="compared", preset="published")
    assert found.alarm and found.probability is None and "other than the population's" in found.basis


@pytest.mark.parametrize("few", [{"classes": 99}, {"images": 255}])
def test_statistics_of_fewer_classes_or_images_than_the_population_s_get_no_probability(few):
    fitted = calibrate(population(10, gap=30), "compared")
    assert judge(row(4.0), mode="compared", classes=100, images=256, calibration=fitted).probability is not None
    found = judge({**row(0.9), "response": 0.1}, mode="compared", calibration=fitted, **few)
    assert found.alarm and found.probability is None and "of which the population had 100 and 256" in found.basis


def test_a_few_classes_without_clean_weights_are_no_evidence():
    drawn = {**row(0.9), "response": 0.9}
    assert judge(drawn, mode="alone", classes=50).alarm and judge(drawn, mode="compared", classes=3).alarm
    found = judge(drawn, mode="alone", classes=49)
    assert not found.alarm and found.probability is None and "at least 50 class names" in found.basis


def test_statistics_that_are_no_numbers_are_refused_rather_than_taken_for_low_ones():
    fitted = calibrate(population(10, gap=30), "compared")
    for name in ("drift", "field"):
        with pytest.raises(ValueError, match="no finite number"):
            judge({**row(4.0), name: math.nan}, mode="compared", calibration=fitted)


def test_too_few_models_make_no_calibration():
    rows = population(10)
    assert calibrate(rows[(rows["label"] == 0) | (rows.index < 12)], "compared") is None


def test_victims_whose_attack_did_not_take_are_neither_clean_nor_backdoored(tmp_path):
    rows = population(3).drop(columns="label")
    rows.loc[rows.index[-1], "asr"] = 0.1
    rows.to_csv(tmp_path / "audit.csv", index=False)
    table = verdict.read_population(tmp_path / "audit.csv")
    assert table["label"].tolist() == [0, 0, 0, 1, 1, -1]
    assert verdict.read_population(tmp_path / "none.csv").empty
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RunError, match="not a population"):
        verdict.read_population(tmp_path / "other.csv")


def test_statistics_without_a_limit_enter_as_logarithms():
    assert features({**dict.fromkeys(STATISTICS, 0.0), "field": np.e - 1})[STATISTICS.index("field")] == pytest.approx(
        1
    )
    assert features({**dict.fromkeys(STATISTICS, 0.0), "inversion": -5.0})[STATISTICS.index("inversion")] == 0


def test_the_area_below_the_curve_is_the_auc_and_its_ends_are_none_and_all():
    draw = np.random.default_rng(0)
    clean, bad = draw.integers(0, 6, 30), draw.integers(2, 9, 20)  # with ties
    false, true = roc(clean, bad)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(true, false) == pytest.approx(auc(clean, bad).value)


def test_a_statistic_is_set_against_the_population_s_clean_models_alone(monkeypatch):
    rows = population(5).assign(drift_compared=[0.1, 0.2, 0.3, 0.4, 0.5, *[0.0] * 5])
    monkeypatch.setattr(verdict, "read_population", lambda: rows)
    assert verdict.clean_below({"drift": 0.35, "unknown": 1.0}, "compared") == {"drift": (3, 5)}
    monkeypatch.setattr(verdict, "read_population", lambda: pd.DataFrame(columns=["label", "half", "attack"]))
    assert verdict.clean_below({"drift": 0.35}, "compared") == {}


def test_each_statistic_is_also_judged_by_itself():
    rows = population(12, gap=30)
    found = verdict.single(rows.assign(head_compared=np.nan), (*STATISTICS, "head"), "compared")
    assert set(found) == set(STATISTICS)  # not all models have the other one
    assert found["drift"].value == 1 and found["drift"].n == 12
    assert 0.2 < found["decree"].value < 0.8
