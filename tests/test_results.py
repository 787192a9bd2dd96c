"""The table of results: how it is read, its statistics against scipy's and brute force, and the chapters it feeds."""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy import stats
from test_notebooks import BOOK, outputs, run

from abd_core import plots
from abd_core.config import AbdError
from abd_core.grid import CANDIDATES, GRIDS, RIVALS, Cell
from abd_core.notebook import summary
from abd_core.paths import RunError
from abd_core.results import (
    COLUMNS,
    CONTROLS,
    ResultsConfig,
    ResultsError,
    aims,
    averages,
    chosen,
    claims,
    differences,
    findings,
    front,
    half_width,
    means,
    pareto,
    read_benchmarks,
    read_results,
    replication,
)

PAPER = {  # attack -> defence -> (CA, ASR); stand-ins for the paper's
    "BadNet": {"none": (0.60, 0.95), "FT": (0.53, 0.66), "ABD": (0.53, 0.05), "I_adv + T": (0.54, 0.10)},
    "BadCLIP": {"none": (0.59, 0.99), "CleanCLIP": (0.54, 0.90), "UAP + T": (0.53, 0.48), "I_adv + T": (0.54, 0.46)},
}
DEFENCES = (
    *("none", "FT", "CleanCLIP", "RoCLIP", "PAR", "ABD", "clean weights", "WiSE-FT", "I + T", "I_adv + T", "I + T_eda"),
    *("UAP + T", "noise patch", "random erasing", "Gaussian noise"),
    *("ABD, patch top left", "noise patch, top left", "Ours, renamed"),
)
SEARCHED = (
    *("none", "PAR, lr 1e-3", "ABD", "ABD, lr 5e-4", "ABD, lr 1e-3", "ABD, additive", "ABD, additive 0.06"),
    *("ABD, both views", "ABD, tau 0.07", "ABD, share 0.25", "ABD, 1 epoch", "ABD, patch area 0.01"),
)
ATTACKS = ("BadNet", "BadCLIP", "WaNet", "BadNet, bottom right")


def synthetic(
    attacks: tuple[str, ...] = ATTACKS, defences: tuple[str, ...] = DEFENCES, seeds: int = 3, seed: int = 0
) -> pd.DataFrame:
    """Rows as the grid writes them, with drawn values; on `eval` what is reported, on `dev` the search for settings."""
    random = np.random.default_rng(seed)
    reported = itertools.product(("eval",), attacks, defences, range(seeds))
    searched = itertools.product(("dev",), attacks[:1], SEARCHED, range(100, 102))
    rows, level = [], {}
    for split, attack, defence, number in itertools.chain(reported, searched):
        for i, metric in enumerate(("ca_top1", "asr", "ra")):
            middle = level.setdefault((attack, defence, metric), random.uniform(0.2, 0.8))
            value = round(middle + random.uniform(-0.05, 0.05), 3)
            stated = PAPER.get(attack, {}).get(defence, ()) if split == "eval" else ()
            rows.append(
                {
                    "attack": attack,
                    "defence": defence,
                    "seed": number,
                    "split": split,
                    "metric": metric,
                    "value": value,
                    "n": 1000,
                    "ci_low": round(value - 0.05, 3),
                    "ci_high": round(value + 0.05, 3),
                    "paper_value": stated[i] if i < len(stated) else np.nan,
                    "seconds": np.nan if number == 1 else float(random.integers(10, 300)),
                    "device": "a processor",
                    "versions": "torch 2.15.0, 2 threads",
                    "git_sha": "0" * 40,
                    "run_id": f"defend/{attack}-{defence}-{number}",
                }
            )
    return pd.DataFrame(rows).sort_values(["attack", "defence", "seed", "split", "metric"], ignore_index=True)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return synthetic()


