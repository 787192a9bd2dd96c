"""What a notebook's first and last cells need: parameters become configs, errors one line, a summary to print again.

`python -m abd_core.notebook executed.ipynb` prints what the cell tagged `summary` of an executed notebook printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from abd_core import escape, inputs
from abd_core.config import AbdError, Config, ConfigError, unknown
from abd_core.paths import RunError, read_json, regular

SHARED = ("seed", "share", "limit", "num_processes", *inputs.SHARED)  # mean the same in every stage that has them
_IPYTHON = {"In", "Out"}  # plain values that IPython itself leaves in a fresh namespace
_PLAIN = (bool, int, float, str, list, tuple, dict, set, type(None))


def parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """What the parameters cell (and papermill's injected one) defined: public names bound to plain values."""
    return {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and name not in _IPYTHON and isinstance(value, _PLAIN)
    }


def stage_configs(namespace: MutableMapping[str, Any], **stages: type[Config]) -> tuple[Any, ...]:
    """Configs of a notebook's stages from its namespace; `stages` go upstream first, the notebook's own stage last.

    A name in `SHARED` goes to every stage. Another bare name belongs to the notebook's own stage, or else to the
    nearest one upstream that knows it; `<stage>_<name>` names the stage, e.g. `poison_epochs`. From here on, an
    `AbdError` in a cell shows as its one line. When the cell is run again in the same kernel, names that are no
    parameter are taken for the notebook's own variables.

    Example::

        poison, defend = stage_configs(globals(), poison=PoisonConfig, defend=DefendConfig)

    Raises:
        ConfigError: a name belongs to no stage, two names mean the same setting, or a value is not allowed.
    """
    _one_line_errors()
    again = namespace.get("_parameters_checked", False)
    namespace["_parameters_checked"] = True
    chosen: dict[str, dict[str, Any]] = {stage: {} for stage in stages}
    known = {name for kind in stages.values() for name in kind.names()}
    prefixed = {f"{stage}_{name}" for stage, kind in stages.items() for name in kind.names() if name not in SHARED}
    for name, value in parameters(namespace).items():
        homes = [stage for stage in reversed(stages) if name in stages[stage].names()]
        field = name
        if name in prefixed and not homes:
            match = re.fullmatch(rf"({'|'.join(stages)})_(\w+)", name)
            assert match is not None
            homes, field = [match[1]], match[2]
        if not homes:
            if again:
                continue
            raise unknown("parameter", name, known | prefixed)
        for stage in homes if name in SHARED else homes[:1]:
            if field in chosen[stage]:
                raise ConfigError(
                    f"parameter {name!r}: {field!r} of stage {stage!r} is already set under its other name"
                )
            chosen[stage][field] = value
    return tuple(kind.from_parameters(chosen[stage]) for stage, kind in stages.items())


def stage_parameters(listed: Collection[str], **stages: Config) -> dict[str, Any]:
    """The inverse of `stage_configs`: parameters from which a notebook makes these configs; defaults are left out.

    Args:
        listed: the names in the notebook's parameters cell, which a setting takes where it has one there.
        stages: all stages of the notebook, upstream first.
    """
    given = {}
    for number, (stage, config) in enumerate(stages.items()):
        downstream = list(stages.values())[number + 1 :]
        for field in dataclasses.fields(config):
            name, value = field.name, getattr(config, field.name)
            bare = name in listed and not any(name in other.names() for other in downstream)
            if value != field.default:
                given[name if bare or name in SHARED else f"{stage}_{name}"] = value
    return given


def add_parameters(parser: argparse.ArgumentParser) -> None:
    """The options -f and -p, for `given_parameters`."""
    parser.add_argument(
        "-f", "--parameters", type=Path, action="append", default=[], metavar="YAML", help="a file of parameters"
    )
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="one parameter")


def given_parameters(files: Sequence[Path], pairs: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Parameters as papermill takes them: `-f` files of YAML, then `-p` names and values.

    Raises:
        ConfigError: a name or a value that `parameters` would leave out.
        RunError: a file is missing, or holds something else.
    """
    found: dict[str, Any] = {}
    read = [(str(path), _read_parameters(path)) for path in files]
    for where, given in [*read, ("-p", {name: value for name, value in pairs})]:
        for name, value in given.items():
            if not isinstance(value, _PLAIN):
                expected = "text, a number or a list of them expected (text that looks like a date goes in quotes)"
                raise ConfigError(f"{where}: {name!r} is of kind {type(value).__name__}: {expected}")
            if name not in parameters({name: value}):
                raise ConfigError(f"{where}: {name!r} is no parameter's name: it is private, or IPython's")
        found |= given
    return found


def _read_parameters(path: Path) -> dict[str, Any]:
    """Names and values of a file of YAML. Raises RunError."""
    regular(path)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception as error:  # PyYAML raises many kinds
        raise RunError(f"damaged file: {path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise RunError(f"{path}: names with a value each expected")
    return given


def _one_line_errors() -> None:
    """Let IPython, where it runs, show an AbdError as one line instead of a traceback."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:

        def show(shell: Any, kind: type, error: Exception, traceback: Any, tb_offset: int | None = None) -> list[str]:
            lines = [f"{kind.__name__}: {error}"]
            shell._showtraceback(kind, error, lines)
            return lines

        shell.set_custom_exc((AbdError,), show)


def show_configs(*configs: Config) -> None:
    """Print the resolved settings, a block a stage."""
    for config in configs:
        settings = ", ".join(f"{name}={value!r}" for name, value in config.to_dict().items())
        print(f"{type(config).__name__}({settings})")


def summary(path: Path) -> str:
    """What the cell tagged `summary` of the executed notebook at `path` printed, harmless for a terminal.

    Raises:
        RunError: no such file, no notebook, or no such output.
    """
    record = read_json(path)
    try:
        printed = [
            "".join(output["text"])
            for cell in record["cells"]
            if "summary" in cell.get("metadata", {}).get("tags", [])
            for output in cell.get("outputs", [])
            if output.get("name") == "stdout"
        ]
    except (AttributeError, KeyError, TypeError):
        raise RunError(f"damaged file: {path}: no notebook") from None
    if not printed:
        raise RunError(f"{path}: no executed cell tagged 'summary'")
    return "".join(f"{escape.terminal(line)}\n" for line in "".join(printed).splitlines())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m abd_core.notebook EXECUTED.ipynb")
    try:
        print(summary(Path(sys.argv[1])), end="")
        print(f"Executed notebook: {escape.terminal(sys.argv[1])}")
    except AbdError as error:
        sys.exit(str(error))
