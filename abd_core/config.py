"""Validated, frozen settings of the stages.

A setting is declared once, as a dataclass field made by `option`; its type, range and help live there. Whatever comes
from outside (a papermill parameter, a JSON file) passes `Config.from_parameters`, which coerces, checks and refuses.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, get_type_hints

import numpy as np

from abd_core import escape


class AbdError(ValueError):
    """Anything that the person who runs a stage can mend; its text is one clear line, whatever it quotes."""

    def __str__(self) -> str:
        return escape.terminal(super().__str__())


class ConfigError(AbdError):
    """A parameter is unknown, of the wrong type or out of range."""


class TrainingError(AbdError):
    """A loss, a weight or a feature stopped being of use: NaN, infinite, or the same whatever the input."""


def option(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Iterable[str] | None = None,
    place: bool = False,
    later: bool = False,
) -> Any:
    """A dataclass field with its help and what is allowed: bounds for numbers, `choices` for strings.

    Args:
        place: it says where or how something is found that enters a run's key by its own digest, so the setting itself
            is no part of the key: data that has moved makes no other run.
        later: it came after runs had been made, and is part of their key only where it is not at its default.
    """
    bounds = {"≥": ge, ">": gt, "≤": le, "<": lt}
    metadata = {
        "help": help,
        "bounds": {sign: value for sign, value in bounds.items() if value is not None},
        "choices": None if choices is None else tuple(choices),
        "place": place,
        "later": later,
    }
    return dataclasses.field(default=default, metadata=metadata)


def _coerced(where: str, value: Any, kind: type) -> Any:
    """`value` as `kind`; papermill hands `-p flag true` and `-y '{lr: 1e-3}'` over as strings."""
    if isinstance(value, np.generic):
        value = value.item()
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if kind is int and isinstance(value, str | float) and not isinstance(value, bool):
        digits = isinstance(value, str) and value.removeprefix("-").isdecimal()  # a float would round a long one
        try:
            number = int(value) if digits else float(value)
            if number == int(number):
                return int(number)
        except (ValueError, OverflowError):
            pass
    if type(value) is not kind:
        raise ConfigError(f"{where} = {value!r}: {kind.__name__} expected")
    return value


def _check(where: str, value: Any, field: dataclasses.Field) -> None:
    choices, bounds = field.metadata["choices"], field.metadata["bounds"]
    if choices is not None and value not in choices:
        raise ConfigError(f"{where} = {value!r}: one of {', '.join(map(repr, choices))} expected")
    tests = {"≥": lambda b: value >= b, ">": lambda b: value > b, "≤": lambda b: value <= b, "<": lambda b: value < b}
    finite = not isinstance(value, float) or math.isfinite(value)
    if not finite or not all(tests[sign](bound) for sign, bound in bounds.items()):
        allowed = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds.items()) or "a finite number"
        raise ConfigError(f"{where} = {value!r}: {allowed} expected")


def unknown(what: str, name: object, known: Iterable[str]) -> ConfigError:
    """The error for a name that is none of `known`, with the nearest one suggested."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = (
        f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known) if len(known) <= 40 else len(known)}"
    )
    return ConfigError(f"unknown {what} {name!r}{hint}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of the stages' settings. Construction validates every field.

    Attributes:
        chooser: name of the field that chooses one of `kinds`; "" where there is none.
        kinds: the classes to choose from. Fields named in the `settings` of some are read by these alone: for another
            they must keep their defaults, and they are no part of its `to_dict`. So what a further kind brings with it
            leaves the others' run folders where they are.

    Raises:
        ConfigError: naming the class, the field, its value and what is allowed.
    """

    chooser: ClassVar[str] = ""
    kinds: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            where = f"{type(self).__name__}.{field.name}"
            value = _coerced(where, getattr(self, field.name), hints[field.name])
            _check(where, value, field)
            object.__setattr__(self, field.name, value)
        for field in dataclasses.fields(self):
            if field.name in self.unread() and getattr(self, field.name) != field.default:
                readers = [name for name, kind in self.kinds.items() if field.name in kind.settings]
                raise ConfigError(
                    f"{type(self).__name__}.{field.name} = {getattr(self, field.name)!r}: {self.chooser} "
                    f"{getattr(self, self.chooser)!r} does not read it, only {', '.join(readers)}"
                )

    def unread(self) -> set[str]:
        """Fields that the chosen kind does not read."""
        if not self.chooser:
            return set()
        own = self.kinds[getattr(self, self.chooser)].settings
        return {name for kind in self.kinds.values() for name in kind.settings} - set(own)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        """The config that `parameters` describe; fields that they leave out keep their defaults.

        Raises:
            ConfigError: a name is not a field, or a value is not allowed.
        """
        for name in parameters:
            if name not in cls.names():
                raise unknown(f"{cls.__name__} parameter", name, cls.names())
        return cls(**parameters)

    def to_dict(self) -> dict[str, Any]:
        """The settings that are read; of the places, those that are not at their default."""
        return {**self.key(), **self.places()}

    def key(self) -> dict[str, Any]:
        """The settings that tell runs apart: those that are read, without places; see `option`."""
        unread = self.unread()
        kept = [f for f in dataclasses.fields(self) if f.name not in unread and not f.metadata["place"]]
        values = {f: getattr(self, f.name) for f in kept}
        return {f.name: value for f, value in values.items() if not f.metadata["later"] or value != f.default}

    def places(self) -> dict[str, Any]:
        """The places that are not at their default."""
        given = [f for f in dataclasses.fields(self) if f.metadata["place"] and getattr(self, f.name) != f.default]
        return {f.name: getattr(self, f.name) for f in given}

    def replace(self, **changes: Any) -> Self:
        return type(self).from_parameters({**self.to_dict(), **changes})

    @classmethod
    def describe(cls) -> str:
        """One line a field: name, default, help."""
        return "\n".join(f"{f.name} = {f.default!r}  # {f.metadata['help']}" for f in dataclasses.fields(cls))


def digest(record: Any) -> str:
    """SHA-256 (hex) of a JSON-able record, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any parts, e.g. `derive_seed(config.seed, "order", epoch)`: streams that never collide."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
