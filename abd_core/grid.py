"""Many stage runs through papermill, and one tidy table of their results: attacks x defences x seeds.

    python -m abd_core.grid --list                              # the grids and their size
    python -m abd_core.grid table1 ablations --processes 2      # makes what is missing, writes data/results/grid.csv

The tables below are meant to be edited: a label stands for parameters of `book/03_defend.ipynb`, a grid for labels and
seeds. What is registered in `TRIGGERS` and in `DEFENCES` has a label without further ado.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import itertools
import logging
import multiprocessing
import os
import re
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import papermill
import torch
from papermill.exceptions import PapermillExecutionError

from abd_core import defences, escape, inputs, triggers
from abd_core.adversary import AdversaryConfig, adversary
from abd_core.config import AbdError, Config, ConfigError, digest, unknown
from abd_core.defend import DefendConfig, defend
from abd_core.evaluate import EvaluateConfig, measure
from abd_core.notebook import add_parameters, given_parameters, stage_configs, stage_parameters
from abd_core.paths import (
    Run,
    atomic,
    data_dir,
    read_json,
    regular,
    root,
    runs_dir,
    sha256,
    shown,
    versions,
    write_json,
)
from abd_core.poison import PoisonConfig, poison
from abd_core.results import COLUMNS, CONTROLS, VICTIM
from abd_core.train import progress

# --- what can be run: labels -> parameters of book/03_defend.ipynb ----------------------------------------------------

PLACES = {"top left": "top-left", "bottom right": "bottom-right", "centre": "centre"}
# One open reading (README) or setting of ABD at a time; the label is "ABD, <reading>".
READINGS: dict[str, dict[str, Any]] = {
    "additive": {"mode": "additive"},
    "additive 0.06": {"mode": "additive", "magnitude": 0.06},
    "additive 0.12": {"mode": "additive", "magnitude": 0.12},
    "patch area 0.01": {"magnitude": 0.01},
    "patch area 0.06": {"magnitude": 0.06},
    "fixed placement": {"placement": "fixed"},
    "untrained patch": {"steps": 1},
    "clean images in Eq. (2)": {"backdoor_images": "clean"},
    "clean negatives": {"negatives": "clean"},
    "Eq. (2) turned round": {"backdoor_weight": -1.0},
    "without Eq. (2)": {"backdoor_weight": 0.0},
    "tau 0.07": {"tau": 0.07},
    "tau of the victim": {"tau": 0.0},
    "both views": {"view": "both"},
    "BatchNorm of the batch": {"batch_norm": "train"},
    "share 0.25": {"share": 0.25},
    "share 1": {"share": 1.0},
    "1 epoch": {"epochs": 1},
    "6 epochs": {"epochs": 6},
    "lr 2e-3, frozen BatchNorm": {"lr": 2e-3},
}
# The tuning grid: learning rates, with BatchNorm's statistics of the batch and of the victim, for every defence that
# trains; the label is "<defence>, lr <lr>[, frozen BatchNorm]".
LR = ("5e-4", "1e-3")
SEARCHED: dict[str, tuple[str, ...]] = {name: LR for name in ("ABD", "ABD-D", "ABD-D + T")}
SEARCHED |= {
    "FT": ("2.5e-4", "5e-4", "7.5e-4", "1e-3", "1.5e-3", "2e-3"),
    "CleanCLIP": ("1e-4", "2.5e-4", "5e-4", "7.5e-4", "1e-3"),
    "RoCLIP": ("1e-4", "2.5e-4", "5e-4", "1e-3"),
    "PAR": ("2.5e-4", "5e-4", "1e-3", "2e-3"),
    "random erasing": ("2.5e-4", "5e-4", "1e-3", "2e-3"),
}
# Each rival's own settings, at its default rate and statistics where the label names no others: as many settings in all
# as ABD has, of which the readings count (`CANDIDATES`).
BATCH, FROZEN = {"batch_norm": "train"}, {"batch_norm": "frozen"}
RIVALS_OWN: dict[str, dict[str, dict[str, Any]]] = {
    "FT": {f"weight decay {decay:g}": {"weight_decay": decay} for decay in (0.0, 0.3, 1.0)}
    | {f"warm-up {steps}": {"warmup_steps": steps} for steps in (0, 100)},
    "CleanCLIP": {f"in-modal weight {weight:g}": {"in_modal_weight": weight} for weight in (0.25, 0.5, 2.0, 4.0)}
    | {
        f"in-modal weight {weight:g}, BatchNorm of the batch": {"in_modal_weight": weight, **BATCH}
        for weight in (0.5, 2.0, 4.0)
    },
    "RoCLIP": {
        "matched in every epoch": {"match_every": 1},
        "matched in every epoch, lr 5e-4": {"match_every": 1, "lr": 5e-4},
        "matched in the last epoch": {"match_every": 3},
        "matched in the last epoch, lr 5e-4": {"match_every": 3, "lr": 5e-4},
        "matched in the last epoch, lr 5e-4, BatchNorm of the batch": {"match_every": 3, "lr": 5e-4, **BATCH},
        "bank of 256": {"bank": 256},
        "bank of 256, lr 5e-4": {"bank": 256, "lr": 5e-4},
        "bank of 1024": {"bank": 1024},
        "bank of 1024, lr 5e-4": {"bank": 1024, "lr": 5e-4},
    },
    # PAR loses more than five points of CA at every rate: does it keep them where it drives features less far apart?
    "PAR": {f"shift weight {weight:g}": {"shift_weight": weight} for weight in (0.05, 0.1, 0.15, 0.25)}
    | {"shift weight 0.15, frozen BatchNorm": {"shift_weight": 0.15, **FROZEN}}
    | {f"shift limit {limit:g}": {"shift_limit": limit} for limit in (0.25, 0.5, 1, 1.5)},
    "random erasing": {f"share {share:g} of images": {"erase_probability": share} for share in (0.25, 0.75, 1.0)}
    | {f"area up to {area:g}": {"erase_high": area} for area in (0.1, 0.2, 0.6)}
    | {
        f"share {share:g} of images, area up to {area:g}": {"erase_probability": share, "erase_high": area}
        for share, area in ((0.75, 0.2), (1.0, 0.1), (1.0, 0.2))
    },
}

ATTACKS: dict[str, dict[str, Any]] = {kind.title: {"attack": name} for name, kind in triggers.TRIGGERS.items()}
MOVED = {  # away from their own place
    f"{name}, bottom right": {**ATTACKS[name], "trigger_position": PLACES["bottom right"]}
    for name in ("BadNet", "BadCLIP")
}
ATTACKS |= MOVED
# How much poison do attacks without a patch need? More than the default for those that it plants least.
DOSES: dict[str, tuple[float, ...]] = {"Blended": (0.01, 0.03), "SIG": (0.01, 0.03)}
DOSES |= {"label-consistent": (0.01, 0.03, 0.2), "Blended-Text": (0.01, 0.03, 0.2)}
DOSED = {f"{name}, rate {rate:g}": {**ATTACKS[name], "poison_rate": rate} for name in DOSES for rate in DOSES[name]}
ATTACKS |= DOSED
QUIET = {"quiet_weight": 1.0}  # the attacker knows the defence: see abd_core.quiet
ATTACKS |= {
    "BadNet, quiet": {**ATTACKS["BadNet"], **QUIET},
    "BadNet, quiet 4": {**ATTACKS["BadNet"], "quiet_weight": 4.0},
    "BadNet-Frame, quiet": {**ATTACKS["BadNet-Frame"], **QUIET},
    "Blended, alpha 0.1": {**ATTACKS["Blended"], "blend_alpha": 0.1},
    "BadNet, four targets": {**ATTACKS["BadNet"], "further_targets": 3},
    "BadNet, four targets, rate 0.4": {**ATTACKS["BadNet"], "further_targets": 3, "poison_rate": 0.4},  # BadNet's each
}
DEFENCES: dict[str, dict[str, Any]] = {kind.title: {"defence": name} for name, kind in defences.DEFENCES.items()} | {
    "I + T": {"defence": "abd", "view": "clean", "eda": False},  # the paper's FT, with ABD's own settings of the loop
    "I_adv + T": {"defence": "abd", "eda": False},
    "I + T_eda": {"defence": "abd", "view": "clean"},
    "UAP + T": {"defence": "abd", "eda": False, "backdoor_weight": 0.0},  # the paper's Table III: AdvCLIP as it was
    "ABD-D + T": {"defence": "abd-d", "eda": False},
}
DEFENCES |= {f"ABD, {reading}": {**DEFENCES["ABD"], **changes} for reading, changes in READINGS.items()}
# The defender has the suspect and clean pairs: what stands in for the clean weights? "ABD, without Eq. (2)": nothing.
DEFENCES |= {
    "ABD, fine-tuned for clean": {**DEFENCES["ABD"], "adversary_normal": "fine-tuned"},
    "ABD, suspect for clean": {**DEFENCES["ABD"], "adversary_normal": "suspect"},
    "ABD-D, fine-tuned for clean": {**DEFENCES["ABD-D"], "normal": "fine-tuned"},
}
# Table I's ABD takes three readings that are not the paper's letter (chapter 4); this one takes none of them.
LITERAL = {**DEFENCES["ABD"], "mode": "additive", "batch_norm": "train"}
DEFENCES |= {
    "ABD, literal": LITERAL,
    "ABD, literal, 4400 steps": {**LITERAL, "steps": 4400},  # of the adversary: the paper's 20 passes over our pairs
    "Gaussian noise, BatchNorm of the batch": {**DEFENCES["Gaussian noise"], "batch_norm": "train"},
}
DEFENCES |= {f"ABD, patch {name}": {**DEFENCES["ABD"], "patch_place": place} for name, place in PLACES.items()}
DEFENCES |= {f"noise patch, {name}": {**DEFENCES["noise patch"], "patch_place": at} for name, at in PLACES.items()}
TUNING = {
    f"{name}, lr {lr}{suffix}": {**DEFENCES[name], "lr": lr, "batch_norm": statistics}
    for name, rates in SEARCHED.items()
    for statistics, suffix in {"train": "", "frozen": ", frozen BatchNorm"}.items()
    for lr in rates
}
TUNING |= {f"{name}, half of the batch": {**DEFENCES[name], "perturbed_share": 0.5} for name in ("ABD-D", "ABD-D + T")}
TUNING |= {
    f"{name}, {label}": {**DEFENCES[name], **changes}
    for name, own in RIVALS_OWN.items()
    for label, changes in own.items()
}
DEFENCES |= TUNING
# What the rule of the search (`results.chosen`) may take. Pairs and epochs are the same for all defences, the rate came
# after the search, and an adversary of one step is a control.
OPEN = tuple(name for name, changes in READINGS.items() if not {"share", "epochs", "lr", "steps"} & set(changes))
CANDIDATES = ("ABD", *TUNING, *(f"ABD, {reading}" for reading in OPEN))

# --- what is run together ---------------------------------------------------------------------------------------------

CLEAN = defences.CleanWeights.title
SEEDS = {"eval": range(100), "dev": range(100, 200)}  # split -> its seeds: nothing reported is of a seed tuned on


@dataclass(frozen=True)
class Grid:
    """Every attack against every defence, and against none, at every seed.

    Attributes:
        draws: the seeds of those attacks that do not have `seeds`.
        chooses: False where nothing can be chosen by the rows, those of victims and clean weights alone: they may be of
            the other split's seeds.

    Raises:
        ConfigError: a seed is not one of the split's, or `chooses` is False and a defence has settings to choose.
    """

    attacks: tuple[str, ...]
    defences: tuple[str, ...]
    seeds: Sequence[int]
    split: str = "eval"
    chooses: bool = True
    draws: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.chooses:
            if tuned := {*self.defences} - {CLEAN}:
                raise ConfigError(f"a grid that chooses nothing: {CLEAN!r} alone expected, not {min(tuned)!r}")
            return
        for seed in itertools.chain(self.seeds, *self.draws.values()):
            if seed not in SEEDS[self.split]:
                allowed = SEEDS[self.split]
                raise ConfigError(f"seed {seed} on split {self.split!r}: {allowed[0]} to {allowed[-1]} expected")

    def cells(self) -> list[Cell]:
        """In the order of the labels, the victim first."""
        names = (VICTIM, *self.defences)
        return [
            Cell(attack, name, seed, self.split)
            for attack in self.attacks
            for name in names
            for seed in self.draws.get(attack, self.seeds)
        ]


PAPER = ("BadNet", "Blended", "BadCLIP")
# The seeds of Table I and its kin: the first five with which each of these attacks takes (`poison.took`). What was
# tried and did not take is in data/results/not_taken, and chapter 4 shows it.
TAKEN = (0, 1, 2, 4, 5)
# The other attacks have the first three seeds with which they themselves take: 0 to 2, but for this one at any dose.
OTHERS_TAKEN = {label: (1, 2, 4) for label in ("Blended-Text", *DOSED) if label.startswith("Blended-Text")}
RIVALS = tuple(kind.title for kind in defences.DEFENCES.values() if kind.title not in CONTROLS)
ZOO = tuple(kind.title for kind in triggers.TRIGGERS.values() if kind.title not in PAPER and not kind.adaptive)
GRIDS: dict[str, Grid] = {
    "table1": Grid(PAPER, RIVALS, TAKEN),
    "ablations": Grid(PAPER, ("I + T", "I_adv + T", "I + T_eda", "ABD", "UAP + T"), TAKEN),  # Tables II and III
    "controls": Grid(PAPER, ("ABD", *CONTROLS), TAKEN),
    "places": Grid(
        ("BadNet", "BadCLIP", *MOVED),
        (
            *("FT", "CleanCLIP", "PAR", "ABD", "ABD-D", *CONTROLS),
            *(f"{name} {place}" for name in ("ABD, patch", "noise patch,") for place in PLACES),
        ),
        range(3),
    ),
    "zoo": Grid(ZOO, ("FT", "CleanCLIP", "PAR", "ABD", "ABD-D"), range(3), draws=OTHERS_TAKEN),
    # An attacker who knows ABD and the audit: no drift, no place, no single target for them to find.
    "adaptive": Grid(
        (
            *("BadNet, quiet", "BadNet, quiet 4", "BadNet-Frame", "BadNet-Frame, quiet", "BadNet-Scattered"),
            *("Blended, alpha 0.1", "BadNet, four targets", "BadNet, four targets, rate 0.4"),
        ),
        ("FT", "CleanCLIP", "PAR", "ABD", "ABD-D"),
        range(3),
    ),
    "doses": Grid((*DOSES, *DOSED), (), range(3), draws=OTHERS_TAKEN),
    # Victims on the other split's images as well: nothing is chosen by them, and twice the images say more closely what
    # clean accuracy an attack costs.
    "victims": Grid(PAPER, (CLEAN,), range(max(TAKEN) + 1), "dev", chooses=False),
    "zoo-victims": Grid((*ZOO, *MOVED), (), range(3), "dev", chooses=False, draws=OTHERS_TAKEN),
    "no-clean-weights": Grid(
        PAPER,
        (
            *("FT", "ABD", "ABD, fine-tuned for clean", "ABD, suspect for clean", "ABD, without Eq. (2)"),
            *("ABD-D", "ABD-D, fine-tuned for clean"),
        ),
        range(3),
    ),
    # Perturbations that abd_core.fig2 holds against the trigger, ABD's by the paper's letter among them; and rivals
    # without one, of which it measures what they leave of the target's own images.
    "fig2": Grid(
        PAPER,
        (
            *("ABD", "ABD, literal", "ABD, untrained patch", "ABD-D", "noise patch"),
            *("FT", "CleanCLIP", "RoCLIP", "PAR"),
        ),
        TAKEN,
    ),
    # What the rule of the search (chapter 5) takes, where that is another setting than the default.
    "chosen": Grid(
        PAPER,
        (
            *("ABD, patch area 0.01", "ABD-D, half of the batch"),
            *("FT, weight decay 1", "CleanCLIP, lr 7.5e-4, frozen BatchNorm", "RoCLIP, bank of 1024"),
            *("PAR, shift weight 0.15", "random erasing, share 0.75 of images"),
        ),
        TAKEN,
    ),
    # Has the paper's letter too short a search, and does its perturbation do more than noise of its strength?
    "letter": Grid(
        PAPER, ("ABD, literal", "ABD, literal, 4400 steps", "Gaussian noise, BatchNorm of the batch"), range(3)
    ),
    # ABD's defaults are chosen by these two, so they stay away from what is reported.
    "search": Grid(PAPER, tuple(TUNING), (100,), "dev"),
    "readings": Grid(
        PAPER,
        ("ABD", *(f"ABD, {reading}" for reading in READINGS), "ABD, lr 5e-4, frozen BatchNorm"),
        range(100, 103),
        "dev",
    ),
    "small": Grid(("BadNet",), ("FT", "ABD"), (0,)),
}

# --- from a cell to its jobs ------------------------------------------------------------------------------------------

STAGES: dict[str, type[Config]] = {"poison": PoisonConfig, "adversary": AdversaryConfig, "defend": DefendConfig}
NOTEBOOKS = {"poison": "01_poison", "adversary": "02_adversary", "defend": "03_defend"}


@dataclass(frozen=True)
class Cell:
    """One attack, one defence, one seed, measured on one split: a row a metric."""

    attack: str
    defence: str
    seed: int
    split: str

    def __str__(self) -> str:
        return f"{self.attack}, {self.defence}, seed {self.seed}"

    def job(self, common: Mapping[str, Any] | None = None) -> Job:
        """What makes it.

        Args:
            common: parameters of `book/03_defend.ipynb` for every cell, such as the data; the labels' own go first.

        Raises:
            ConfigError: a label is unknown, or its parameters are not allowed.
        """
        if self.attack not in ATTACKS:
            raise unknown("attack", self.attack, ATTACKS)
        if self.defence not in DEFENCES and self.defence != VICTIM:
            raise unknown("defence", self.defence, [VICTIM, *DEFENCES])
        own = {**ATTACKS[self.attack], **DEFENCES.get(self.defence, {}), "seed": self.seed}
        parameters = {**(common or {}), **own}
        attacker, searcher, defender = stage_configs(parameters, **STAGES)
        victim = Job("poison", attacker)
        if self.defence == VICTIM:
            return victim
        base = Job("adversary", searcher, victim) if defender.needs_perturbation else victim
        return Job("defend", defender, base, self.split)


@dataclass(frozen=True)
class Job:
    """One notebook to run: a victim, a perturbation or a defence.

    Attributes:
        stage: its own stage, and `config` that stage's settings.
        base: the job that it stands on.
        split: where a defended model is measured; a victim is measured on both.
    """

    stage: str
    config: Any
    base: Job | None = None
    split: str = ""

    def chain(self) -> list[Job]:
        """All that it stands on, upstream first, and itself."""
        return [*(self.base.chain() if self.base else []), self]

    @functools.cached_property
    def key(self) -> str:
        """Digest of all settings and of everything that is read: other defaults or other data make another job.

        It is the `run_id` of the table's rows. Machine and versions are not in it: they have columns of their own.
        """
        stages = {job.stage: job.config.key() for job in self.chain()}
        given = tuple((name, getattr(self.config, name)) for name in inputs.SHARED)
        read = _inputs(self.config.limit, given, inputs.clean_weights(self.config))
        return digest({"stages": stages, "split": self.split, "inputs": read})[:16]

    @property
    def record(self) -> Path:
        """Its results. A job that has them is done."""
        return folder() / f"{self.key}.json"

    def execute(self, title: str) -> None:
        """Run its notebook, and keep the executed one under a readable name.

        Raises:
            JobError: it failed; the text is one line.
        """
        name = NOTEBOOKS[self.stage]
        source = root() / "book" / f"{name}.ipynb"
        slug = re.sub(r"[^a-z0-9.]+", "-", title.lower()).strip("-")
        target = folder() / f"{name}-{slug}-{self.key}.ipynb"
        configs = {job.stage: job.config for job in self.chain()}
        try:
            parameters = stage_parameters(papermill.inspect_notebook(source), **configs)
            papermill.execute_notebook(source, target, parameters, progress_bar=False)
        except Exception as error:  # of many kinds: the notebook's own, a dead kernel, a full disk
            text = _line(error)
            if isinstance(error, PapermillExecutionError):
                text = f"{error.ename}: {error.evalue}".splitlines()[0]
            raise JobError(f"{text} ({shown(target)})") from error

    def call(self) -> None:
        """Run its stage in this process, without a notebook.

        Raises:
            JobError: it failed; the text is one line.
        """
        try:
            self.collect()
        except Exception as error:  # of many kinds, as in `execute`
            raise JobError(_line(error)) from None

    def runs(self) -> dict[str, Run]:
        """The runs of its stages, by stage, upstream first: loaded, or made where they are not there."""
        attacker, *later = self.chain()
        made = {"poison": poison(attacker.config)}
        weights, perturbation = made["poison"].file("model.safetensors"), None
        for job in later:
            if job.stage == "adversary":
                made["adversary"] = adversary(job.config, weights)
                perturbation = made["adversary"].file("perturbation.safetensors")
            else:
                made["defend"] = defend(job.config, weights, perturbation=perturbation)
        return made

    def collect(self) -> None:
        """Write the record. The runs that it takes from are loaded where the notebook has made them."""
        runs = self.runs()
        attacked, own, metrics = runs["poison"], runs[self.stage], dict[str, Any]()
        if self.stage == "poison":
            metrics = {split: attacked.metrics[split] for split in SEEDS}
        elif self.stage == "defend":
            weights, trigger = own.file("model.safetensors"), attacked.file("trigger.safetensors")
            on_split = EvaluateConfig(split=self.split, **inputs.test_inputs(self.config))
            metrics = {self.split: measure(weights, trigger=trigger, config=on_split).metrics}
        environment = read_json(own.file("config.json"))["environment"]
        record = {"run": own.name, "seconds": own.metrics["seconds"], "environment": environment}
        write_json(self.record, {**record, "metrics": metrics})


class JobError(AbdError):
    """A notebook of the grid failed."""


DIED = "a process died, perhaps for want of memory; what is done is kept: start again, with fewer --processes"


def _line(error: Exception) -> str:
    """Its kind and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def folder() -> Path:
    """Records and executed notebooks. Made if missing."""
    path = runs_dir() / "grid"
    path.mkdir(exist_ok=True)
    return path