@pytest.fixture(scope="module")
def grid(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `eval`; one rival has but one seed, another lacks the first and has one more."""
    rows = table[table["split"] == "eval"]
    rows = rows[(rows["defence"] != "PAR") | (rows["seed"] == 0)]
    return rows.assign(seed=rows["seed"] + (rows["defence"] == "RoCLIP"))


def values(rows: pd.DataFrame, attack: str, defence: str, metric: str) -> pd.Series:
    """By seed."""
    chosen = rows["attack"].eq(attack) & rows["defence"].eq(defence) & rows["metric"].eq(metric)
    return rows[chosen].set_index("seed")["value"].sort_index()


def shown_mean(rows: pd.DataFrame, attack: str, defence: str, metric: str) -> str:
    """A table's cell by way of numpy and scipy."""
    shares = 100 * values(rows, attack, defence, metric).to_numpy()
    low, high = stats.t.interval(0.95, len(shares) - 1, np.mean(shares), stats.sem(shares))
    return f"{np.mean(shares):.1f} ± {(high - low) / 2:.1f} ({len(shares)})"


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


# --- reading ------------------------------------------------------------------------------------------------


def write(rows: pd.DataFrame, path: Path) -> Path:
    rows.to_csv(path, index=False)
    return path


def test_what_is_written_is_read_back_whatever_the_order_of_rows_and_columns(table: pd.DataFrame, tmp_path: Path):
    mixed = table.sample(frac=1, random_state=0)[[*reversed(table.columns)]].assign(note="more")
    read = read_results(write(mixed, tmp_path / "grid.csv"))
    key = ["attack", "defence", "seed", "split", "metric"]
    expected = table.sort_values(key, ignore_index=True)[list(COLUMNS)]
    pd.testing.assert_frame_equal(read.sort_values(key, ignore_index=True), expected, check_dtype=False)


def test_rows_come_in_the_order_of_the_registries_with_the_victim_first_and_new_labels_last(
    table: pd.DataFrame, tmp_path: Path
):
    read = read_results(write(table, tmp_path / "grid.csv"))
    assert list(read["attack"].unique()) == ["BadNet", "BadCLIP", "WaNet", "BadNet, bottom right"]
    assert list(read["defence"].unique()[:4]) == ["none", "ABD", "FT", "CleanCLIP"]
    assert {"ABD, additive", "Ours, renamed"} < set(read["defence"].unique()[-20:])
    assert list(read["metric"].unique()) == ["ca_top1", "asr", "ra"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "1.2"}, "line 3: value = '1.2': a share in [0, 1] expected"),
        ({"value": "nan"}, "line 3: value = 'nan': a share in [0, 1] expected"),
        ({"value": ""}, "line 3: value = '': a share in [0, 1] expected"),
        ({"paper_value": "53.47"}, "line 3: paper_value = '53.47': a share in [0, 1] or nothing expected"),
        ({"seed": "1.5"}, "line 3: seed = '1.5': a whole number ≥ 0 expected"),
        ({"n": "0"}, "line 3: n = '0': a whole number ≥ 1 expected"),
        ({"split": "test"}, "line 3: split = 'test': one of dev, eval expected"),
        ({"metric": "acc"}, "line 3: metric = 'acc': one of ca_top1, ca_top5, ca_top10, asr, asr_all, ra expected"),
        ({"attack": " "}, "line 3: attack = ' ': a name expected"),
        ({"seconds": "-1"}, "line 3: seconds = '-1': a number ≥ 0 or nothing expected"),
        ({"seconds": "inf"}, "line 3: seconds = 'inf': a number ≥ 0 or nothing expected"),
        ({"ci_low": "0.9", "value": "0.5"}, "line 3: value = 0.5: outside [ci_low, ci_high]"),
        ({"metric": "asr"}, "line 3: measured twice, see line 2: ('BadNet', 'ABD', 0, 'eval', 'asr')"),
    ],
)
def test_a_value_or_row_that_cannot_be_is_named_in_one_line(tmp_path: Path, change: dict[str, str], message: str):
    rows = synthetic(("BadNet",), ("ABD",), 1).astype(object)
    rows = rows[(rows["split"] == "eval") & (rows["metric"] != "ra")].reset_index(drop=True)
    assert list(rows["metric"]) == ["asr", "ca_top1"]
    rows.loc[1, list(change)] = list(change.values())
    with pytest.raises(ResultsError) as caught:
        read_results(write(rows, tmp_path / "grid.csv"))
    assert str(caught.value) == f"{tmp_path / 'grid.csv'}, {message}"


def test_two_values_of_the_paper_for_the_same_cell_are_refused(tmp_path: Path):
    rows = synthetic(("BadNet",), ("ABD",), 2)
    rows = rows[(rows["split"] == "eval") & (rows["metric"] == "asr")]
    rows["paper_value"] = [0.05, 0.06]
    with pytest.raises(ResultsError, match=r"grid.csv, line 3: paper_value = 0.06: 0.05 in line 2$"):
        read_results(write(rows, tmp_path / "grid.csv"))


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (None, RunError, "missing file: "),
        ("", ResultsError, ": no column 'attack', 'defence', "),
        (",".join(name for name in COLUMNS if name != "seed"), ResultsError, ": no column 'seed'; needed: attack, "),
        (",".join(COLUMNS), ResultsError, ": no rows"),
        (",".join(COLUMNS) + "\n1,2", ResultsError, ", line 2: 15 fields expected, not 2"),
        (b"\xff\xfe\x00", RunError, ": no CSV ("),
    ],
)
def test_a_file_that_is_no_table_of_results_is_named_in_one_line(tmp_path, text, kind, message):
    path = tmp_path / "grid.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(AbdError) as caught:
        read_results(path)
    assert type(caught.value) is kind and message in str(caught.value)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# --- statistics ---------------------------------------------------------------------------------------------


