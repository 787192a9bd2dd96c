"""Fig. 2 over attacks and seeds: what chapter 6 measures of one run, of many, in one table.

    python -m abd_core.fig2 --processes 2    # what is missing in data/results/similarity.csv, rows after each victim

The cells are those of the grid `fig2`: attacks, seeds, and the defences whose changed images are held against the
attack's. Of a defence that has no perturbation of its own, only what it leaves of the target's own images is measured.
Runs are loaded, or made where they are not there. As in `similarity`, nothing of it reaches a defence.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from abd_core import inputs, models, results, similarity
from abd_core.config import AbdError, Config, ConfigError, option
from abd_core.data import class_index, rng
from abd_core.defences import ABDD, DEFENCES, DefendConfig, NoisePatch, noise_patch
from abd_core.disagreement import Disagreement
from abd_core.evaluate import image_features, prompt_features, rate, zero_shot_weights
from abd_core.generator import Perturbation
from abd_core.grid import ATTACKS, GRIDS, Cell, command, pooled
from abd_core.notebook import add_parameters, given_parameters
from abd_core.paths import Run, atomic, data_dir, read_json, shown, versions
from abd_core.results import VICTIM, half_width, read_rows
from abd_core.similarity import COMPARISONS, Change
from abd_core.train import progress
from abd_core.triggers import load_trigger

BASE, SUSPECT, DEFENDED = "clean base", "victim", "defended"
MOVED = "moved to the target, %"
OWN = "the target's own images recognised, %"
KEY = ("attack", "perturbation", "seed", "split", "model", "measure")
_LABEL, _NUMBER = results.COLUMNS["attack"], (results.number(-math.inf), "a number")
COLUMNS: results.Columns = {
    **{name: results.COLUMNS.get(name, _LABEL) for name in KEY},
    **dict.fromkeys(("value", "ci_low", "ci_high"), _NUMBER),
    **{name: results.COLUMNS[name] for name in ("n", "device", "versions", "git_sha", "run_id")},
}


def default_table() -> Path:
    """The committed table."""
    return data_dir() / "results" / "similarity.csv"


@dataclass(frozen=True, kw_only=True)
class Fig2Config(Config):
    """Which table of similarities a chapter shows."""

    similarities: str = option("", "path of a CSV that `abd_core.fig2` wrote; empty: the committed one")

    @property
    def path(self) -> Path:
        return Path(self.similarities) if self.similarities else default_table()


# --- one cell ---------------------------------------------------------------------------------------------------------


def changes(config: DefendConfig, runs: Mapping[str, Run], size: int) -> dict[str, Change]:
    """A defence's perturbations, for images of `size` px, by name: "" where it has one only; {} where none."""
    kind = DEFENCES[config.defence]
    if "adversary" in runs:
        return {"": Perturbation.load(runs["adversary"].file("perturbation.safetensors"))}
    if kind is ABDD:
        sides = (config.window_low, config.window_high)
        found = Disagreement.load(runs["defend"].file("found.safetensors"), sides)
        return {"window": functools.partial(found.show, generator=rng(config.seed, "fig2")), "field": found.add}
    if kind is NoisePatch:
        return {"": noise_patch(config, size)}
    return {}


