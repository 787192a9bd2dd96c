"""Fig. 2 over attacks and seeds: what is measured of a cell, its table, and the means over seeds."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import torch
from conftest import ARCHITECTURE, ROOT
from scipy import stats

from abd_core import fig2, grid, models, plots, similarity
from abd_core.config import ConfigError
from abd_core.defences import NoisePatch
from abd_core.disagreement import Disagreement
from abd_core.evaluate import image_features, zero_shot_weights
from abd_core.fig2 import BASE, DEFENDED, MOVED, OWN, SUSPECT, beyond_base, orders, over_seeds
from abd_core.generator import Perturbation
from abd_core.grid import GRIDS, Cell
from abd_core.paths import RunError
from abd_core.similarity import COMPARISONS, PAIRINGS
from abd_core.train import Step
from abd_core.triggers import load_trigger

COMMON = {"limit": 256, "poison_epochs": 1, "epochs": 1}
SMALL = {
    "ABD": {"defence": "abd", "steps": 2, "width": 16},
    "ABD-D": {"defence": "abd-d", "search_steps": 2},
    "noise patch": {"defence": "noise-patch"},
    "FT": {"defence": "ft"},
}
CELLS = [Cell("BadNet", name, 0, "eval") for name in ("none", "ABD", "ABD-D", "noise patch")]
IMAGES = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, stand_in: Path) -> Path:
    monkeypatch.setattr(grid, "DEFENCES", SMALL)
    monkeypatch.setattr(models, "save", functools.partial(models.save, name=ARCHITECTURE))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return stand_in


def test_the_table_has_each_perturbation_on_each_model_and_goes_on_where_it_stopped(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "similarity.csv"
    assert fig2.run(CELLS[:2], output=output, common=COMMON) == []
    first = fig2.read(output)
    assert fig2.run(CELLS, output=output, common=COMMON) == []
    table = fig2.read(output)
    assert set(table["perturbation"]) == {"ABD", "ABD-D, window", "ABD-D, field", "noise patch"}
    names = {*PAIRINGS, "cosine of the mean shifts", f"adversarial: {MOVED}", f"backdoor: {MOVED}"}
    for _, part in table.groupby("perturbation"):
        assert set(part["model"]) == {BASE, SUSPECT, DEFENDED}
        assert all(set(own["measure"]) >= names for _, own in part.groupby("model"))
    key = ["perturbation", "model", "measure"]
    assert not table.duplicated(key).any()
    assert (table["ci_low"] <= table["value"]).all() and (table["value"] <= table["ci_high"]).all()
    assert table["run_id"].nunique() == 3 and table["git_sha"].notna().all()
    pd.testing.assert_frame_equal(first, table[table["perturbation"] == "ABD"].reset_index(drop=True))
    monkeypatch.setattr(fig2, "measured", pytest.fail)
    assert fig2.run(CELLS, output=output, common=COMMON) == []


def test_the_share_that_moves_to_the_target_is_that_of_answers_counted_one_by_one(small: Path, tmp_path: Path):
    rows = pd.DataFrame(fig2.measure(CELLS[1], COMMON)).set_index(["model", "measure"])["value"]
    runs = CELLS[1].job(COMMON).runs()
    trigger = load_trigger(runs["poison"].file("trigger.safetensors"))
    perturbation = Perturbation.load(runs["adversary"].file("perturbation.safetensors"))
    test = fig2.inputs.test_set(CELLS[1].job(COMMON).config, "eval", small / "base.safetensors")
    for model, path in {BASE: small / "base.safetensors", SUSPECT: runs["poison"].file("model.safetensors")}.items():
        encoder = models.load(path)
        classifier = zero_shot_weights(encoder, test.class_names, test.templates)
        for kind, change in {"adversarial": perturbation, "backdoor": trigger}.items():
            answers = [(image_features(encoder, test, change=c) @ classifier.T).argmax(1) for c in (None, change)]
            target = test.class_names.index("banana")
            moved = [new == target and new != old for old, new in zip(*answers, strict=True)]
            assert rows[model, f"{kind}: {MOVED}"] == pytest.approx(100 * sum(map(int, moved)) / len(test))
            own = [old == target for old, label in zip(answers[0], test.labels, strict=True) if label == target]
            assert own and rows[model, OWN] == pytest.approx(100 * sum(map(int, own)) / len(own))


def test_the_changes_are_those_that_the_defences_train_on(small: Path):
    runs = {cell.defence: cell.job(COMMON).runs() for cell in CELLS[1:]}
    configs = {cell.defence: cell.job(COMMON).config for cell in CELLS[1:]}
    stored = Perturbation.load(runs["ABD"]["adversary"].file("perturbation.safetensors"))
    assert torch.equal(fig2.changes(configs["ABD"], runs["ABD"], 64)[""](IMAGES), stored(IMAGES))

    pairs = grid.inputs.training_pairs(configs["noise patch"], small / "base.safetensors")
    trained = NoisePatch(configs["noise patch"], pairs).perturb(IMAGES, Step(0, 0, torch.arange(6)))
    shown = fig2.changes(configs["noise patch"], runs["noise patch"], 64)[""](IMAGES)
    pasted = [{tuple(p) for p in (new != IMAGES).nonzero()[:, 2:].tolist()} for new in (trained, shown)]
    assert all(pasted) and trained[trained != IMAGES].unique().tolist() == shown[shown != IMAGES].unique().tolist()

    found = Disagreement.load(runs["ABD-D"]["defend"].file("found.safetensors"), (1 / 8, 3 / 8))
    both = fig2.changes(configs["ABD-D"], runs["ABD-D"], 64)
    assert torch.equal(both["field"](IMAGES), (IMAGES + found.field).clamp(0, 1))
    window = both["window"](IMAGES)
    inside = window != IMAGES
    assert inside.any() and torch.equal(window[inside], found.window.expand_as(IMAGES)[inside])
    sides = inside.any(1).any(1).sum(1)
    assert ((sides >= 7) & (sides <= 24)).all()  # of 64 px: an eighth to three eighths

    again = fig2.changes(configs["ABD-D"], runs["ABD-D"], 64)["window"]  # as for each model
    assert torch.equal(again(IMAGES), window) and not torch.equal(again(IMAGES), window)


def test_a_perturbation_without_a_measure_has_no_mean_of_it():
    rows = [
        {"attack": "BadNet", "perturbation": name, "seed": seed, "model": DEFENDED, "measure": measure, "value": 1.0}
        for name, measures in {"ABD": [*PAIRINGS, OWN], "FT": [OWN]}.items()
        for measure in measures
        for seed in (0, 1)
    ]
    found = over_seeds(orders(pd.DataFrame(rows)))
    assert set(found["perturbation"]) == {"ABD"} and found["value"].notna().all()
    missing = over_seeds(pd.DataFrame([*rows, {**rows[-1], "seed": 2, "value": math.nan}]))
    assert missing.set_index(["perturbation", "measure"]).loc[("FT", OWN), "seeds"] == 2


def test_of_a_defence_without_a_perturbation_only_the_target_s_own_images_are_seen(small: Path):
    cell = Cell("BadNet", "FT", 0, "eval")
    (row,) = fig2.measure(cell, COMMON)
    assert (row["perturbation"], row["model"], row["measure"]) == ("FT", DEFENDED, OWN)
    model = models.load(cell.job(COMMON).runs()["defend"].file("model.safetensors"))
    test = fig2.inputs.test_set(cell.job(COMMON).config, "eval", small / "base.safetensors")
    target = test.class_names.index("banana")
    classifier = zero_shot_weights(model, test.class_names, test.templates)
    answers = (image_features(model, test) @ classifier.cpu().T).argmax(1)[test.labels == target]
    assert row["n"] == len(answers) > 0 and row["value"] == pytest.approx(100 * (answers == target).float().mean())


@pytest.mark.parametrize("processes", [1, 2])
def test_a_victim_that_fails_is_named_and_leaves_the_others(
    processes: int, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fig2, "measured", stood_in)
    cells = [Cell("BadNet", "ABD", seed, "eval") for seed in range(3)]
    output = tmp_path / "similarity.csv"
    assert fig2.run(cells, output=output, processes=processes, common=COMMON) == ["BadNet, seed 1: no luck"]
    assert fig2.read(output)["seed"].tolist() == [0, 2]


def stood_in(cells: list[Cell], common: dict) -> list[dict]:
    """In the place of `fig2.measured`, also in a process of its own."""
    if cells[0].seed == 1:
        raise RunError("no luck")
    numbers = {"seed": cells[0].seed, "value": 0.5, "ci_low": 0.0, "ci_high": 1.0, "n": 3}
    return [dict.fromkeys(fig2.COLUMNS, "x") | {"split": "eval"} | numbers]


def rows(values: dict[tuple[str, str], list[float]]) -> pd.DataFrame:
    """(model, measure) -> values by seed, as rows of one attack and perturbation."""
    return pd.DataFrame(
        [
            {"attack": "BadNet", "perturbation": "ABD", "seed": i, "model": model, "measure": measure, "value": value}
            for (model, measure), series in values.items()
            for i, value in enumerate(series)
        ]
    )


def test_means_over_seeds_have_the_t_interval_of_scipy():
    values = [3.0, 5.0, 10.0]
    (row,) = over_seeds(rows({(SUSPECT, "m"): values})).to_dict("records")
    low, high = stats.t.interval(0.95, 2, loc=6.0, scale=stats.sem(values))
    assert (row["value"], row["ci_low"], row["ci_high"], row["seeds"]) == pytest.approx((6.0, low, high, 3))
    (row,) = over_seeds(rows({(SUSPECT, "m"): [4.0]})).to_dict("records")
    assert row["value"] == 4.0 and math.isnan(row["ci_low"]) and math.isnan(row["ci_high"])


def test_the_table_to_read_has_means_half_intervals_and_the_number_of_seeds():
    found = over_seeds(rows({(SUSPECT, "m"): [3.0, 5.0, 10.0], (BASE, "m"): [4.04], (SUSPECT, "other"): [1.0, 1.0]}))
    shown = plots.seeds_table(found, index=["measure"])
    half = stats.t.interval(0.95, 2, loc=6.0, scale=stats.sem([3.0, 5.0, 10.0]))[1] - 6
    assert shown.loc["m"].to_dict() == {SUSPECT: f"6.0 ± {half:.1f} (3)", BASE: "4.0 (1)"}
    assert shown.loc["other"].to_dict() == {SUSPECT: "1.0 ± 0.0 (2)", BASE: ""}
    both = plots.seeds_table(found, index=["attack", "measure"], digits=2)
    assert list(both.index) == [("BadNet", "m"), ("BadNet", "other")] and both.iloc[0][BASE] == "4.04 (1)"


def test_attacks_come_in_the_order_of_the_grid(tmp_path: Path):
    path, one = tmp_path / "similarity.csv", stood_in([Cell("x", "ABD", 0, "eval")], {})[0]
    fig2.write(path, [{**one, "attack": name} for name in ("another", "BadCLIP", "BadNet")])
    assert fig2.read(path)["attack"].tolist() == ["BadNet", "BadCLIP", "another"]


def test_what_the_poisoning_adds_is_taken_seed_by_seed():
    table = rows({(SUSPECT, "m"): [9.0, 7.0], (BASE, "m"): [1.0, 4.0], (SUSPECT, "alone"): [1.0, 1.0]})
    found = beyond_base(table)
    assert found[["seed", "measure", "value"]].values.tolist() == [[0, "m", 8.0], [1, "m", 3.0]]
    assert set(found["model"]) == {f"{SUSPECT} - {BASE}"}


def test_the_papers_order_is_compared_seed_by_seed():
    values = {(SUSPECT, name): [float(i), 2.0 * i] for i, name in enumerate(PAIRINGS)}
    found = orders(rows(values)).set_index(["measure", "seed"])["value"]
    places = {name: i for i, name in enumerate(PAIRINGS)}
    assert len(found) == 2 * len(COMPARISONS)
    for higher, lower in COMPARISONS:
        assert found[f"{higher} > {lower}", 1] == 2 * (places[higher] - places[lower])


def over_attacks_and_seeds(path: Path) -> pd.DataFrame:
    """The first table of that section of chapter 6, by the section's own cells."""
    cells = nbformat.read(ROOT / "book" / "06_similarity.ipynb", 4).cells
    titles = [cell.source.split("\n")[0] for cell in cells]
    own = cells[titles.index("## Over attacks and seeds") : titles.index("## Summary")]
    namespace = {"over": fig2.Fig2Config(similarities=str(path)), "pd": pd, "plt": plt, "plots": plots}
    namespace["similarity"] = similarity
    for cell in own:
        if cell.cell_type == "code":
            exec(cell.source, namespace)
    plt.close("all")
    return namespace["over_table"]