def test_the_half_width_is_the_tabulated_quantile_of_student_s_t():
    counts = pd.Series([1, 2, 3, 4, 5, 11])
    quantiles = half_width(np.sqrt(counts), counts)
    assert quantiles.isna().tolist() == [True, False, False, False, False, False]
    assert quantiles[1:].to_numpy() == pytest.approx([12.706, 4.303, 3.182, 2.776, 2.228], abs=6e-4)


def test_means_and_their_intervals_are_those_of_numpy_and_scipy(grid: pd.DataFrame):
    grid = grid[grid["defence"].isin(["ABD", "PAR", "RoCLIP"])]
    result = means(grid)
    assert len(result) == grid.groupby(["attack", "defence", "metric"]).ngroups
    several = 0
    for (attack, defence, metric), cell in result.iterrows():
        shares = values(grid, attack, defence, metric).to_numpy()
        assert cell["seeds"] == len(shares)
        assert cell["mean"] == pytest.approx(np.mean(shares), abs=1e-12)
        if len(shares) > 1:
            interval = stats.ttest_1samp(shares, 0).confidence_interval(0.95)
            assert (cell["ci_low"], cell["ci_high"]) == pytest.approx(tuple(interval), abs=1e-9)
            assert cell["half"] == pytest.approx((interval.high - interval.low) / 2, abs=1e-9)
            several += 1
    assert 0 < several < len(result)


def test_a_single_run_keeps_its_own_interval_and_has_none_over_seeds(grid: pd.DataFrame):
    row = grid[grid["defence"].eq("PAR") & grid["attack"].eq("WaNet") & grid["metric"].eq("asr")].iloc[0]
    cell = means(grid).loc[("WaNet", "PAR", "asr")]
    assert (cell["mean"], cell["ci_low"], cell["ci_high"]) == (row["value"], row["ci_low"], row["ci_high"])
    assert np.isnan(cell["half"])


@pytest.mark.parametrize("against", ["none", "FT", "RoCLIP", "PAR"])
def test_differences_are_paired_by_seed_as_scipy_pairs_them(grid: pd.DataFrame, against: str):
    result = differences(grid, [("ABD", against)], ["asr", "ra"])
    assert list(zip(result["attack"], result["metric"], strict=True)) == list(
        dict.fromkeys(zip(*(grid[grid["metric"] != "ca_top1"][name] for name in ("attack", "metric")), strict=True))
    )
    for row in result.itertuples():
        ours, theirs = (values(grid, row.attack, name, row.metric) for name in ("ABD", against))
        seeds = sorted({*ours.index} & {*theirs.index})
        assert row.seeds == len(seeds) == {"PAR": 1, "RoCLIP": 2}.get(against, 3)
        assert row.difference == pytest.approx(np.mean([ours[s] - theirs[s] for s in seeds]), abs=1e-12)
        if len(seeds) == 1:
            assert np.isnan(row.ci_low) and np.isnan(row.ci_high) and row.side == "too few seeds"
            continue
        test = stats.ttest_rel(ours[seeds], theirs[seeds])
        assert (row.ci_low, row.ci_high) == pytest.approx(tuple(test.confidence_interval(0.95)), abs=1e-9)
        told = "lower" if row.difference < 0 else "higher"
        assert row.side == (told if test.pvalue < 0.05 else "too close to tell")


def test_pairing_takes_the_luck_of_the_victim_out():
    victims = np.array([0.1, 0.5, 0.9])
    rows = [
        {**row, "value": value}
        for defence, effect in {"ABD": 0.0, "FT": 0.05}.items()
        for (_, row), value in zip(
            synthetic(("BadNet",), (defence,), 3).query("split == 'eval' and metric == 'asr'").iterrows(),
            victims + effect + np.array([0.0, 0.001, -0.001]) * (defence == "FT"),
            strict=True,
        )
    ]
    grid = pd.DataFrame(rows)
    (row,) = differences(grid, [("ABD", "FT")]).itertuples()
    assert row.side == "lower" and row.ci_high - row.ci_low < 0.01
    assert (means(grid)["half"] > 0.9).all()


def test_several_splits_at_once_are_refused(table: pd.DataFrame):
    both = pd.concat([table, table.assign(split="dev")])
    for statistic in (means, lambda rows: differences(rows, [("ABD", "FT")])):
        with pytest.raises(ValueError, match="a seed is there twice"):
            statistic(both)


