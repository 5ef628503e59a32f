"""The sizes and choices that make one VILA: read once, checked once, derived from everywhere.

Field names are those of the checkpoint's own `config.json` files. A key that is missing is named;
a key that is not understood is refused, because it might change the maths.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from vila_edge.errors import ConfigError

TokenOrder = Literal["row_major", "column_major"]
Tokenization = Literal["per_chunk"]

Config = TypeVar("Config")

MAX_LAYERS = 1024  # several times what any published model has; every layer costs time before anything is read


class Heads(NamedTuple):
    """How attention divides its width. Fewer `key_value` than `query` heads: grouped queries."""

    query: int
    key_value: int
    dim: int


@dataclass(frozen=True)
class VisionConfig:
    """A SigLIP vision tower. Features are the hidden states after all but the last block."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    select_layer: int  # index into the hidden states: -2 leaves the last block out

    def __post_init__(self) -> None:
        _check_numbers(self, all_but=("select_layer",))
        _check_divides(self, "num_attention_heads", "hidden_size")
        if not 1 <= -self.select_layer <= self.num_hidden_layers:
            raise ConfigError(f"select_layer {self.select_layer}: expected from -{self.num_hidden_layers} to -1")
        if self.patch_size > self.image_size:
            raise ConfigError(f"patch_size {self.patch_size} is larger than image_size {self.image_size}")

    @property
    def grid_size(self) -> int:
        """Patches per side. Pixels that do not fill a patch are not looked at."""
        return self.image_size // self.patch_size

    @property
    def num_layers_run(self) -> int:
        """Blocks that the selected hidden state has passed through."""
        return self.num_hidden_layers + 1 + self.select_layer

    @property
    def heads(self) -> Heads:
        n = self.num_attention_heads
        return Heads(n, n, self.hidden_size // n)


@dataclass(frozen=True)
class ProjectorConfig:
    """The step from image_features to image_embeds."""

    mm_projector_type: Literal["mlp_downsample"]

    @property
    def downsample(self) -> int:
        """Patches per side that are folded into one token."""
        return 2


@dataclass(frozen=True)
class LlmConfig:
    """A LLaMA decoder."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    context_length: int  # positions it was made for, all limits of the checkpoint considered
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_divides(self, "num_key_value_heads", "num_attention_heads")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim}: expected an even number, for rotary embeddings")

    @property
    def heads(self) -> Heads:
        return Heads(self.num_attention_heads, self.num_key_value_heads, self.head_dim)


@dataclass(frozen=True)
class PreprocessConfig:
    """From an RGB image to pixel_values: bicubic resize, `* rescale_factor`, `(x - mean) / std`."""

    image_aspect_ratio: Literal["resize"]
    image_size: int
    rescale_factor: float
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    def __post_init__(self) -> None:
        _check_numbers(self)
        if not all(map(math.isfinite, self.image_mean)):
            raise ConfigError(f"image_mean {list(self.image_mean)}: expected finite numbers")
        if not all(0 < std < math.inf for std in self.image_std):
            raise ConfigError(f"image_std {list(self.image_std)}: expected positive numbers")


@dataclass(frozen=True)
class Profile:
    """What an era of VILA does beyond the sizes. Code asks the profile, never a model's name."""

    era: str
    token_order: TokenOrder  # of the tokens that `mlp_downsample` emits (spec: silent if wrong)
    tokenization: Tokenization  # per_chunk: the text between two images is tokenised alone
    template: str


@dataclass(frozen=True)
class VilaConfig:
    """One VILA."""

    vision_tower: VisionConfig
    mm_projector: ProjectorConfig
    llm: LlmConfig
    preprocess: PreprocessConfig
    profile: Profile

    @property
    def tokens_per_image(self) -> int:
        side = -(-self.vision_tower.grid_size // self.mm_projector.downsample)  # rounds up
        return side * side


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
    return _build(kind, source, {name: _value(hint, data[name], f"{source}.{name}") for name, hint in hints.items()})


def _build(kind: type[Config], source: str, values: dict[str, Any]) -> Config:
    """What `kind` refuses is said with the source of the values."""
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error.message}") from None


def _value(hint: Any, value: object, source: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value, source)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(arguments):
        return tuple(_value(h, v, f"{source}[{i}]") for i, (h, v) in enumerate(zip(arguments, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {key: _value(arguments[1], v, f"{source}.{key}") for key, v in value.items()}
    if (origin is Literal and value in arguments) or hint is Any:
        return value
    if hint is float and type(value) in (int, float):
        return float(typing.cast(float, value))
    if hint in (int, str, bool) and type(value) is hint:
        return value
    expected = getattr(hint, "__name__", None) if not origin else str(hint).replace("typing.", "")
    raise ConfigError(f"{source}: expected {expected}, found {value!r}")


def _check_numbers(config: Any, all_but: tuple[str, ...] = ()) -> None:
    """Raises ConfigError unless sizes and constants are positive and finite, and the layers a sane number."""
    if getattr(config, "num_hidden_layers", 0) > MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers {config.num_hidden_layers:,}: expected at most {MAX_LAYERS:,}")
    for name, value in vars(config).items():
        number = type(value) in (int, float) and name not in all_but
        if number and not 0 < value < math.inf:
            raise ConfigError(f"{name} {value}: expected a positive number")


def _check_divides(config: Any, part: str, whole: str) -> None:
    if getattr(config, whole) % getattr(config, part):
        raise ConfigError(f"{whole} {getattr(config, whole)} is not a multiple of {part} {getattr(config, part)}")


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
        if type(value) is not int or value < 1:
            raise self.error(name, "a positive whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not value > 0:
            raise self.error(name, "a positive number")
        return float(value)

    def triple(self, name: str) -> tuple[float, float, float]:
        value = self._get(name, None)
        if not isinstance(value, list) or len(value) != 3 or any(type(v) not in (int, float) for v in value):
            raise self.error(name, "a list of three numbers")
        return (float(value[0]), float(value[1]), float(value[2]))

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
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
            self.choice(name, value, default=value)

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
        return _build(kind, self.source, values)

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
