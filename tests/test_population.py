"""The population that verdicts are calibrated on: who is in it, its table, and that it goes on where it stopped."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import ARCHITECTURE
from test_audit import CHEAP
from test_verdict import population as rows_of_models

from abd_core import audit as audit_module
from abd_core import models, population
from abd_core.audit import AuditConfig
from abd_core.config import AbdError
from abd_core.detectors import Decree
from abd_core.grid import GRIDS, SEEDS
from abd_core.paths import RunError
from abd_core.poison import poison, poisoned_places
from abd_core.population import HALVES, Member, adaptive_members, members, read_rows, targets, training_pairs
from abd_core.text import TEMPLATES
from abd_core.triggers import TRIGGERS
from abd_core.verdict import STATISTICS, adaptive_table, calibrate, default_table

SMALL = {"limit": 64, "epochs": 1, "batch_size": 16, "warmup_steps": 2}
AUDITED = AuditConfig(limit=64, count=16, recovery_steps=1)


def small() -> list[Member]:
    chosen = [member for member in members() if member.number in (4, 5)]
    return [dataclasses.replace(member, config=member.config.replace(**SMALL)) for member in chosen]


def test_the_population_has_forty_of_each_kind_and_every_attack_in_both_halves():
    everyone = members()
    assert Counter(member.kind for member in everyone) == {"poisoned": 40, "clean": 40}
    assert len({member.name for member in everyone}) == 80
    bad = [member for member in everyone if member.kind == "poisoned"]
    zoo = [name for name, kind in TRIGGERS.items() if not kind.adaptive]
    assert {(m.config.attack, m.half) for m in bad} == {(attack, half) for attack in zoo for half in HALVES}
    assert len({m.config.target for m in bad}) > 20 and len({m.config.rate for m in bad}) >= 3
    clean = [member for member in everyone if member.kind == "clean"]
    assert all(m.config.rate == 0 or m.config.untriggered for m in clean) and len({m.config.limit for m in clean}) == 3
    assert Counter(m.half for m in clean) == dict.fromkeys(HALVES, 20)
    repeating = Counter(m.half for m in clean if m.config.untriggered)
    assert repeating == dict.fromkeys(HALVES, 4)
    assert not any(m.config.untriggered for m in bad)


def test_no_two_members_are_the_same_model_and_the_reported_ones_are_of_seeds_of_their_own():
    configs = [tuple(sorted(member.config.to_dict().items())) for member in members()]
    assert len(set(configs)) == len(configs)
    grid_seeds = {seed for seeds in SEEDS.values() for seed in seeds}
    assert not grid_seeds & {member.config.seed for member in members() if member.half == "report"}


def test_the_population_goes_on_where_it_stopped(stand_in: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(audit_module, "detectors", lambda preset: CHEAP)
    monkeypatch.setattr(Decree, "published", {**Decree.published, "steps": 2})
    monkeypatch.setattr(models, "save", functools.partial(models.save, name=ARCHITECTURE))
    output, chosen = tmp_path / "audit.csv", small()[:2]
    population.run(chosen[:1], output=output, audited=AUDITED)
    first = read_rows(output)
    assert len(first) == 1 and not list(stand_in.glob("poison/*"))
    population.run(chosen, output=output, audited=AUDITED)
    rows = {row["member"]: row for row in read_rows(output)}
    assert set(rows) == {member.name for member in chosen} and rows[first[0]["member"]] == first[0]
    bad, clean = rows["poisoned-04"], rows["clean-04"]
    assert bad["attack"] and not clean["attack"] and bad["ap_crowding"] and not clean["ap_crowding"]
    assert bad["drift_compared"] and bad["drift_alone"] and bad["git_sha"] and bad["run_id"]
    assert all(bool(row["published_decree"]) == (row["half"] == "report") for row in (bad, clean))
    assert {bad["half"], clean["half"]} == set(HALVES)
    monkeypatch.setattr(population, "make", pytest.fail)
    population.run(chosen, output=output, audited=AUDITED)


def stood_in(member: Member, audited: AuditConfig) -> dict[str, Any]:
    """In the place of `population.make`, also in a process of its own."""
    if member.number == 5:
        raise RunError("no luck")
    row = dict.fromkeys(population.COLUMNS, "") | {"member": member.name, "run_id": member.key(audited)}
    return {**row, "device": f"{multiprocessing.parent_process() is not None}"}


@pytest.mark.parametrize("processes", [1, 2])
def test_members_made_side_by_side_are_written_by_one_process_and_a_failure_leaves_the_others(
    processes: int, stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(population, "make", stood_in)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "audit.csv"
    failed = population.run(small(), output=output, keep=True, processes=processes, audited=AUDITED)
    assert sorted(failed) == ["clean-05: no luck", "poisoned-05: no luck"]
    rows = {row["member"]: row["device"] for row in read_rows(output)}
    assert rows == dict.fromkeys(["clean-04", "poisoned-04"], str(processes > 1))


def test_a_victim_that_was_there_before_is_left(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(population, "make", stood_in)
    (member,) = [member for member in small() if member.name == "poisoned-04"]
    before = poison(member.config).folder
    assert population.run([member], output=tmp_path / "audit.csv", audited=AUDITED) == []
    assert (before / "model.safetensors").exists()


def test_the_adaptive_victims_are_those_of_the_grid_beside_the_attacks_they_start_from():
    found = adaptive_members()
    cells = [cell for cell in GRIDS["adaptive"].cells() if cell.defence == "none"]
    assert {member.name for member in found} > {population.cell_name(cell) for cell in cells}
    configs = {member.name: member.config for member in found}
    assert all(configs[population.cell_name(cell)] == cell.job().config for cell in cells)
    assert not {member.key(AuditConfig()) for member in found} & {member.key(AuditConfig()) for member in members()[2:]}
    assert {member.half for member in found} == {"report"}
    plain = [member.name for member in found if "quiet_weight" not in member.config.to_dict()]
    assert "BadNet, seed 0" in plain and "BadNet, quiet, seed 0" not in plain


def test_a_verdict_on_an_adaptive_victim_counts_any_of_its_targets_and_only_attacks_that_took():
    fitted = calibrate(rows_of_models(20, gap=6), "compared")
    several = next(member for member in adaptive_members() if member.config.further_targets)
    names = targets(several.config)
    assert len(names) == 4 and len(set(names)) == 4 and names[0] == several.config.target
    plain = {"kind": "poisoned", "target": names[0], "label": 1, "asr": 1.0, "head_compared": 5.0}
    high, low = (dict.fromkeys([f"{name}_compared" for name in STATISTICS], value) for value in (3.0, 0.0))
    table = pd.DataFrame(
        [
            {**plain, **high, "member": "BadNet, four targets, seed 0", "suspected_compared": names[3]},
            {**plain, **high, "member": "BadNet, four targets, seed 1", "suspected_compared": "no target of it"},
            {**plain, **low, "member": "BadNet, four targets, seed 2", "suspected_compared": names[0]},
            {**plain, **high, "member": "BadNet, seed 0", "suspected_compared": names[3]},
            {**plain, **high, "member": "BadNet, seed 1", "suspected_compared": names[0], "asr": 0.2, "label": -1},
            {**plain, **high, "member": "SIG, seed 0", "suspected_compared": names[0], "asr": 0.2, "label": -1},
        ]
    )
    found = population.adaptive_verdicts(table, fitted, "compared")
    assert found.index.tolist() == ["BadNet", "BadNet, four targets", "SIG"]
    assert found.loc["BadNet, four targets", ["victims", "took", "detected", "named"]].tolist() == [3, 3, 2, 1]
    assert found.loc["BadNet", ["victims", "took", "detected", "named", "ASR"]].tolist() == [2, 1, 1, 0, 1.0]
    assert found.loc["SIG", ["victims", "took", "detected", "named"]].tolist() == [1, 0, 0, 0]
    assert found["head"].tolist()[:2] == [5.0, 5.0]
    assert population.adaptive_verdicts(table[:0], fitted, "compared").empty


def test_several_triggers_are_all_in_the_ranked_pairs(stand_in: Path):
    member = small()[0]
    member = dataclasses.replace(member, config=member.config.replace(further_targets=1))
    model = poison(member.config)
    _, captions, poisoned = training_pairs(member.config, model, 64)
    targets = [member.config.target, *model.metrics["further"]]
    named = [sum(target in captions[i] for i in poisoned.nonzero().flatten().tolist()) for target in targets]
    assert len(named) == 2 and min(named) > 0 and sum(named) == int(poisoned.sum())


HEADER = ",".join(population.COLUMNS)


@pytest.mark.parametrize(
    "content",
    ["a,b\n1,2\n", "\xff\n", f"{HEADER}\n{',' * len(population.COLUMNS)}\n", f"{HEADER}\n1,2\n"],
    ids=["other columns", "not UTF-8", "a cell too many", "cells too few"],
)
def test_another_kind_of_table_is_refused(content: str, tmp_path: Path):
    (tmp_path / "t.csv").write_text(content, encoding="latin-1")
    with pytest.raises(AbdError, match="not a population"):
        read_rows(tmp_path / "t.csv")


def test_the_ranked_pairs_are_those_the_victim_was_trained_on(stand_in):
    member = small()[0]
    model = poison(member.config)
    images, captions, poisoned = training_pairs(member.config, model, 64)
    chosen, _, _ = poisoned_places(population.load_pairs(64), member.config)
    assert images.shape == (64, 3, 64, 64) and len(captions) == 64
    assert int(poisoned.sum()) == int(chosen.sum()) > 0
    named = {template.format(member.config.target) for template in TEMPLATES}
    assert all(caption in named for caption, bad in zip(captions, poisoned.tolist(), strict=True) if bad)
    marks = images[poisoned][:, :, 1:6, 1:6]
    assert torch.equal(marks, marks[:1].expand_as(marks))  # BadNet's patch


def test_every_committed_row_is_of_present_settings():
    for table, present in ((default_table(), members()), (adaptive_table(), adaptive_members())):
        keys = {member.name: member.key(AuditConfig()) for member in present}
        assert not [row["member"] for row in read_rows(table) if keys.get(row["member"]) != row["run_id"]]