def searched(*rows: tuple[str, str, float, float]) -> pd.DataFrame:
    """Rows of one seed: (attack, defence, CA, ASR)."""
    return pd.DataFrame(
        {
            "attack": a,
            "defence": d,
            "seed": 100,
            "metric": m,
            "value": v,
            "ci_low": v,
            "ci_high": v,
            "paper_value": np.nan,
        }
        for a, d, *values in rows
        for m, v in zip(("ca_top1", "asr"), values, strict=True)
    )


def test_the_rule_takes_the_lowest_asr_among_settings_that_lose_little_ca_over_all_attacks():
    rows = searched(
        ("BadNet", "none", 0.60, 0.9),
        ("Blended", "none", 0.62, 0.9),
        *(("BadNet", "FT, slow", 0.58, 0.40), ("Blended", "FT, slow", 0.59, 0.20)),
        *(("BadNet", "FT, quick", 0.52, 0.10), ("Blended", "FT, quick", 0.60, 0.10)),  # 5 points lost on average
        *(("BadNet", "FT, quicker", 0.52, 0.00), ("Blended", "FT, quicker", 0.59, 0.00)),
        ("BadNet", "FT, alone", 0.60, 0.00),
        *(("BadNet", "PAR, a", 0.40, 0.00), ("Blended", "PAR, a", 0.41, 0.00)),
        *(("BadNet", "PAR, b", 0.42, 0.30), ("Blended", "PAR, b", 0.41, 0.30)),
        *(("BadNet", "ABD", 0.60, 0.30), ("Blended", "ABD", 0.60, 0.30)),
    )
    average = averages(rows, rows["defence"].unique()[1:])
    assert set(average.index) == {"FT, slow", "FT, quick", "FT, quicker", "PAR, a", "PAR, b", "ABD"}
    assert average["lost"].to_dict() == pytest.approx(
        {"FT, slow": 0.025, "FT, quick": 0.05, "FT, quicker": 0.055, "PAR, a": 0.205, "PAR, b": 0.195, "ABD": 0.01}
    )
    assert chosen(average) == {"ABD": "ABD", "FT": "FT, quick", "PAR": "PAR, b"}


def test_the_grid_chosen_is_what_the_rule_takes_of_the_committed_search_where_that_is_not_the_default():
    rows = read_results(ResultsConfig().path)
    (seed,) = GRIDS["search"].seeds
    taken = chosen(averages(rows[rows["split"].eq("dev") & rows["seed"].eq(seed)], CANDIDATES))
    known = {name: label for name, label in taken.items() if name in (*RIVALS, *CONTROLS)}
    others = {
        label
        for name, label in known.items()
        if Cell("BadNet", label, 0, "eval").job() != Cell("BadNet", name, 0, "eval").job()
    }
    assert others == set(GRIDS["chosen"].defences)


def made(seeds: dict[str, tuple[float, ...]], paper: dict[str, float] | None = None) -> pd.DataFrame:
    """Rows of ASR on one attack from defence -> values by seed, and the paper's values."""
    rows = [
        {"attack": "BadNet", "defence": name, "seed": i, "metric": "asr", "value": v, "ci_low": v, "ci_high": v}
        for name, shares in seeds.items()
        for i, v in enumerate(shares)
    ]
    frame = pd.DataFrame(rows).assign(device="a processor")
    return frame.assign(paper_value=frame["defence"].map(paper or {}).astype(float))


@pytest.mark.parametrize(
    ("ours", "paper", "side", "verdict"),
    [
        ((0.10, 0.11, 0.12), {"ABD": 0.05, "FT": 0.66}, "lower", "agrees"),
        ((0.10, 0.11, 0.12), {"ABD": 0.66, "FT": 0.05}, "lower", "disagrees"),
        ((0.90, 0.91, 0.92), {"ABD": 0.66, "FT": 0.05}, "higher", "agrees"),
        ((0.90, 0.91, 0.92), {"ABD": 0.5, "FT": 0.5}, "higher", "disagrees"),
        ((0.40, 0.60, 0.50), {"ABD": 0.05, "FT": 0.66}, "too close to tell", "too close to tell"),
        ((0.10,), {"ABD": 0.05, "FT": 0.66}, "too few seeds", "too few seeds"),
        ((0.10, 0.11, 0.12), {"FT": 0.66}, "lower", ""),
    ],
)
def test_the_verdict_compares_the_paper_s_sign_with_the_side_of_zero_of_the_interval(ours, paper, side, verdict):
    (row,) = differences(made({"ABD": ours, "FT": (0.50, 0.51, 0.49)}, paper), [("ABD", "FT")]).itertuples()
    assert (row.side, row.verdict) == (side, verdict)


