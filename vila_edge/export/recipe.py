"""What to export, and how: from the command line, or from a TOML file as export/recipes/ has them."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vila_edge import fsio
from vila_edge.config import VilaConfig
from vila_edge.errors import ConfigError, InputError, UsageError
from vila_edge.export.awq_formats import Packed
from vila_edge.export.eras import Choices
from vila_edge.export.gate import Gate
from vila_edge.export.storage import Storage
from vila_edge.plain import from_plain
from vila_edge.stored import Form

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Quantization = Literal["int4", "fp16", "fp32"]
QUANTIZATIONS: tuple[Quantization, ...] = ("int4", "fp16", "fp32")
LmHead = Literal["auto", "fp16", "int8", "int4"]
LM_HEADS: tuple[LmHead, ...] = ("auto", "fp16", "int8", "int4")
VISIONS: tuple[Literal["fp16", "int8"], ...] = ("fp16", "int8")
SearchDtype = Literal["float32", "bfloat16"]
SEARCH_DTYPES: tuple[SearchDtype, ...] = ("float32", "bfloat16")
METHODS: tuple[Literal["awq", "rtn"], ...] = ("awq", "rtn")

# Where recipes lie: in an installed package, and in a checkout.
_FOLDERS = (Path(__file__).parent / "recipes", Path(__file__).parents[2] / "export" / "recipes")


@dataclass(frozen=True)
class Recipe:
    """int4: AWQ for the linears of the decoder blocks, 16 bits for the rest. fp16 and fp32 store all weights so.

    `lm_head` "auto" is int8 where that does not change what the model says, else fp16. `method` "rtn" rounds to
    nearest, without a search: to compare with.
    """

    quantization: Quantization = "int4"
    method: Literal["awq", "rtn"] = "awq"
    group_size: int = 128
    symmetric: bool = False
    lm_head: LmHead = "auto"
    vision: Literal["fp16", "int8"] = "fp16"
    calibration: Path | None = None  # a folder of samples; None takes the built-in ones
    calibration_tokens: int = 2048  # positions that are searched with, at most
    search_dtype: SearchDtype = "float32"  # bfloat16 is faster on CPUs that multiply in it, and as good in practice
    name: str = ""  # of the model; by default the checkpoint's folder
    license_note: str = ""
    gate: Gate = field(default_factory=Gate)
    choices: Choices = field(default_factory=Choices)

    def storage(self, packed: Packed | None, lm_head: Form) -> Storage:
        """The forms of all parameters. A checkpoint that is in 4 bits already keeps its groups."""
        if self.quantization != "int4":
            every: Form = self.quantization
            return Storage(every, every, every, every)
        group_size, symmetric = (packed.group_size, packed.symmetric) if packed else (self.group_size, self.symmetric)
        return Storage("int4", lm_head, self.vision, "fp16", group_size, symmetric)

    def check(self, cfg: VilaConfig, packed: Packed | None = None) -> None:
        """Raises UsageError if it does not fit a model, which may be `packed` in 4 bits already."""
        if self.quantization != "int4" and (self.lm_head not in ("auto", "fp16") or self.vision != "fp16"):
            raise UsageError(f"--quant {self.quantization} stores all weights so; --lm-head and --vision are for int4")
        if self.calibration_tokens < 1:
            raise UsageError(f"--calibration-tokens {self.calibration_tokens}: expected a positive number")
        widths = {cfg.llm.hidden_size, cfg.llm.intermediate_size, cfg.llm.num_attention_heads * cfg.llm.head_dim}
        size = self.group_size
        if packed:  # whose groups stay as they are
            self._check_kept(packed)
            return
        if self.quantization == "int4" and (size < 16 or size & (size - 1) or any(width % size for width in widths)):
            raise UsageError(
                f"group_size {size}: expected a power of two from 16 on that divides "
                f"{', '.join(map(str, sorted(widths)))}",
                "these are the numbers of inputs that the LLM's linears have; 128, 64 and 32 are usual",
            )

    def _check_kept(self, packed: Packed) -> None:
        """Raises UsageError for another form of 4 bits than those that are kept. What only steers a search may be said."""
        others = {
            f"-g {self.group_size}": self.group_size not in (packed.group_size, Recipe.group_size),
            "--symmetric": self.symmetric and not packed.symmetric,
            f"--method {self.method}": self.method != Recipe.method,
        }
        said = [option for option, other in others.items() if other]
        if self.quantization == "int4" and said:
            raise UsageError(
                f"{', '.join(said)}: the checkpoint is in 4 bits already ({packed.format}, groups of "
                f"{packed.group_size}), which are kept",
                "leave it away, or export the checkpoint in 16 bits that this one was made of",
            )


def read_recipe(name: str) -> Recipe:
    """A recipe: the path of a TOML file, or the name of one that comes with vila-edge.

    Raises InputError that names the file and the field, UsageError if there is no such recipe.
    """
    known = {path.stem.lower(): path for folder in _FOLDERS for path in sorted(folder.glob("*.toml"))}
    path = known.get(name.lower(), Path(name))
    if not path.is_file():
        raise UsageError(f"no recipe {name!r}", f"a path, or one of: {', '.join(sorted(known))}")
    try:
        data = tomllib.loads(fsio.read_text(path, 1 << 20))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not TOML: {error}") from None
    return _recipe(data, path)


def recipes() -> dict[str, Path]:
    """Name -> file of every recipe that comes with vila-edge."""
    return {path.stem: path for folder in _FOLDERS for path in sorted(folder.glob("*.toml"))}


def _recipe(data: dict[str, Any], path: Path) -> Recipe:
    """What a file says, over the defaults. Paths in it are seen from its folder."""
    default = dataclasses.asdict(Recipe())
    for section in ("gate", "choices"):
        if not isinstance(data.get(section, {}), dict):
            raise ConfigError(f"{path}: {section!r} is {data[section]!r}, expected a table [{section}]")
        data[section] = default[section] | data.get(section, {})
    for values, key in ((data, "calibration"), (data["choices"], "vision_tower")):
        if isinstance(values.get(key), str):
            values[key] = (path.parent / values[key]).resolve()
    for limit, value in data["gate"].items():
        if value != value:  # every comparison with it is false, so it would let everything pass
            raise ConfigError(f"{path}: gate.{limit} is {value}, expected a number")
    try:
        return from_plain(Recipe, default | data, str(path))
    except UsageError as error:  # a name in [choices], told as an option of the command line
        said = error.message.removeprefix("--").replace("token-order", "token_order", 1)
        raise ConfigError(f"{path}: choices.{said}", error.hint) from None
