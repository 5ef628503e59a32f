"""A `config.json` of the ecosystem, read key by key: what is missing is named, what is not understood refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from vila_edge.errors import ConfigError
from vila_edge.plain import build

Config = TypeVar("Config")


class Fields:
    """A `config.json` of the ecosystem, being read: ask for each key, then it is `done`.

    >>> fields = Fields({"hidden_size": 64, "hidden_act": "silu"}, "llm/config.json")
    >>> fields.integer("hidden_size"), fields.choice("hidden_act", "silu")
    (64, 'silu')
    >>> fields.done()
    """

    def __init__(self, data: Mapping[str, Any], source: str) -> None:
        self.data, self.source = data, source
        self.seen: set[str] = set()

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise self.error(name, "a positive whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not value > 0:
            raise self.error(name, "a positive number")
        return float(value)

    def whole(self, name: str, default: int) -> int:
        """A whole number of either sign."""
        value = self._get(name, default)
        if type(value) is not int:
            raise self.error(name, "a whole number")
        return value

    def text(self, name: str) -> str:
        value = self._get(name, None)
        if not isinstance(value, str):
            raise self.error(name, "text")
        return value

    def from_zero(self, name: str, default: float) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not value >= 0:
            raise self.error(name, "a number from 0 on")
        return float(value)

    def sequence(self, name: str) -> list[Any]:
        value = self._get(name, None)
        if not isinstance(value, list):
            raise self.error(name, "a list")
        return value

    def optional(self, name: str, default: Any) -> Any:
        """The value as it is; null counts as given."""
        return self._get(name, default)

    def triple(self, name: str) -> tuple[float, float, float]:
        value = self._get(name, None)
        if not isinstance(value, list) or len(value) != 3 or any(type(v) not in (int, float) for v in value):
            raise self.error(name, "a list of three numbers")
        return (float(value[0]), float(value[1]), float(value[2]))

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        value = default if value is None else value
        if type(value) is not bool:
            raise self.error(name, "true or false")
        return value

    def choice(self, name: str, *allowed: Any, default: Any = None) -> Any:
        """The value, which must be one of those that are understood."""
        value = self._get(name, default)
        if value not in allowed:
            raise self.error(name, " or ".join(repr(a) for a in allowed))
        return value

    def fixed(self, **values: Any) -> None:
        """Keys that may be absent, and otherwise have to hold the one value that is understood."""
        for name, value in values.items():
            found = self._get(name, value)
            if found != value and not (found is None and not value):  # null says no
                raise self.error(name, repr(value))

    def section(self, name: str) -> Fields:
        """A nested object, empty where the key is absent or null."""
        self.seen.add(name)
        value = self.data.get(name) or {}
        if not isinstance(value, Mapping):
            raise self.error(name, "an object")
        return Fields(value, f"{self.source}: {name}")

    def ignore(self, *names: str) -> None:
        """Keys known not to change what is computed."""
        self.seen.update(names)

    def build(self, kind: type[Config], **values: Any) -> Config:
        """The config made of what was read. Raises ConfigError if a key is left over, or a value is out of range."""
        self.done()
        return build(kind, self.source, values)

    def done(self) -> None:
        """Raises ConfigError if a key is left over."""
        for name in sorted(set(self.data) - self.seen):
            raise ConfigError(
                f"{self.source}: {name!r} is set to {self.data[name]!r}, which this version does not understand",
                "it may change what the model computes, so it is not ignored",
            )

    def error(self, name: str, expected: str) -> ConfigError:
        found = f"is {self.data[name]!r}" if name in self.data else "is missing"
        return ConfigError(f"{self.source}: {name!r} {found}, expected {expected}")

    def _get(self, name: str, default: Any) -> Any:
        self.seen.add(name)
        return self.data.get(name, default)