@functools.cache
def _inputs(limit: int, given: tuple[tuple[str, Any], ...], clean: Path) -> dict[str, str]:
    """Digests of what the stages read besides their settings; `given` are the values of `inputs.SHARED`."""
    config = DefendConfig(limit=limit, **dict(given))
    tests = {split: inputs.test_set(config, split, clean).digest for split in SEEDS}
    return {"pairs": inputs.training_pairs(config, clean).digest, "clean": sha256(clean), **tests}


# --- the table --------------------------------------------------------------------------------------------------------

METRICS = ("ca_top1", "ca_top5", "asr", "asr_all", "ra")


def default_table() -> Path:
    """The committed table."""
    return data_dir() / "results" / "grid.csv"


def paper_values() -> dict[tuple[str, str, str], float]:
    """(attack, defence, metric) -> the ABD paper's value as a share, from `data/paper.csv`."""
    with (data_dir() / "paper.csv").open(newline="", encoding="utf-8") as f:
        rows = [row for row in csv.DictReader(f) if row["source"] == "ABD"]
    return {(row["attack"], row["defence"], row["metric"]): round(float(row["value"]) / 100, 6) for row in rows}


def rows(cell: Cell, job: Job, published: Mapping[tuple[str, str, str], float]) -> list[dict[str, Any]]:
    """The table's rows of a cell whose job has a record; values are shares in [0, 1], None where there is none."""
    record = read_json(job.record)
    made = record["environment"]
    origin = {
        "seconds": record["seconds"],
        "device": made["device"],
        "versions": versions(made),
        "git_sha": made["git_sha"],
        "run_id": job.key,
    }
    return [
        {
            **dataclasses.asdict(cell),
            "metric": metric,
            **record["metrics"][cell.split][metric],
            "paper_value": published.get((cell.attack, cell.defence, metric)),
            **origin,
        }
        for metric in METRICS
    ]


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows at `path`, none where there is no such file. Raises AbdError where it is another kind of table."""
    table = read_cells(path, COLUMNS, "table of the grid")
    if not all(row["seed"].isdecimal() for row in table):
        raise AbdError(f"{path}: not a table of the grid: a seed is no whole number")
    return table


def read_cells(path: Path, columns: Collection[str], kind: str) -> list[dict[str, str]]:
    """The rows of a CSV with these columns and no others, none where there is no such file.

    Raises:
        AbdError: it is another file, not a `kind`.
    """
    if not path.exists():
        return []
    regular(path)
    try:
        with path.open(newline="", encoding="utf-8") as f:
            reader = csv.DictReader(f)
            table = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise AbdError(f"{path}: not a {kind}: no CSV ({error})") from None
    whole = all(None not in row and None not in row.values() for row in table)  # no cell too many or too few
    if reader.fieldnames != list(columns) or not whole:
        raise AbdError(f"{path}: not a {kind}; its columns shall be {','.join(columns)}")
    return table


def write_table(path: Path, jobs: Mapping[Cell, Job]) -> None:
    """Put the rows of those cells that are done into the table at `path`; other rows in it stay as they are.

    A cell is done whose job has rows in the table, be it under another label, or a record. The rows of a job that is
    measured again stay the first ones, because other rows were compared with them.

    Raises:
        AbdError: the file there is another kind of table.
    """
    table: list[dict[str, Any]] = list(read_table(path))
    stored: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}  # (run_id, split) -> metric -> row
    for row in table:
        stored.setdefault((row["run_id"], row["split"]), {})[row["metric"]] = row
    published = paper_values()
    for cell, job in jobs.items():
        # Also where a victim was made again, perhaps on another machine, for a further defence.
        if found := stored.get((job.key, cell.split)):
            labels = dataclasses.asdict(cell)
            for metric, row in found.items():
                paper = published.get((cell.attack, cell.defence, metric), "")
                table.append({**row, **labels, "paper_value": paper})
        elif job.record.exists():
            table += rows(cell, job, published)
    latest = {(row["attack"], row["defence"], int(row["seed"]), row["split"], row["metric"]): row for row in table}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(COLUMNS), lineterminator="\n")
        writer.writeheader()
        for key in sorted(latest):
            writer.writerow({n: escape.cell(v) if isinstance(v, str) else v for n, v in latest[key].items()})


def undone(jobs: Mapping[Cell, Job], path: Path) -> dict[Cell, Job]:
    """Those cells that have neither a record nor rows in the table at `path`."""
    stored = {(row["run_id"], row["split"]) for row in read_table(path)}
    return {cell: job for cell, job in jobs.items() if (job.key, cell.split) not in stored and not job.record.exists()}


# --- running ----------------------------------------------------------------------------------------------------------


def run(
    cells: Iterable[Cell],
    *,
    processes: int = 1,
    notebooks: bool = True,
    output: Path | None = None,
    common: Mapping[str, Any] | None = None,
) -> list[str]:
    """Make what is missing of `cells`, and put the rows of all that are done into the table at `output`.

    A job starts once what it stands on is there, so that no two notebooks make the same thing. One that fails leaves
    out what stands on it; the others go on.

    Args:
        processes: notebooks at a time, each with its share of the cores, or with `OMP_NUM_THREADS` where that is set.
        notebooks: False calls the stages in as many processes of their own. It saves the start of a kernel and the
            figures for each job, which on a GPU take longer than the job itself; no executed notebook is left.
        output: default `data/results/grid.csv`; written after each job.
        common: parameters for every cell, see `Cell.job`.

    Returns:
        One line a failed job.

    Raises:
        ConfigError: a cell's labels or parameters are not allowed; nothing has been run then.
    """
    jobs = {cell: cell.job(common) for cell in cells}
    output = output or default_table()
    left = undone(jobs, output)
    missing: dict[Job, Cell] = {}  # and the first cell that needs it
    for cell, job in left.items():
        for part in job.chain():
            if not part.record.exists():
                missing.setdefault(part, cell)
    finished = {job for cell, job in jobs.items() if cell not in left}
    total = len(missing.keys() | finished)
    use_cores(processes)
    write_table(output, jobs)
    todo, failed, running = dict(missing), dict[Job, str](), dict[Future[None], Job]()
    pool: Executor = ThreadPoolExecutor(processes)  # a thread waits for its kernel, which is a process
    if not notebooks:
        pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"), initializer=_child)
    with progress(stage="grid", total=total, initial=total - len(missing), unit="job") as bar:
        try:
            while todo or running:
                unfinished = {*todo, *running.values()}
                for job in [job for job in todo if job.base not in unfinished]:
                    cell = todo.pop(job)
                    if job.base in failed:
                        failed[job] = ""
                    else:
                        started = (job.execute, title(job, cell)) if notebooks else (job.call,)
                        running[pool.submit(*started)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    try:
                        future.result()
                        if notebooks:
                            job.collect()
                        write_table(output, jobs)
                    except AbdError as error:
                        failed[job] = f"{NOTEBOOKS[job.stage]} of {title(job, missing[job])}: {error}"
                    except BrokenProcessPool:
                        raise JobError(DIED) from None
                    bar.update()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return [line for line in failed.values() if line]


def _child() -> None:
    """A pool's process shows no bars, as all share a terminal, and ends when its parent does, however that ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def pooled(make: Callable[[Any], Any], items: Sequence[Any], processes: int) -> Iterator[tuple[Any, Any | AbdError]]:
    """Each of `items` with what `make` returns for it, or with the error that it raises, as they get done.

    Args:
        processes: items at a time, each in a process of its own with its share of the cores.

    Raises:
        JobError: a process died.
    """
    if processes == 1:
        for item in items:
            yield item, _made(functools.partial(make, item))
        return
    use_cores(processes)  # the children take OMP_NUM_THREADS over
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"), initializer=_child)
    try:
        running = {pool.submit(make, item): item for item in items}
        for future in as_completed(running):
            yield running[future], _made(future.result)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _made(call: Callable[[], Any]) -> Any | AbdError:
    """What the call returns, or the error that it raises, in one line."""
    try:
        return call()
    except AbdError as error:
        return error
    except BrokenProcessPool:
        raise JobError(DIED) from None
    except Exception as error:  # of many kinds, as in `Job.execute`
        return JobError(_line(error))