def measure(cell: Cell, common: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """A cell's rows of the table: for each of its perturbations and each model, all measures.

    Where it has none: `OWN` of the defended model, under the defence's name.
    """
    job = cell.job(common)
    runs = job.runs()
    victim, defended = runs["poison"], runs["defend"]
    weights = {
        BASE: inputs.clean_weights(job.config),
        SUSPECT: victim.file("model.safetensors"),
        DEFENDED: defended.file("model.safetensors"),
    }
    trigger = load_trigger(victim.file("trigger.safetensors"))
    test = inputs.test_set(job.config, cell.split, weights[SUSPECT])
    target = class_index(test.class_names, trigger.target)
    environment = read_json(defended.file("config.json"))["environment"]
    origin = {"device": environment["device"], "versions": versions(environment), "git_sha": environment["git_sha"]}
    rows: list[dict[str, Any]] = []

    def add(table: pd.DataFrame, model: str, name: str = "") -> None:
        label = f"{cell.defence}, {name}" if name else cell.defence
        key = {"attack": cell.attack, "perturbation": label, "seed": cell.seed, "split": cell.split, "model": model}
        rows.extend({**key, **row, **origin, "run_id": job.key} for row in table.to_dict("records"))

    if not changes(job.config, runs, test.images.shape[-1]):
        weights = {DEFENDED: weights[DEFENDED]}
    for model, path in weights.items():
        encoder = models.load(path)
        prompts = prompt_features(encoder, test.class_names, test.templates)
        classifier = zero_shot_weights(encoder, test.class_names, test.templates)
        original = image_features(encoder, test)
        found = changes(job.config, runs, test.images.shape[-1])  # anew: places as for the others
        if not found:
            add(own_recognised(original, classifier, test.labels, target=target), model)
            continue
        plain = {"original": original, "backdoor": image_features(encoder, test, change=trigger)}
        for name, change in found.items():
            images = {**plain, "adversarial": image_features(encoder, test, change=change)}
            add(measures(images, prompts, classifier, test.labels, target=target, seed=cell.seed), model, name)
    return rows


def measures(
    images: Mapping[str, torch.Tensor],
    prompts: torch.Tensor,
    classifier: torch.Tensor,
    labels: torch.Tensor,
    *,
    target: int,
    seed: int,
) -> pd.DataFrame:
    """The analysis of `similarity` on one model, a row a number: `measure`, `value`, `ci_low`, `ci_high`, `n`.

    The pairings of Fig. 2 come under their names, 100 x cosine; then `similarity.shifts`; then
    `similarity.drift_measures`, as "adversarial: ..." and "backdoor: ..."; then `own_recognised`.

    Args:
        images: what `similarity.features` returns.
        prompts: of `evaluate.prompt_features`, (K, T, D).
        classifier: of `evaluate.zero_shot_weights`, (K, D).
        target: index of the target class.
    """
    cosines = similarity.cosines(images, prompts, labels, target=target, seed=seed)
    tables = [
        similarity.means(cosines).drop(columns="paper").rename(columns={"pairing": "measure"}),
        similarity.shifts(images, labels),
    ]
    answers = {kind: (features @ classifier.cpu().T).argmax(1) for kind, features in images.items()}
    for kind in ("adversarial", "backdoor"):
        drift = similarity.drift_measures(
            answers["original"], answers[kind], labels, classes=len(classifier), target=target
        )
        tables.append(drift.assign(measure=f"{kind}: " + drift["measure"]))
    tables.append(own_recognised(images["original"], classifier, labels, target=target))
    return pd.concat(tables, ignore_index=True)


def own_recognised(
    original: torch.Tensor, classifier: torch.Tensor, labels: torch.Tensor, *, target: int
) -> pd.DataFrame:
    """The target's own clean images that are given their class, as a row of `measures` (one cluster: a wide interval).

    No row where there are none.
    """
    own = labels == target
    if not own.any():
        return pd.DataFrame()
    found = rate((original[own] @ classifier.cpu().T).argmax(1) == target, labels[own])
    shares = {"value": 100 * found.value, "ci_low": 100 * found.ci_low, "ci_high": 100 * found.ci_high}
    return pd.DataFrame([{"measure": OWN, **shares, "n": found.n}])


# --- the table --------------------------------------------------------------------------------------------------------


def read(path: Path) -> pd.DataFrame:
    """The rows at `path`, columns as in `COLUMNS`; attacks in the order of the grid's labels.

    Raises:
        RunError: the file is missing or no CSV text.
        ResultsError: as `results.read_rows`.
    """
    table = pd.DataFrame(read_rows(path, COLUMNS, key=KEY).values())
    ranks = {name: rank for rank, name in enumerate(ATTACKS)}
    return table.sort_values(
        "attack", key=lambda names: names.map(ranks).fillna(len(ranks)), kind="stable", ignore_index=True
    )


def _written(path: Path) -> list[dict[str, Any]]:
    return read(path).to_dict("records") if path.exists() else []


def run(
    cells: Iterable[Cell], *, output: Path, processes: int = 1, common: Mapping[str, Any] | None = None
) -> list[str]:
    """Measure those of `cells` that have no rows of the present settings at `output`; written after each victim.

    Args:
        processes: victims at a time, each with its share of the cores.
        common: parameters for every cell, see `Cell.job`.

    Returns:
        One line a victim that failed.
    """
    jobs = {cell: cell.job(common) for cell in cells if cell.defence != VICTIM}
    written = _written(output)
    done = {row["run_id"] for row in written}
    victims: dict[tuple[str, int], list[Cell]] = {}  # (attack, seed) -> what is missing of it
    for cell, job in jobs.items():
        if job.key not in done:
            victims.setdefault((cell.attack, cell.seed), []).append(cell)
    left, failed = sum(map(len, victims.values())), []
    with progress(stage="fig2", total=len(jobs), initial=len(jobs) - left, unit="cell") as bar:
        for group, made in pooled(functools.partial(measured, common=common), list(victims.values()), processes):
            if isinstance(made, AbdError):
                failed.append(f"{group[0].attack}, seed {group[0].seed}: {made}")
            else:
                written += made
                write(output, written)
            bar.update(len(group))
    return failed


def measured(cells: Sequence[Cell], common: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The rows of several cells that share a victim, which only one process shall make."""
    return [row for cell in cells for row in measure(cell, common)]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows, sorted; of those of one cell, perturbation, model and measure the last."""
    latest = {tuple(row[name] for name in KEY): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(latest[place] for place in sorted(latest))


# --- over seeds -------------------------------------------------------------------------------------------------------


def beyond_base(table: pd.DataFrame) -> pd.DataFrame:
    """The victim's values minus the clean base's, of the same images: what the poisoning has added; rows as before."""
    key = ["attack", "perturbation", "seed", "measure"]
    both = [table[table["model"] == model].set_index(key)["value"] for model in (SUSPECT, BASE)]
    return (both[0] - both[1]).dropna().reset_index().assign(model=f"{SUSPECT} - {BASE}")


def orders(table: pd.DataFrame) -> pd.DataFrame:
    """The comparisons of Fig. 2, `similarity.COMPARISONS`: rows whose measure is "A > B" and value A's minus B's."""
    wide = table.pivot_table("value", ["attack", "perturbation", "seed", "model"], "measure", sort=False)
    found = {f"{higher} > {lower}": wide[higher] - wide[lower] for higher, lower in COMPARISONS}
    return pd.DataFrame(found).melt(var_name="measure", ignore_index=False).dropna().reset_index()


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds: a row an attack, perturbation, model and measure, in the order of the table.

    Returns:
        these four, `value` (the mean), `ci_low` and `ci_high` (t-interval over the seeds, NaN for a single one) and
        `seeds` (their number).
    """
    key = ["attack", "perturbation", "model", "measure"]
    found = table.groupby(key, sort=False)["value"].agg(["mean", "std", "count"]).reset_index()
    half = half_width(found["std"], found["count"])
    found = found.assign(value=found["mean"], ci_low=found["mean"] - half, ci_high=found["mean"] + half)
    return found.rename(columns={"count": "seeds"})[[*key, "value", "ci_low", "ci_high", "seeds"]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m abd_core.fig2", description="Fig. 2 over attacks and seeds.")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="victims at a time (1)")
    parser.add_argument("--output", type=Path, metavar="CSV", help="the table (data/results/similarity.csv)")
    add_parameters(parser)
    given = parser.parse_args(arguments)
    if given.processes < 1:
        parser.error(f"--processes {given.processes}: >= 1 expected")
    common = given_parameters(given.parameters, given.p)
    if common and not given.output:
        raise ConfigError("parameters for every cell: --output expected, the committed table is of the defaults")
    output = given.output or default_table()
    failed = run(GRIDS["fig2"].cells(), output=output, processes=given.processes, common=common)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    print(f"{len(_written(output))} rows: {shown(output)}")
    return 1 if failed else 0


if __name__ == "__main__":
    command(main)
