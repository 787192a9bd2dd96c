"""The defender holds the suspect's weights, the published clean ones and clean pairs, and nothing of the attack."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import pytest
from conftest import start_python

from abd_core import adversary, audit, defences, defend, detectors, poison, suspicion, triggers, verdict
from abd_core.adversary import AdversaryConfig
from abd_core.audit import AuditConfig, AuditInputs
from abd_core.defences import DEFENCES, DefendConfig

RECORDS = ("trigger.safetensors", "poisoned.csv", "config.json", "metrics.json", "history.csv", "manifest.json")
SECRETS = ("trigger", "target", "poison", "attack", "backdoor_class")

CHILD = """
import json, os, sys
from pathlib import Path
import safetensors

opened, safe_open = [], safetensors.safe_open

class Heard:  # safetensors opens its files outside Python, where no listener hears it
    def __new__(cls, path, *args, **kwargs):
        opened.append(["open", os.path.realpath(path)])
        return safe_open(path, *args, **kwargs)

safetensors.safe_open = Heard

from conftest import use_stand_in
from abd_core.adversary import AdversaryConfig, adversary
from abd_core.audit import AuditConfig, AuditInputs, audit
from abd_core.defences import DEFENCES, DefendConfig
from abd_core.defend import defend
from abd_core.poison import PoisonConfig, poison

use_stand_in(Path({stand_in!r}))
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
for defence in DEFENCES:
    config = DefendConfig(defence=defence, limit=64, epochs=2, batch_size=16)
    defend(config, victim, perturbation=found.file("perturbation.safetensors"))
audit(AuditConfig(limit=64, count=16, recovery_steps=1), AuditInputs(checkpoint=str(victim)))
"""

# Each reads a file of the attack's record, and finds it damaged.
READERS = {
    "trigger.safetensors": "from abd_core.triggers import load_trigger as read",
    "poisoned.csv": "from pandas import read_csv as read",
    "config.json": "from abd_core.paths import read_json as read",
    "model.safetensors": "from abd_core.models import load as read",
}
READ = """
try:
    read(victim.with_name({name!r}))
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
def test_adversary_audit_and_every_defence_open_nothing_beside_the_victim_s_weights(stand_in: Path, planted: Path):
    events = opened(stand_in, planted, DEFENDER)
    near = {path for _, *files in events for path in files if Path(path).is_relative_to(planted.parent)}
    assert near == {str(planted)}
    read = {Path(path).name for event, *files in events for path in files if event == "open"}
    assert not read & {"trigger.safetensors", "poisoned.csv"}
    assert {"perturbation.safetensors", "history.csv"} <= read  # the listener heard the stages at work


@pytest.mark.slow
def test_the_listener_hears_every_way_to_read_the_record(stand_in: Path, planted: Path):
    body = "\n".join(reader + READ.format(name=name) for name, reader in READERS.items())
    events = opened(stand_in, planted, body)
    near = {Path(path).name for _, *files in events for path in files if Path(path).is_relative_to(planted.parent)}
    assert near == set(READERS)


@pytest.mark.parametrize(
    "function", [adversary.adversary, defend.defend, audit.audit, *(defence.__init__ for defence in DEFENCES.values())]
)
def test_no_parameter_of_the_defender_can_carry_the_attack(function):
    names = inspect.signature(function).parameters
    assert [name for name in names if any(secret in name for secret in SECRETS)] == []


@pytest.mark.parametrize("config", [AdversaryConfig, DefendConfig, AuditConfig, AuditInputs])
def test_no_setting_of_the_defender_can_carry_the_attack(config):
    assert [name for name in config.names() if any(secret in name for secret in SECRETS)] == []


@pytest.mark.parametrize("module", [adversary, defences, defend, audit, detectors, suspicion, verdict])
def test_the_defender_s_modules_hold_nothing_of_the_attacker_s(module):
    theirs = {
        name
        for source in (poison, triggers)
        for name, value in vars(source).items()
        if getattr(value, "__module__", None) == source.__name__
    }
    assert {"poison", "PoisonConfig", "load_trigger", "BadNet"} <= theirs
    assert not theirs & vars(module).keys()


WRITERS = """
written = []

def hear(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)) and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        written.append(os.path.realpath(os.fsdecode(arguments[0])))
    if event in ("os.rename", "os.remove", "os.truncate", "os.link", "os.symlink"):
        written.extend(os.path.realpath(os.fsdecode(a)) for a in arguments if isinstance(a, (str, bytes)))

sys.addaudithook(hear)
run = poison(PoisonConfig(limit=64, epochs=1, batch_size=16, rate=0.5))
opened = [["runs", str(run.folder.parent.parent)], *(["written", path] for path in written)]
"""


@pytest.mark.slow
def test_the_attack_writes_into_its_run_folder_alone_and_no_test_set_on_disk_is_poisoned(
    stand_in: Path, planted: Path, runs: Path
):
    (_, folder), *written = opened(stand_in, planted, WRITERS)
    paths = {Path(path) for _, path in written if not path.startswith("/dev/")}
    assert {path.name for path in paths} >= {"trigger.safetensors", "poisoned.csv", "metrics.json"}
    assert [path for path in paths if not path.is_relative_to(folder)] == []