def command(main: Callable[[], int]) -> None:
    """Run `main` and end the process: an AbdError is one line, and an interrupt loses nothing."""
    try:
        sys.exit(main())
    except AbdError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:  # kernels and other processes end when this one does
        print("\ninterrupted: what is done is kept", file=sys.stderr, flush=True)
        os._exit(130)


def title(job: Job, cell: Cell) -> str:
    """What to call a job that `cell` needs."""
    return f"{cell.attack}, seed {cell.seed}" if job.stage == "poison" else str(cell)


def use_cores(processes: int) -> None:
    """Let each of so many kernels, and this process, have its share of the cores."""
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    torch.set_num_threads(int(threads))
    logging.getLogger("papermill").setLevel(logging.ERROR)  # else it warns of settings that a notebook does not list


def select(
    names: Iterable[str],
    *,
    attacks: Sequence[str] = (),
    defences: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> list[Cell]:
    """The cells of the grids `names`, each once.

    Args:
        attacks, defences: only these labels, all if empty; the victims themselves always stay.
        seeds: these instead of the grids' own.

    Raises:
        ConfigError: a grid is unknown, none of the grids has a label, or a seed is not one of the split's.
    """
    grids = []
    for name in names:
        if name not in GRIDS:
            raise unknown("grid", name, GRIDS)
        grid = GRIDS[name]
        grids.append(dataclasses.replace(grid, seeds=seeds, draws={}) if seeds else grid)
    cells = list(dict.fromkeys(cell for grid in grids for cell in grid.cells()))
    for what, chosen in {"attack": attacks, "defence": defences}.items():
        known = {getattr(cell, what) for cell in cells}
        for label in chosen:
            if label not in known:
                raise unknown(f"{what} in these grids", label, known)
    return [
        cell
        for cell in cells
        if (not attacks or cell.attack in attacks) and (not defences or cell.defence in (VICTIM, *defences))
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m abd_core.grid", description="Runs grids, writes their results.")
    parser.add_argument("grids", nargs="*", metavar="grid", help=f"any of {', '.join(GRIDS)}")
    parser.add_argument("--list", action="store_true", help="show the grids and their size, and end")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="notebooks at a time (1)")
    parser.add_argument("--no-notebooks", action="store_true", help="call the stages themselves, for a GPU")
    parser.add_argument("--seeds", type=int, nargs="+", default=(), metavar="SEED", help="instead of the grids' own")
    parser.add_argument("--attacks", nargs="+", default=(), metavar="LABEL", help="only these of the grids' attacks")
    parser.add_argument("--defences", nargs="+", default=(), metavar="LABEL", help="only these of the grids' defences")
    parser.add_argument("--output", type=Path, metavar="CSV", help="the table (data/results/grid.csv)")
    add_parameters(parser)
    parser.add_argument("--job", metavar="KEY", help="run one job of any grid, and write no table")
    given = parser.parse_args(arguments)
    if given.list:
        for name, grid in GRIDS.items():
            sizes = (
                f"{len(grid.attacks)} attacks x {len(grid.defences)} defences + the victim x {len(grid.seeds)} seeds"
            )
            print(f"{name:10} {len(grid.cells()):4} cells on {grid.split}: {sizes}")
        return 0
    common = given_parameters(given.parameters, given.p)
    if given.job:
        run_one(select(GRIDS), given.job, common)
        return 0
    if not given.grids or given.processes < 1:
        parser.error("at least one grid" if not given.grids else f"--processes {given.processes}: >= 1 expected")
    cells = select(given.grids, attacks=given.attacks, defences=given.defences, seeds=given.seeds)
    if common and not given.output:
        raise ConfigError("parameters for every cell: --output expected, the committed table is of the defaults")
    output = given.output or default_table()
    failures = run(cells, processes=given.processes, notebooks=not given.no_notebooks, output=output, common=common)
    for line in failures:
        print(f"failed: {line}", file=sys.stderr)
    left = undone({cell: cell.job(common) for cell in cells}, output)
    print(f"{len(cells) - len(left)} of {len(cells)} cells are done: {shown(output)}")
    return 1 if failures else 0


def run_one(cells: Sequence[Cell], key: str, common: Mapping[str, Any] | None = None) -> None:
    """Run the job with this key, if it is not done; what it stands on has been made before.

    Raises:
        ConfigError: no cell needs such a job.
        JobError: it failed.
    """
    chains = {cell: cell.job(common).chain() for cell in reversed(cells)}
    jobs = {part.key: (part, cell) for cell, chain in chains.items() for part in chain}  # the first cell's name
    if key not in jobs:
        raise unknown("job", key, jobs)
    job, cell = jobs[key]
    use_cores(1)
    if not job.record.exists():
        job.execute(title(job, cell))
        job.collect()


if __name__ == "__main__":
    command(main)