def test_sentences_say_the_claim_both_differences_and_the_verdict():
    grid = made({"none": (0.9, 0.9), "ABD": (0.10, 0.12), "FT": (0.5, 0.7)}, {"none": 0.9651, "ABD": 0.0536})
    result = differences(grid, [("ABD", "none"), ("ABD", "FT")])
    assert claims(result) == [
        "**agrees**: in the paper, on *BadNet*, ABD has a lower ASR than the victim "
        "(-91.15 points); here -79.0 [-91.7, -66.3] (seeds: 2)"
    ]
    assert findings(result) == [
        "ASR of ABD against that of the victim: **lower** on *BadNet* (seeds: 2)",
        "ASR of ABD against that of FT: **too close to tell** on *BadNet* (seeds: 2)",
    ]


def test_pairs_of_runs_from_two_machines_are_counted_and_told(grid: pd.DataFrame):
    moved = grid["defence"].eq("FT") & grid["seed"].gt(0) & grid["attack"].eq("WaNet")
    split = grid.assign(device=grid["device"].mask(moved, "another"))
    pairs = [("ABD", "FT"), ("ABD", "none")]
    for rows, expected in ((grid, 0), (split, 2)):
        table = differences(rows, pairs, ["asr"]).set_index(["against", "attack"])
        assert table.pop("two_machines").to_dict() == {
            (against, attack): expected if (against, attack) == ("FT", "WaNet") else 0
            for against, attack in itertools.product(("FT", "none"), ATTACKS)
        }
    pd.testing.assert_frame_equal(  # it is the same comparison, only told as what it is
        *(differences(rows, pairs).drop(columns="two_machines") for rows in (grid, split))
    )
    assert "of two machines" not in plots.difference_table(differences(grid, pairs))
    shown = plots.difference_table(differences(split, pairs))
    assert shown.loc[("ABD - FT", "WaNet", "ASR"), "of two machines"] == 2
    told = {line: line.count("on two machines") for line in findings(differences(split, pairs))}
    assert set(told.values()) == {0, 1}
    assert all(("(seeds: 3, 2 of them on two machines)" in line) == ("of FT:" in line) for line in told)


def test_a_run_on_the_other_s_machine_stands_in_for_one_of_another_machine(grid: pd.DataFrame):
    moved = grid["defence"].eq("FT") & grid["seed"].gt(0) & grid["attack"].eq("WaNet")
    split = grid.assign(device=grid["device"].mask(moved, "another"))
    ours = split["defence"].eq("ABD") & split["seed"].eq(2)
    again = split[ours].assign(device="another", value=split["value"] + 0.25)
    table = differences(split, [("ABD", "FT")], ["asr"], again=again).set_index("attack")
    plain = differences(grid, [("ABD", "FT")], ["asr"]).set_index("attack")
    others = [attack for attack in ATTACKS if attack != "WaNet"]  # on one machine as they are
    pd.testing.assert_frame_equal(table.loc[others], plain.loc[others])
    assert (plain.loc["WaNet", "seeds"], table.loc["WaNet", "two_machines"]) == (3, 1)
    assert table.loc["WaNet", "difference"] == pytest.approx(plain.loc["WaNet", "difference"] + 0.25 / 3)
    other_jobs = again.assign(run_id="of other settings")
    assert differences(split, [("ABD", "FT")], ["asr"], again=other_jobs).equals(
        differences(split, [("ABD", "FT")], ["asr"])
    )


def test_the_aims_are_checked_by_means_of_the_seeds_that_both_sides_have(grid: pd.DataFrame):
    rows = grid[(grid["defence"] != "CleanCLIP") | (grid["attack"] != "WaNet")]
    result = aims(rows, ["ABD", "FT"])
    assert set(result.index) == set(itertools.product(["ABD", "FT"], ATTACKS))
    table = plots.aims_table(result)
    for (defence, attack), row in result.iterrows():
        ca, asr = ({name: values(rows, attack, name, m) for name in DEFENCES} for m in ("ca_top1", "asr"))
        assert row["lost"] == pytest.approx((ca["none"] - ca[defence]).mean(), abs=1e-12)
        assert row["asr"] == pytest.approx(asr[defence].mean(), abs=1e-12)
        shown = table.loc[(defence, attack)]
        assert shown["at most 5 points of CA lost?"] == ("yes" if row["lost"] <= 0.05 else "no")
        for name in ("CleanCLIP", "PAR", "random erasing"):
            apart = (asr[defence] - asr[name]).dropna()  # PAR has but one seed here
            assert np.isnan(row[name]) == apart.empty
            told = "not measured" if apart.empty else "yes" if apart.mean() < 0 else "no"
            assert shown[f"ASR below {name}'s?"] == told
    assert {"yes", "no", "not measured"} <= set(table.to_numpy().ravel())
    assert plots.aims_table(aims(rows.iloc[:0], ["ABD"])).empty


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_the_pareto_front_is_that_of_brute_force(points: list[tuple[int, int]]):
    def beaten(point: tuple[int, int]) -> bool:
        return any(p != point and p[0] >= point[0] and p[1] <= point[1] for p in points)

    ca, asr = (np.array([point[i] for point in points], dtype=float) for i in (0, 1))
    assert pareto(ca, asr).tolist() == [not beaten(point) for point in points]


