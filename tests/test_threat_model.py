"""The defender holds the suspect's weights, the published clean ones and clean pairs, and nothing of the attack."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import pytest
from conftest import start_python

from abd_core import adversary, defend
from abd_core.adversary import AdversaryConfig
from abd_core.defend import DEFENCES, DefendConfig

RECORDS = ("trigger.safetensors", "poisoned.csv", "config.json", "metrics.json", "history.csv", "manifest.json")
SECRETS = ("trigger", "target", "poison", "attack", "backdoor_class")

CHILD = """
import json, os, sys
from pathlib import Path
from conftest import use_stand_in
from abd_core.adversary import AdversaryConfig, adversary
from abd_core.defend import DefendConfig, defend
from abd_core.poison import PoisonConfig, poison

use_stand_in(Path({stand_in!r}))
opened = []
victim = Path({victim!r})
watched = ("open", "os.listdir", "os.scandir", "glob.glob", "pathlib.Path.glob", "os.rename", "shutil.copyfile")

def listen(event, arguments):
    if event in watched:
        opened.append([event, *(os.path.realpath(os.fsdecode(a)) for a in arguments if isinstance(a, (str, bytes)))])

sys.addaudithook(listen)
{body}
print(json.dumps(opened))
"""
DEFENDER = """
found = adversary(AdversaryConfig(limit=64, steps=2, batch_size=8, width=16), victim)
defend(
    DefendConfig(limit=64, epochs=1, batch_size=16), victim, perturbation=found.file("perturbation.safetensors")
)
"""

READS_THE_RECORD = """
from abd_core.evaluate import measure
try:
    measure(victim, trigger=victim.with_name("trigger.safetensors"))
except ValueError as error:
    print(error, file=sys.stderr)
"""


def opened(stand_in: Path, victim: Path, body: str) -> list[list[str]]:
    child = start_python(CHILD.format(stand_in=str(stand_in), victim=str(victim), body=body))
    output, errors = child.communicate()
    assert child.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


@pytest.fixture
def planted(stand_in: Path, tmp_path: Path) -> Path:
    """A victim with its attack's whole record beside it; to read any of it is to fail, for none of it is valid."""
    folder = tmp_path / "victim"
    folder.mkdir()
    shutil.copyfile(stand_in / "victim.safetensors", folder / "model.safetensors")
    for name in RECORDS:
        (folder / name).write_text("the attacker's")
    return folder / "model.safetensors"


@pytest.mark.slow
def test_adversary_and_defence_open_nothing_beside_the_victim_s_weights(stand_in: Path, planted: Path):
    events = opened(stand_in, planted, DEFENDER)
    near = {path for _, *files in events for path in files if Path(path).is_relative_to(planted.parent)}
    assert near == {str(planted)}
    read = {Path(path).name for event, *files in events for path in files if event == "open"}
    assert not read & {"trigger.safetensors", "poisoned.csv"}
    assert {"perturbation.safetensors", "history.csv"} <= read  # the listener heard the stages at work


@pytest.mark.slow
def test_the_listener_hears_a_stage_that_does_read_the_record(stand_in: Path, planted: Path):
    events = opened(stand_in, planted, READS_THE_RECORD)
    assert str(planted.parent / "trigger.safetensors") in {path for _, *files in events for path in files}


@pytest.mark.parametrize(
    "function", [adversary.adversary, defend.defend, *(defence.__init__ for defence in DEFENCES.values())]
)
def test_no_parameter_of_the_defender_can_carry_the_attack(function):
    names = inspect.signature(function).parameters
    assert [name for name in names if any(secret in name for secret in SECRETS)] == []


@pytest.mark.parametrize("config", [AdversaryConfig, DefendConfig])
def test_no_setting_of_the_defender_can_carry_the_attack(config):
    assert [name for name in config.names() if any(secret in name for secret in SECRETS)] == []


@pytest.mark.parametrize("module", [adversary, defend])
def test_the_defender_s_modules_hold_nothing_of_the_attacker_s(module):
    from abd_core import poison, triggers

    theirs = {
        id(value)
        for source in (poison, triggers)
        for name, value in vars(source).items()
        if callable(value) and getattr(value, "__module__", "") == source.__name__
    }
    assert [name for name, value in vars(module).items() if id(value) in theirs] == []
