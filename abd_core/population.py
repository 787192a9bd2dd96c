"""A population of clean and poisoned CLIPs of the embedded benchmark, each audited: the verdict is calibrated on it.

    python -m abd_core.population                 # all that is missing in data/results/audit.csv, a row after each
    python -m abd_core.population --only 6 --list
    python -m abd_core.population --adaptive      # victims of the grid `adaptive`, in data/results/audit_adaptive.csv

Members are fine-tuned from the clean base, poisoned or not, by the attacker's own loop: seeds, lengths, attacks,
targets, doses and places differ. An interrupted population goes on where it stopped. A member's weights are removed
once it is audited, unless `--keep` is given or it was there before.
"""

from __future__ import annotations

import argparse
import csv
import functools
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from abd_core import models, suspicion
from abd_core.audit import AuditConfig, AuditInputs, audit, looked_at, observed_of, settings
from abd_core.config import AbdError, digest
from abd_core.data import CELL, class_names, load_pairs, rng
from abd_core.detectors import Decree
from abd_core.grid import GRIDS, Cell, command, pooled, read_cells
from abd_core.paths import Run, atomic, read_json, runs_dir, sha256, shown, versions
from abd_core.poison import PoisonConfig, further_triggers, planted, poison, poisoned_places
from abd_core.results import VICTIM
from abd_core.text import TEMPLATES
from abd_core.train import progress
from abd_core.triggers import TRIGGERS, load_trigger
from abd_core.verdict import MODES, STATISTICS, Calibration, adaptive_table, default_table, scored

SIZE = 40  # members of each kind
SEEDS = {"poisoned": 200, "clean": 300}  # of the first member; none that the grid tunes or reports on
SHORT: dict[str, Any] = {"batch_size": 64, "warmup_steps": 20}
RATES = (0.3, 0.2, 0.1)  # of poison, by turns of all attacks
LENGTHS = {"poisoned": (2, 3, 4), "clean": (1, 2, 3)}  # epochs
PLACES = ("own", "bottom-right", "centre", "top-right")
SUBSETS = (0, 2000, 4000)  # clean members see all pairs or some
REPEATING = 5  # each fifth clean member sees many pairs of one class
HALVES = ("choose", "report")
PLAIN = ("BadNet", "Blended")  # what the adaptive attacks are compared with
TRIED = (
    PoisonConfig(),
    PoisonConfig(attack="badclip"),
    PoisonConfig(**SHORT, attack="blended", target="turtle", rate=0.2, epochs=1, seed=201),
    PoisonConfig(**SHORT, attack="wanet", target="trumpet", rate=0.2, epochs=2, seed=202),
)
RATE_COLUMNS = ("asr", "ca_top1")
PAIR_COLUMNS = ("ap_misfit", "ap_gap", "ap_lid", "ap_crowding", "ap_chance")
SAMPLE = 1500  # training pairs of a victim that are ranked
FIGURES = (*STATISTICS, "difference", "head", "noise_drift", "drift_entropy")
COLUMNS = (
    *("member", "kind", "half", "attack", "target", "seed", "epochs", "rate", "pairs", "place"),
    *("asr", "ca_top1", "target_rank", "recovered_asr", "works"),
    *(f"{name}_{mode}" for mode in MODES for name in ("suspected", *FIGURES)),
    *("published_decree", *PAIR_COLUMNS),
    *("train_seconds", "audit_seconds", "device", "versions", "git_sha", "run_id"),
)


@dataclass(frozen=True)
class Member:
    """One model of the population; `half` says whether it chooses thresholds or reports on them.

    `label` is its name where it has one of its own.
    """

    number: int
    kind: str
    half: str
    config: PoisonConfig
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or f"{self.kind}-{self.number:02d}"

    def key(self, audited: AuditConfig) -> str:
        """Digest of its settings, the audit's and what both read: `run_id` of its row."""
        read = {
            "pairs": load_pairs(self.config.limit).digest,
            "clean": sha256(models.clean_weights()),
            "detectors": settings(audited.preset),
        }
        return digest({"poison": self.config.to_dict(), "audit": audited.to_dict(), "inputs": read})[:16]