def test_the_front_is_taken_among_the_rivals_means_and_comes_by_clean_accuracy(grid: pd.DataFrame):
    rivals = ["none", "FT", "CleanCLIP", "ABD", "never measured"]
    xy = ("ca_top1", "asr")
    centre = {name: tuple(values(grid, "BadNet", name, metric).mean() for metric in xy) for name in rivals[:-1]}
    best = [
        name
        for name, (ca, asr) in centre.items()
        if not any(other[0] > ca and other[1] < asr for other in centre.values())
    ]
    result = front(grid, "BadNet", rivals)
    assert list(result.index) == sorted(best, key=lambda name: centre[name])
    assert [tuple(point) for point in result.to_numpy()] == [pytest.approx(centre[name]) for name in result.index]


# --- tables and figures ---------------------------------------------------------------------------------------


def test_the_table_has_means_over_seeds_beside_the_paper_s_values(grid: pd.DataFrame):
    shown = plots.table(grid, ["BadNet", "not run"], ["ABD", "PAR", "not run"])
    assert list(shown.index) == [("BadNet", "ABD"), ("BadNet", "PAR")]
    assert list(shown.columns) == ["CA", "CA, paper", "ASR", "ASR, paper"]
    assert shown.loc[("BadNet", "ABD"), "ASR"] == shown_mean(grid, "BadNet", "ABD", "asr")
    assert shown.loc[("BadNet", "ABD"), "ASR, paper"] == "5.00" and shown.loc[("BadNet", "PAR"), "ASR, paper"] == ""
    value = 100 * values(grid, "BadNet", "PAR", "ca_top1").item()
    assert shown.loc[("BadNet", "PAR"), "CA"] == f"{value:.1f} [{value - 5:.1f}, {value + 5:.1f}] (1)"


def test_single_runs_are_shown_with_the_interval_of_their_test_images(grid: pd.DataFrame):
    shown = plots.single_runs(grid, ["WaNet"], ["RoCLIP", "PAR"])
    value = 100 * values(grid, "WaNet", "RoCLIP", "asr")[2]
    assert shown.loc[("WaNet", "RoCLIP"), 2] == f"{value:.1f} [{value - 5:.1f}, {value + 5:.1f}]"
    assert shown.loc[("WaNet", "RoCLIP"), 0] == "" and shown.loc[("WaNet", "PAR"), 1] == ""


def test_times_are_medians_over_the_runs_that_have_one_by_machine(grid: pd.DataFrame):
    moved = grid.assign(device=grid["device"].mask(grid["attack"] == "WaNet", "another"))
    shown = plots.cost_table(moved, ["ABD"])
    for machine, made_there in {"another": grid["attack"] == "WaNet", "a processor": grid["attack"] != "WaNet"}.items():
        runs = grid[made_there & grid["defence"].eq("ABD")].groupby(["attack", "seed"])["seconds"].first()
        row = shown.loc[("ABD", f"{machine}, 2 threads")]
        assert row["runs"] == runs.notna().sum() < len(runs)
        assert row["median"] == round(np.nanmedian(runs), 1) and row["slowest"] == np.nanmax(runs)
    twice = plots.cost_table(pd.concat([grid, grid.assign(device="another")]), ["ABD"])
    assert len(twice) == 2 and twice["runs"].nunique() == 1


def test_the_plane_draws_means_the_paper_and_the_front_of_the_rivals(grid: pd.DataFrame):
    figure = plots.plane(grid, ["BadNet", "WaNet"], ["none", "FT", "ABD"], aside=["clean weights"], title="A plane")
    axes = figure.axes[0]
    drawn = [tuple(point) for line in axes.get_lines() for point in line.get_xydata()]
    for name, paper in {"ABD": (53, 5), "FT": (53, 66)}.items():
        mean = [100 * values(grid, "BadNet", name, metric).mean() for metric in ("ca_top1", "asr")]
        assert any(point == pytest.approx(tuple(mean)) for point in drawn)
        assert any(point == pytest.approx(paper) for point in drawn)
    dashed = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert dashed[0].get_xydata() == pytest.approx(100 * front(grid, "BadNet", ["none", "FT", "ABD"]).to_numpy())


