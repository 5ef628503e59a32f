"""Dataclasses from the plain data of JSON, checked field by field: the inverse of `dataclasses.asdict`."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from vila_edge.errors import ConfigError

Config = TypeVar("Config")


def from_plain(kind: type[Config], data: object, source: str) -> Config:
    """A config dataclass from plain JSON data (the inverse of `dataclasses.asdict`).

    Raises ConfigError that names the field, by its dotted path in `source`.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: expected an object, found {data!r}")
    hints = typing.get_type_hints(kind)
    unknown, missing = sorted(set(data) - set(hints)), sorted(set(hints) - set(data))
    if unknown:
        raise ConfigError(f"{source}: unknown field {unknown[0]!r}")
    if missing:
        raise ConfigError(f"{source}: field {missing[0]!r} is missing")
    return build(kind, source, {name: _value(hint, data[name], f"{source}.{name}") for name, hint in hints.items()})


def build(kind: type[Config], source: str, values: dict[str, Any]) -> Config:
    """A config dataclass of `values`. Raises ConfigError with the source of the values for what `kind` refuses."""
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error.message}", error.hint) from None


def _value(hint: Any, value: object, source: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value, source)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union) and type(None) in arguments:
        return None if value is None else _value(arguments[0], value, source)
    if origin is tuple and isinstance(value, (list, tuple)):
        hints = [arguments[0]] * len(value) if Ellipsis in arguments else list(arguments)
        if len(hints) == len(value):
            return tuple(_value(h, v, f"{source}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {key: _value(arguments[1], v, f"{source}.{key}") for key, v in value.items()}
    if (origin is Literal and value in arguments) or hint is Any:
        return value
    if hint is float and type(value) in (int, float):
        return float(typing.cast(float, value))
    if hint in (int, str, bool) and type(value) is hint:
        return value
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    expected = getattr(hint, "__name__", None) if not origin else str(hint).replace("typing.", "")
    raise ConfigError(f"{source}: expected {expected}, found {value!r}")