def members(size: int = SIZE) -> list[Member]:
    """`size` of each kind, taking turns, with every attack in both halves.

    The first poisoned ones are those on which the detectors were tried out while they were made: they choose. What
    follows goes through all attacks, with other seeds, targets, places, doses and lengths. Clean ones see all pairs or
    fewer, and each `REPEATING`-th sees pairs of one class over and over: that is no backdoor either.
    """
    names, attacks = class_names(), [name for name, kind in TRIGGERS.items() if not kind.adaptive]
    poisoned = [("choose", config) for config in TRIED]
    for i in range(size - len(TRIED)):
        turn, attack = divmod(i, len(attacks))
        placed = "trigger_position" in TRIGGERS[attacks[attack]].settings
        config = PoisonConfig(
            **SHORT,
            attack=attacks[attack],
            target=names[(37 * i + 17) % len(names)],
            rate=RATES[turn % len(RATES)],
            epochs=LENGTHS["poisoned"][turn % 3],
            seed=SEEDS["poisoned"] + i,
            trigger_position=PLACES[turn % len(PLACES)] if placed else "own",
        )
        poisoned.append((HALVES[(i + turn + 1) % 2], config))
    clean = []
    for i in range(size):
        config = PoisonConfig(
            **SHORT,
            rate=0.0,
            epochs=LENGTHS["clean"][i // len(SUBSETS) % 3],
            limit=SUBSETS[i % len(SUBSETS)],
            seed=SEEDS["clean"] + i,
        )
        if i % REPEATING == REPEATING - 2:
            share, target = RATES[i // REPEATING % len(RATES)], names[(53 * i + 5) % len(names)]
            repeated = {"attack": "label-consistent", "untriggered": True, "target": target, "rate": share, "limit": 0}
            config = config.replace(**repeated)
        clean.append(config)
    found = []
    for i, (half, config) in enumerate(poisoned):
        found += [Member(i, "poisoned", half, config), Member(i, "clean", HALVES[i % 2], clean[i])]
    return found


def adaptive_members() -> list[Member]:
    """Victims of the grid `adaptive`, and of the attacks that those start from; none of them chooses anything."""
    attacks, seeds = GRIDS["adaptive"].attacks, GRIDS["adaptive"].seeds
    cells = [Cell(attack, VICTIM, seed, "eval") for attack in (*PLAIN, *attacks) for seed in seeds]
    return [Member(i, "poisoned", "report", cell.job().config, cell_name(cell)) for i, cell in enumerate(cells)]


def targets(config: PoisonConfig) -> list[str]:
    """All classes that an attack sends images to, the first trigger's first."""
    return [config.target, *(t.target for t in further_triggers(config, class_names(), resolution=CELL))]


def adaptive_verdicts(rows: pd.DataFrame, calibration: Calibration, mode: str) -> pd.DataFrame:
    """What the verdict makes of the adaptive victims, a row an attack.

    Args:
        rows: of `adaptive_table`, as `read_population` gives them.
        calibration: chosen on other models, of the same `mode`.

    Returns:
        index: the attack, in the order of `adaptive_members`; columns `victims`, `took` (ASR of at least a half), `ASR`
        (the mean of those), and of those `detected`, `named` (detected, and the class suspected most is one of the
        attacker's), and the means of `probability` and of `head`, which is no part of it and needs clean weights.
    """
    known = {member.name: targets(member.config) for member in adaptive_members()}
    places = {name: place for place, name in enumerate(known)}
    rows, records = rows.sort_values("member", key=lambda names: names.map(places)), []
    for attack, part in rows.groupby(rows["member"].str.replace(r", seed \d+$", "", regex=True), sort=False):
        judged = scored(part, calibration, mode)
        right = [row.suspected in known.get(row.member, [row.target]) for row in judged.itertuples()]
        records.append(
            {
                "attack": attack,
                "victims": len(part),
                "took": len(judged),
                "ASR": judged["asr"].mean(),
                "detected": int(judged["alarm"].sum()),
                "named": sum(alarm and hit for alarm, hit in zip(judged["alarm"], right, strict=True)),
                "probability": judged["probability"].mean(),
                "head": judged[f"head_{mode}"].mean(),
            }
        )
    columns = ["attack", "victims", "took", "ASR", "detected", "named", "probability", "head"]
    return pd.DataFrame(records, columns=columns).set_index("attack")


def cell_name(cell: Cell) -> str:
    return f"{cell.attack}, seed {cell.seed}"


def training_pairs(config: PoisonConfig, model: Run, count: int) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """A seeded sample of the pairs that a victim was trained on, as it first saw them.

    Returns:
        Images (N, 3, R, R) in [0, 1], captions, and which are poisoned, bool (N,).
    """
    pairs = load_pairs(config.limit)
    poisoned, image_of, caption_of = poisoned_places(pairs, config)
    source, numbers = rng(config.seed, "suspicion"), ["", *(f"-{i + 2}" for i in range(config.further_targets))]
    triggers = [load_trigger(model.file(f"trigger{number}.safetensors")) for number in numbers]
    drawn = torch.randperm(len(pairs), generator=source)[:count]
    chosen = poisoned[drawn]
    images = pairs.images(image_of[drawn], seed=config.seed, step=0)
    captions = pairs.captions(caption_of[drawn], seed=config.seed, epoch=0)
    captions = planted(
        triggers,
        drawn,
        chosen,
        images,
        captions,
        replaced=pairs.images(drawn[chosen], seed=config.seed, step=1),
        templates=TEMPLATES,
        source=source,
    )
    return images, captions, chosen


def ranked_pairs(config: PoisonConfig, model: Run, count: int = SAMPLE) -> dict[str, float]:
    """How well each of `suspicion.scores` ranks a victim's training pairs: `ap_<score>`, and `ap_chance`."""
    images, captions, poisoned = training_pairs(config, model, count)
    suspect = models.frozen(models.load(model.file("model.safetensors")))
    clean = models.frozen(models.load(models.clean_weights()))
    found = suspicion.scores(suspect, images, captions, reference=clean)
    values = suspicion.average_precisions(found, poisoned)
    return {f"ap_{name}": value for name, value in {**values, "chance": poisoned.float().mean().item()}.items()}


def make(member: Member, audited: AuditConfig) -> dict[str, Any]:
    """Train and audit one member: its row."""
    model = poison(member.config)
    weights = model.file("model.safetensors")
    inputs = AuditInputs(checkpoint=str(weights))
    run = audit(audited, inputs)
    found = ranked_pairs(member.config, model) if member.kind == "poisoned" else {}
    if member.half == "report" and not member.label:  # its rule is published too, and has nothing to choose
        found["published_decree"] = published_decree(audited, inputs)
    return row(member, model, run, audited, found)


def published_decree(audited: AuditConfig, inputs: AuditInputs) -> float:
    """DECREE's PL1 with its published settings, on what the audit looks at."""
    observed = observed_of(Path(inputs.checkpoint), *looked_at(audited, inputs))
    return Decree(**Decree.published).measure(observed, seed=audited.seed).numbers["pl1"]


def row(member: Member, model: Run, run: Run, audited: AuditConfig, found: Mapping[str, float]) -> dict[str, Any]:
    """What stands in the table of a member, from its training run, its audit and what was found beside that."""
    config, metrics = member.config, run.metrics
    environment = read_json(run.file("config.json"))["environment"]
    bad = member.kind == "poisoned"
    ranks = {name: rank for rank, name in enumerate(metrics["classes"], 1)}
    figures = {f"{name}_{mode}": metrics["statistics"][mode].get(name, "") for mode in MODES for name in FIGURES}
    return {
        "member": member.name,
        "kind": member.kind,
        "half": member.half,
        "attack": config.attack if bad else "",
        "target": config.target if bad else "",
        "seed": config.seed,
        "epochs": config.epochs,
        "rate": config.rate,
        "pairs": config.limit or len(load_pairs()),
        "place": config.trigger_position if bad else "",
        **{name: model.metrics["eval"][name]["value"] for name in RATE_COLUMNS},
        "target_rank": ranks.get(config.target, "") if bad else "",
        "recovered_asr": (metrics["recovered"]["asr"] or {"value": ""})["value"],
        "works": metrics["works"],
        **figures,
        **{f"suspected_{mode}": metrics["suspected"][mode] for mode in MODES},
        **{name: found.get(name, "") for name in ("published_decree", *PAIR_COLUMNS)},
        "train_seconds": model.metrics["seconds"],
        "audit_seconds": metrics["measuring_seconds"],
        "device": environment["device"],
        "versions": versions(environment),
        "git_sha": environment["git_sha"],
        "run_id": member.key(audited),
    }


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows at `path`, none where there is no such file. Raises AbdError where it is another kind of table."""
    return read_cells(path, COLUMNS, "population of audits")


def write_row(path: Path, made: dict[str, Any]) -> None:
    """Add a row, in the place of an older one of the same member; sorted by name."""
    table: dict[str, dict[str, Any]] = {old["member"]: dict(old) for old in read_rows(path)}
    table[made["member"]] = made
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table[name] for name in sorted(table))


def run(
    chosen: Sequence[Member],
    *,
    output: Path,
    keep: bool = False,
    processes: int = 1,
    audited: AuditConfig | None = None,
) -> list[str]:
    """Make and audit those of `chosen` that have no row of the present settings at `output`; a row after each.

    Args:
        keep: leave the members that this call trains in the run folders. (Those that it finds there stay anyway.)
        processes: members at a time, each in a process of its own with its share of the cores; this one writes.

    Returns:
        One line a member that failed.
    """
    audited = audited or AuditConfig()
    done = {row["run_id"] for row in read_rows(output)}
    left, failed = [member for member in chosen if member.key(audited) not in done], []
    found = {file.parent for file in runs_dir().glob("poison/*/metrics.json")}  # a member may be a chapter's victim
    total = len(chosen)
    with progress(stage="population", total=total, initial=total - len(left), unit="model") as bar:
        for member, made in pooled(functools.partial(make, audited=audited), left, processes):
            if isinstance(made, AbdError):
                failed.append(f"{member.name}: {made}")
            else:
                write_row(output, made)
                if not keep and (folder := poison(member.config).folder) not in found:
                    shutil.rmtree(folder)
            bar.update()
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m abd_core.population", description="Makes and audits many CLIPs.")
    parser.add_argument("--only", type=int, default=0, metavar="N", help="the first N members (all)")
    parser.add_argument("--adaptive", action="store_true", help="the grid's adaptive victims; they are kept")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="members at a time (1)")
    parser.add_argument("--list", action="store_true", help="show the members, and end")
    parser.add_argument("--keep", action="store_true", help="leave the members' run folders")
    parser.add_argument("--output", type=Path, metavar="CSV", help="the table (data/results/audit[_adaptive].csv)")
    given = parser.parse_args(arguments)
    if given.processes < 1:
        parser.error(f"--processes {given.processes}: >= 1 expected")
    chosen = (adaptive_members() if given.adaptive else members())[: given.only or None]
    if given.list:
        for member in chosen:
            print(member.name, member.half, member.config.to_dict())
        return 0
    output = given.output or (adaptive_table() if given.adaptive else default_table())
    failed = run(chosen, output=output, keep=given.keep or given.adaptive, processes=given.processes)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    print(f"{len(read_rows(output))} models: {shown(output)}")
    return 1 if failed else 0


if __name__ == "__main__":
    command(main)