def test_the_matrix_writes_each_mean_with_its_interval(grid: pd.DataFrame):
    figure = plots.matrix(grid, ["ABD", "PAR", "not run"], ["WaNet", "BadNet"], title="A matrix")
    written = [text.get_text() for text in figure.axes[0].texts]
    expected = []
    for defence, attack in itertools.product(("ABD", "PAR"), ("WaNet", "BadNet")):
        shares = 100 * values(grid, attack, defence, "asr").to_numpy()
        half = stats.t.ppf(0.975, 2) * stats.sem(shares) if len(shares) == 3 else None
        expected.append(f"{np.mean(shares):.0f}" + ("" if half is None else f" ± {half:.0f}"))
    assert written == expected


def test_replication_compares_machines_by_seed_and_seeds_by_machine(grid: pd.DataFrame):
    again = grid[grid["attack"].isin(["BadNet", "WaNet"]) & grid["seed"].lt(2)]
    noise = np.random.default_rng(5).normal(0, 0.05, len(again))
    again = again.assign(value=again["value"] + noise)[::-1]
    found = replication(grid, again)
    assert set(found.index) == set(itertools.product(["BadNet", "WaNet"], ["ca_top1", "asr"]))
    for (attack, metric), row in found.iterrows():
        moved, apart = [], []
        for defence in grid["defence"].unique():
            here, there = values(grid, attack, defence, metric), values(again, attack, defence, metric)
            moved += list((there - here).dropna())
            pairs = [(a - b) ** 2 for a, b in itertools.combinations(here, 2)]
            apart += [np.mean(pairs)] if pairs and len(there) else []
        assert row["runs"] == len(moved)
        assert row["bias"] == pytest.approx(np.mean(moved))
        assert row["machines"] == pytest.approx(np.sqrt(np.mean(np.square(moved))))
        assert row["seeds"] == pytest.approx(np.sqrt(np.mean(apart)))
    assert plots.replication_table(grid, again[:0]).empty


def test_the_forest_has_a_row_a_rival_and_its_points_are_the_differences(grid: pd.DataFrame):
    result = differences(grid, [("ABD", "none"), ("ABD", "FT")])
    axes = plots.forest(result, title="A forest").axes
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["none", "FT"]
    for panel in axes:
        metric = {"CA": "ca_top1", "ASR": "asr"}[panel.get_title()]
        drawn = {round(x, 6) for line in panel.get_lines() for x in np.asarray(line.get_xdata(), dtype=float)}
        assert {round(100 * d, 6) for d in result[result["metric"] == metric]["difference"]} <= drawn


def test_figures_and_tables_without_rows_say_so_and_do_not_fail(grid: pd.DataFrame):
    nothing = grid.iloc[:0]
    none = differences(nothing, [("ABD", "FT")])
    figures: list[Figure] = [
        plots.plane(nothing, [], ["ABD"], title="t"),
        plots.plane(grid, ["never run"], ["ABD"], title="t"),
        plots.forest(none, title="t"),
        plots.matrix(nothing, ["ABD"], ["BadNet"], title="t"),
        plots.costs(nothing, ["ABD"], title="t"),
    ]
    assert all(figure.axes[0].texts[0].get_text() == "no rows yet" for figure in figures)
    assert differences(grid, []).empty and list(differences(grid, []).columns) == list(none.columns)
    for shown in (plots.table(nothing, [], []), plots.difference_table(none), plots.cost_table(nothing, ["ABD"])):
        assert shown.empty
    assert plots.single_runs(nothing, [], []).empty and plots.bullets([]).data == "- not measured yet"


# --- the chapters -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "defence"), [("04_results", "CleanCLIP"), ("05_ablations", "noise patch")])
def test_a_value_changed_in_a_copy_of_the_table_changes_what_the_chapter_shows(table, name, defence, tmp_path):
    chosen = table["attack"].eq("BadCLIP") & table["defence"].eq(defence) & table["metric"].eq("asr")
    row = table.index[chosen & table["seed"].eq(1) & table["split"].eq("eval")].item()
    changed = table.copy()
    changed.loc[row, ["value", "ci_low", "ci_high"]] = [0.999, 0.998, 1.0]
    copy = write(changed, tmp_path / "copy.csv")
    notebook = run(name, {"results": str(copy)}, str(tmp_path / "out.ipynb"))
    shown = "".join(o.data.get("text/html", "") for o in outputs(notebook, "execute_result"))
    cells = [shown_mean(t[t["split"] == "eval"], "BadCLIP", defence, "asr") for t in (table, changed)]
    assert cells[0] not in shown and cells[1] in shown
    assert cells[1] in summary(tmp_path / "out.ipynb")
    untouched = shown_mean(table[table["split"] == "eval"], "BadCLIP", "ABD", "asr")
    assert untouched in shown