def test_a_value_changed_in_a_copy_of_the_table_changes_what_chapter_6_shows(tmp_path: Path):
    table = fig2.read(fig2.default_table())
    cell = {"attack": "BadNet", "perturbation": "ABD", "seed": 1, "model": SUSPECT, "measure": f"adversarial: {MOVED}"}
    (row,) = table.index[(table[list(cell)] == pd.Series(cell)).all(axis=1)]
    changed = table.copy()
    changed.loc[row, ["value", "ci_low", "ci_high"]] = [50.0, 49.0, 51.0]
    fig2.write(tmp_path / "copy.csv", changed.to_dict("records"))
    shown, other = over_attacks_and_seeds(fig2.default_table()), over_attacks_and_seeds(tmp_path / "copy.csv")
    apart = (shown != other).stack()
    assert set(apart[apart].index) == {("BadNet", "ABD", SUSPECT), ("BadNet", "ABD", f"{SUSPECT} - {BASE}")}
    of_seeds = changed[(changed[list(cell)].drop(columns="seed") == pd.Series(cell).drop("seed")).all(axis=1)]["value"]
    assert other.loc[("BadNet", "ABD"), SUSPECT].startswith(f"{of_seeds.mean():.1f} ± ")


def test_the_committed_table_is_not_written_with_other_parameters():
    with pytest.raises(ConfigError, match="--output expected"):
        fig2.main(["-p", "limit", "64"])


def test_the_grid_fig2_is_of_the_evaluation_seeds():
    assert GRIDS["fig2"].split == "eval" and len(GRIDS["fig2"].seeds) >= 3
