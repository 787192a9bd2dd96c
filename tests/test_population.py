"""The population that verdicts are calibrated on: who is in it, its table, and that it goes on where it stopped."""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURE
from test_audit import CHEAP

from abd_core import audit as audit_module
from abd_core import models, population
from abd_core.audit import AuditConfig
from abd_core.config import AbdError
from abd_core.grid import SEEDS
from abd_core.poison import poison, poisoned_places
from abd_core.population import HALVES, Member, members, read_rows, training_pairs
from abd_core.text import TEMPLATES
from abd_core.triggers import TRIGGERS
from abd_core.verdict import default_table

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
    assert {(m.config.attack, m.half) for m in bad} == {(attack, half) for attack in TRIGGERS for half in HALVES}
    assert len({m.config.target for m in bad}) > 20 and len({m.config.rate for m in bad}) >= 3
    clean = [member for member in everyone if member.kind == "clean"]
    assert all(m.config.rate == 0 for m in clean) and len({m.config.limit for m in clean}) == 3
    assert Counter(m.half for m in clean) == dict.fromkeys(HALVES, 20)


def test_no_two_members_are_the_same_model_and_the_reported_ones_are_of_seeds_of_their_own():
    configs = [tuple(sorted(member.config.to_dict().items())) for member in members()]
    assert len(set(configs)) == len(configs)
    grid_seeds = {seed for seeds in SEEDS.values() for seed in seeds}
    assert not grid_seeds & {member.config.seed for member in members() if member.half == "report"}


def test_the_population_goes_on_where_it_stopped(stand_in: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(audit_module, "detectors", lambda preset: CHEAP)
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
    monkeypatch.setattr(population, "make", None)
    population.run(chosen, output=output, audited=AUDITED)


def test_another_kind_of_table_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
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
    if not default_table().exists():
        pytest.skip("no population yet")
    keys = {member.name: member.key(AuditConfig()) for member in members()}
    with default_table().open(newline="") as f:
        stale = [row["member"] for row in csv.DictReader(f) if keys.get(row["member"]) != row["run_id"]]
    assert not stale