@pytest.mark.parametrize("split", ["eval", "dev"])
@pytest.mark.parametrize("name", ["04_results", "05_ablations"])
def test_the_chapters_cope_with_the_first_rows_of_a_grid(name: str, split: str, tmp_path: Path, capsys):
    rows = synthetic(("BadNet",), ("none", "ABD"), 1)
    copy = write(rows[rows["split"] == split], tmp_path / "grid.csv")
    parameters, *cells = [
        cell.source for cell in nbformat.read(BOOK / f"{name}.ipynb", 4).cells if cell.cell_type == "code"
    ]
    namespace: dict = {}
    for source in [parameters, f"results = {str(copy)!r}", *cells]:  # without a kernel, which takes its time to start
        exec(source, namespace)
    assert "Claims of the paper" in capsys.readouterr().out
    table = namespace["plots"].table(namespace["grid"], ["BadNet"], ["none", "ABD"])
    assert len(table) == (2 if split == "eval" else 0)


def test_the_dose_curve_has_a_point_for_each_share_at_the_mean_over_seeds():
    rows = [
        {"attack": attack, "defence": "none", "seed": seed, "metric": metric, "value": value + 0.1 * seed}
        for attack, value in {"SIG": 0.5, "SIG, rate 0.01": 0.1, "BadNet": 0.9}.items()
        for seed in (0, 1)
        for metric in ("asr", "ca_top1")
    ]
    table = pd.DataFrame(rows).assign(ci_low=0.0, ci_high=1.0, paper_value=np.nan)
    figure = plots.doses(table, rate=0.1, title="doses")
    for axes in figure.axes:
        (line,) = axes.get_lines()[:1]
        np.testing.assert_allclose(np.asarray(line.get_xdata(), dtype=float), [1, 10])
        np.testing.assert_allclose(np.asarray(line.get_ydata(), dtype=float), [15, 55])
        assert axes.get_legend_handles_labels()[1] == ["SIG"]  # BadNet has one dose only
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "10"]


def test_a_ratio_of_the_benchmarks_is_a_bar_and_its_interval_a_line_within_it():
    rows = [("a", "plain", 1.0, np.nan, np.nan), ("a", "ours", 2.0, 1.8, 2.1), ("b", "plain", 1.0, np.nan, np.nan)]
    rows += [("b", "ours", 3.0, np.nan, np.nan), ("b", "other", 0.5, 0.4, 0.7)]
    table = pd.DataFrame(rows, columns=["case", "variant", "ratio", "ratio_low", "ratio_high"])
    (axes,) = plots.speeds(table.assign(device="D", metric="step"), "step", title="t").axes
    *lines, one = axes.get_lines()
    assert set(one.get_xdata()) == {1}
    bars = {bar.get_width(): bar for bar in axes.patches if bar.get_width()}
    for line, ratio, ends in zip(lines, (2.0, 0.5), ([1.8, 2.1], [0.4, 0.7]), strict=True):
        assert list(line.get_xdata()) == ends
        y = line.get_ydata()
        assert y[0] == y[1] == pytest.approx(bars[ratio].get_y() + bars[ratio].get_height() / 2)


def test_each_of_eleven_variants_has_a_colour_of_its_own():
    table = pd.DataFrame({"variant": [f"v{i}" for i in range(11)], "ratio": 1.0}).assign(
        device="D", case="a", metric="step", ratio_low=np.nan, ratio_high=np.nan
    )
    (legend,) = plots.speeds(table, "step", title="t").legends
    assert len({handle.get_facecolor() for handle in legend.get_patches()}) == 11


def test_the_shares_are_the_ratios_a_bar_each_under_their_own_names():
    rows = [("a", "speed", 0.5), ("a", "CPU time", 0.75), ("b $", "speed", 1.25), ("b $", "start", np.nan)]
    table = pd.DataFrame(rows, columns=["variant", "metric", "ratio"]).assign(device="D")
    figure = plots.shares(table, {"speed": "clock", "CPU time": "cores"}, of="all", title="t")
    (axes,) = figure.axes
    bars = sorted(patch.get_width() for patch in axes.patches if patch.get_width())
    assert bars == [0.5, 0.75, 1.25] and axes.get_xlabel() == "share of all"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["D: a", r"D: b \$"]
    assert axes.get_legend_handles_labels()[1] == ["clock", "cores"]
    assert "no rows yet" in [text.get_text() for text in plots.shares(table, {}, of="", title="t").axes[0].texts]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "missing file"),
        (
            "benchmark,device\nperturb,CPU\n",
            "columns missing: case, metric, n, ratio, ratio_high, ratio_low, unit, value, variant",
        ),
        ("benchmark,device,case,variant,metric,value,unit,ratio,n\na,b,c,d,e,fast,ms,1,1\n", "fast"),
    ],
)
def test_a_table_of_benchmarks_that_is_none_is_refused(text: str | None, message: str, tmp_path: Path):
    path = tmp_path / "speed.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(AbdError, match=message):
        read_benchmarks(path)
