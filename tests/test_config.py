"""Settings: what is accepted, what is refused and how, and how a notebook's parameters find their stage."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
from conftest import concrete_configs
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config as ShellConfig

from abd_core.adversary import AdversaryConfig
from abd_core.config import AbdError, Config, ConfigError, derive_seed, digest, option, unknown
from abd_core.defend import DefendConfig
from abd_core.notebook import parameters, stage_configs
from abd_core.paths import RunError
from abd_core.poison import PoisonConfig


@dataclass(frozen=True, kw_only=True)
class Example(Config):
    flag: bool = option(False, "a flag")
    count: int = option(3, "a count", ge=1)
    share: float = option(0.5, "a share", gt=0, le=1)
    free: float = option(1.0, "any finite number")
    below: float = option(0.0, "below one", ge=0, lt=1)
    kind: str = option("red", "a colour", choices=("red", "green"))
    name: str = option("x", "any text")


CONFIGS = pytest.mark.parametrize("kind", concrete_configs(), ids=lambda kind: kind.__name__)


# --- coercion and refusal -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "given_", "expected"),
    [
        ("flag", True, True),
        ("flag", "true", True),
        ("flag", "False", False),
        ("count", 7, 7),
        ("count", "3", 3),
        ("count", 3.0, 3),
        ("count", "3.0", 3),
        ("count", "1e3", 1_000),
        ("share", 1, 1.0),
        ("share", "1e-3", 0.001),
        ("share", "1", 1.0),
        ("free", "-2.5", -2.5),
        ("free", -1, -1.0),
        ("kind", "green", "green"),
        ("name", "3", "3"),
        ("flag", np.bool_(True), True),
        ("count", np.int64(3), 3),
        ("share", np.float32(0.5), 0.5),
        ("name", np.str_("x"), "x"),
    ],
)
def test_what_means_the_field_s_type_is_taken_for_it(field: str, given_: object, expected: object):
    value = getattr(Example.from_parameters({field: given_}), field)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("field", "given_", "message"),
    [
        ("flag", 1, "Example.flag = 1: bool expected"),
        ("flag", "yes", "Example.flag = 'yes': bool expected"),
        ("count", True, "Example.count = True: int expected"),
        ("count", 2.5, "Example.count = 2.5: int expected"),
        ("count", "many", "Example.count = 'many': int expected"),
        ("count", None, "Example.count = None: int expected"),
        ("count", [3], "Example.count = [3]: int expected"),
        ("count", math.nan, "Example.count = nan: int expected"),
        ("count", math.inf, "Example.count = inf: int expected"),
        ("count", "inf", "Example.count = 'inf': int expected"),
        ("count", 0, "Example.count = 0: ≥ 1 expected"),
        ("count", "-1", "Example.count = -1: ≥ 1 expected"),
        ("share", True, "Example.share = True: float expected"),
        ("share", "half", "Example.share = 'half': float expected"),
        ("share", None, "Example.share = None: float expected"),
        ("share", 0, "Example.share = 0.0: > 0 and ≤ 1 expected"),
        ("share", 1.0001, "Example.share = 1.0001: > 0 and ≤ 1 expected"),
        ("share", -0.1, "Example.share = -0.1: > 0 and ≤ 1 expected"),
        ("share", math.nan, "Example.share = nan: > 0 and ≤ 1 expected"),
        ("free", math.nan, "Example.free = nan: a finite number expected"),
        ("free", "-inf", "Example.free = -inf: a finite number expected"),
        ("below", 1, "Example.below = 1.0: ≥ 0 and < 1 expected"),
        ("kind", "blue", "Example.kind = 'blue': one of 'red', 'green' expected"),
        ("kind", "Red", "Example.kind = 'Red': one of 'red', 'green' expected"),
        ("kind", 1, "Example.kind = 1: str expected"),
        ("name", 3, "Example.name = 3: str expected"),
    ],
)
def test_a_bad_value_is_refused_in_one_line_with_field_value_and_what_is_allowed(field: str, given_, message: str):
    for make in (Example.from_parameters, lambda changes: Example().replace(**changes), lambda c: Example(**c)):
        with pytest.raises(ConfigError) as error:
            make({field: given_})
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("kind", "field", "value", "message"),
    [
        (PoisonConfig, "rate", 1.5, "PoisonConfig.rate = 1.5: ≥ 0 and ≤ 1 expected"),
        (PoisonConfig, "rate", "-0.1", "PoisonConfig.rate = -0.1: ≥ 0 and ≤ 1 expected"),
        (PoisonConfig, "batch_size", 1, "PoisonConfig.batch_size = 1: ≥ 2 expected"),
        (AdversaryConfig, "magnitude", 0, "AdversaryConfig.magnitude = 0.0: > 0 and ≤ 1 expected"),
        (AdversaryConfig, "mode", "add", "AdversaryConfig.mode = 'add': one of 'additive', 'patch' expected"),
        (DefendConfig, "share", 2, "DefendConfig.share = 2.0: > 0 and ≤ 1 expected"),
        (DefendConfig, "seed", -1, "DefendConfig.seed = -1: ≥ 0 expected"),
    ],
)
def test_the_stages_refuse_what_makes_no_sense(kind: type[Config], field: str, value: object, message: str):
    with pytest.raises(ConfigError) as error:
        kind.from_parameters({field: value})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuont", "unknown Example parameter 'cuont'; did you mean 'count'?"),
        ("zzz", "unknown Example parameter 'zzz'; known: below, count, flag, free, kind, name, share"),
    ],
)
def test_an_unknown_name_is_refused_with_a_suggestion_or_a_list(name: str, message: str):
    with pytest.raises(ConfigError) as error:
        Example.from_parameters({name: 1})
    assert str(error.value) == message


def test_a_long_list_of_known_names_is_only_counted():
    assert str(unknown("thing", "q", [f"name{i}" for i in range(99)])) == "unknown thing 'q'; known: 99"


def test_settings_are_frozen_and_replaced_by_copies():
    config = Example()
    with pytest.raises(AttributeError):
        config.count = 5
    assert config.replace(count=5).count == 5 and config.count == 3


@CONFIGS
def test_every_setting_of_a_stage_has_a_help_that_the_description_shows(kind: type[Config]):
    lines = kind.describe().splitlines()
    assert [line.split(" = ")[0] for line in lines] == list(kind.names())
    assert all(len(line.split("  # ")[1]) > 5 for line in lines)


@CONFIGS
def test_the_defaults_of_a_stage_survive_json(kind: type[Config]):
    assert kind.from_parameters(json.loads(json.dumps(kind().to_dict()))) == kind()


EXAMPLES = st.fixed_dictionaries(
    {},
    optional={
        "flag": st.booleans(),
        "count": st.integers(1, 2**53),
        "share": st.floats(0, 1, exclude_min=True),
        "free": st.floats(allow_nan=False, allow_infinity=False),
        "below": st.floats(0, 1, exclude_max=True),
        "kind": st.sampled_from(["red", "green"]),
        "name": st.text(),
    },
)


@given(EXAMPLES)
def test_any_settings_survive_json_and_papermill_s_strings(settings: dict):
    config = Example.from_parameters(settings)
    assert Example.from_parameters(config.to_dict()) == config
    assert Example.from_parameters(json.loads(json.dumps(config.to_dict()))) == config
    assert Example.from_parameters({name: str(value) for name, value in config.to_dict().items()}) == config


# --- digests and seeds --------------------------------------------------------------------------------------


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.booleans())), st.randoms())
def test_a_digest_does_not_depend_on_the_order_of_keys(record: dict, random):
    keys = list(record)
    random.shuffle(keys)
    assert digest({key: record[key] for key in keys}) == digest(record)


def test_a_digest_tells_records_apart():
    records = [{}, [], {"a": 1}, {"a": "1"}, {"b": 1}, {"a": {"a": 1}}, [1, 2], [2, 1], Example().to_dict()]
    assert len({digest(record) for record in records}) == len(records)
    assert {len(digest(record)) for record in records} == {64}


def test_derived_seeds_repeat_and_streams_differ():
    parts = [
        (0,),
        (1,),
        (0, "order"),
        (0, "views"),
        (0, "order", 1),
        (0, "order", 11),
        (0, "order1", 1),
        ("0",),
        (0, 1),
    ]
    seeds = [derive_seed(*p) for p in parts]
    assert seeds == [derive_seed(*p) for p in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_derived_seeds_are_the_same_on_every_machine():
    assert derive_seed(0, "order", 3) == 3339898520332188405


# --- a notebook's parameters --------------------------------------------------------------------------------

STAGES = {"poison": PoisonConfig, "adversary": AdversaryConfig, "defend": DefendConfig}


def resolved(**namespace: object) -> tuple[PoisonConfig, AdversaryConfig, DefendConfig]:
    return stage_configs(dict(namespace), **STAGES)


def test_no_parameters_give_the_defaults():
    assert resolved() == (PoisonConfig(), AdversaryConfig(), DefendConfig())


def test_shared_names_go_to_every_stage_that_has_them():
    poison, adversary, defend = resolved(seed=7, limit=99, share=0.25)
    assert (poison.seed, adversary.seed, defend.seed) == (7, 7, 7)
    assert (poison.limit, adversary.limit, defend.limit) == (99, 99, 99)
    assert (adversary.share, defend.share) == (0.25, 0.25)


@pytest.mark.parametrize(
    ("name", "value", "home"),
    [
        ("epochs", 9, "defend"),
        ("lr", 0.5, "defend"),
        ("steps", 9, "adversary"),
        ("mode", "additive", "adversary"),
        ("rate", 0.5, "poison"),
        ("target", "lemon", "poison"),
        ("poison_epochs", 9, "poison"),
        ("adversary_lr", "1e-2", "adversary"),
        ("defend_epochs", 9, "defend"),
        ("adversary_adversarial_weight", 2.0, "adversary"),
    ],
)
def test_a_name_belongs_to_the_last_stage_that_knows_it_or_to_the_one_it_names(name: str, value, home: str):
    field = name.removeprefix(f"{home}_")
    configs = dict(zip(STAGES, resolved(**{name: value}), strict=True))
    expected = {stage: kind.from_parameters({field: value} if stage == home else {}) for stage, kind in STAGES.items()}
    assert configs == expected and configs[home] != STAGES[home]()


@pytest.mark.parametrize(
    ("namespace", "message"),
    [
        ({"epochs": 2, "defend_epochs": 3}, r"'epochs' of stage 'defend' is already set"),
        ({"defend_epochs": 3, "epochs": 2}, r"'epochs' of stage 'defend' is already set"),
        ({"rat": 0.1}, r"unknown parameter 'rat'; did you mean 'rate'\?"),
        ({"poison_epoch": 1}, r"unknown parameter 'poison_epoch'; did you mean 'poison_epochs'\?"),
        ({"poison_seed": 1}, r"unknown parameter 'poison_seed'"),
        ({"victim_epochs": 1}, r"unknown parameter 'victim_epochs'"),
        ({"epochs": 0}, r"DefendConfig\.epochs = 0: ≥ 1 expected"),
        ({"poison_epochs": 0}, r"PoisonConfig\.epochs = 0: ≥ 1 expected"),
        ({"seed": "x"}, r"PoisonConfig\.seed = 'x': int expected"),
        ({"epochs": [1, 2]}, r"DefendConfig\.epochs = \[1, 2\]: int expected"),
    ],
)
def test_what_belongs_nowhere_twice_or_is_not_allowed_is_refused_in_one_line(namespace: dict, message: str):
    with pytest.raises(ConfigError, match=message) as error:
        resolved(**namespace)
    assert "\n" not in str(error.value)


def test_imports_functions_and_private_names_are_no_parameters():
    namespace = {"json": json, "resolved": resolved, "_private": 1, "In": [], "Out": {}, "Example": Example, "seed": 1}
    assert parameters(namespace) == {"seed": 1}


def test_a_cell_that_runs_again_tolerates_the_notebook_s_own_variables():
    namespace = {"seed": 3, "epochs": 2}
    first = stage_configs(namespace, **STAGES)
    namespace["my_table"] = [1, 2]
    assert stage_configs(namespace, **STAGES) == first
    namespace["epochs"] = 5
    assert stage_configs(namespace, **STAGES)[2].epochs == 5
    with pytest.raises(ConfigError, match="my_table"):
        resolved(my_table=[1, 2])


@pytest.fixture
def shell(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    settings = ShellConfig()
    settings.HistoryManager.enabled = False
    yield InteractiveShell.instance(config=settings)
    InteractiveShell.clear_instance()


PRELUDE = "from abd_core.notebook import stage_configs\nfrom abd_core.poison import PoisonConfig\n"


def test_in_a_notebook_an_error_of_ours_shows_as_one_line_and_another_s_as_a_traceback(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
):
    result = shell.run_cell(PRELUDE + "rate = 2\nstage_configs(globals(), poison=PoisonConfig)")
    assert isinstance(result.error_in_exec, ConfigError)
    assert capsys.readouterr().out.splitlines() == ["ConfigError: PoisonConfig.rate = 2.0: ≥ 0 and ≤ 1 expected"]
    shell.run_cell("from abd_core.paths import RunError\nraise RunError('missing file: x')")
    assert capsys.readouterr().out.splitlines() == ["RunError: missing file: x"]
    assert isinstance(shell.run_cell("1 / 0").error_in_exec, ZeroDivisionError)
    assert "Traceback" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [ConfigError, RunError])
def test_the_project_s_errors_are_one_kind_and_are_value_errors(kind: type[Exception]):
    assert issubclass(kind, AbdError) and issubclass(kind, ValueError)
