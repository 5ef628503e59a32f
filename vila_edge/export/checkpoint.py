"""A trained VILA on the disk, of any era: its config, its tokenizer, and its parameters by the architecture's names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vila_edge import fsio
from vila_edge.architecture import VISION_TOWER
from vila_edge.config import TokenizerConfig, VilaConfig
from vila_edge.errors import CheckpointError
from vila_edge.export import awq_formats
from vila_edge.export.awq_formats import Packed, Packing, Tensors, check_parts, packed_names
from vila_edge.export.checkpoint_config import read_config
from vila_edge.export.eras import Choices, detect
from vila_edge.export.layouts import Files, open_files, read_json
from vila_edge.export.packed_layout import QUANTIZATION_CONFIG
from vila_edge.export.sentencepiece_model import convert
from vila_edge.int4 import MIDDLE, Int4
from vila_edge.parameters import Shape, component, is_quantised, parameter_shapes
from vila_edge.templates import get_template
from vila_edge.tokenizer import Tokenizer

T = TypeVar("T")

SLOW_TOKENIZER_PREFIX = "▁"  # sentencepiece's blank


class Checkpoint:
    """An opened checkpoint."""

    def __init__(self, path: str | Path, choices: Choices | None = None) -> None:
        """Checks that every parameter is there and of the right shape; reads none of them.

        Raises CheckpointError or ConfigError that names the file.
        """
        self.path = Path(path)
        try:
            self._open(choices or Choices())
        except OSError as error:  # of a folder that may not be entered, for one
            raise _cannot_read(Path(error.filename or self.path), error) from None

    def _open(self, choices: Choices) -> None:
        self.files = open_files(self.path, choices.vision_tower)
        self.tokenizer_json, config = _tokenizer(self.files)
        tokenizer = Tokenizer(self.tokenizer_json, str(self.files.tokenizer / "tokenizer.json"), config)
        profile, warnings = detect(self.files, tokenizer, _eos_tokens(self.files, tokenizer), choices)
        self.warnings = [*self.files.warnings, *warnings]
        self.config = read_config(self.files, profile, config)
        self.tokenizer_json = _protect(self.tokenizer_json, self.config)
        self._packed_linears: list[str] = []
        self._check_tensors()

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.tokenizer_json, str(self.files.tokenizer / "tokenizer.json"), self.config.tokenizer)

    def parameter(self, name: str) -> NDArray[np.float32]:
        """A parameter in float32, read from the disk. Raises CheckpointError if it is not finite.

        A linear in 4 bits comes as the weight that its format stands for.
        """
        linear = name.removesuffix(".weight")
        if linear in self._packed_linears:
            return self._unpack(linear, awq_formats.dequantize)
        stored = self.files.tensors[name]
        values = stored.file.float32(stored.name)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{stored.file.path}: tensor {stored.name!r} is not finite")
        return values

    def int4(self, linear: str) -> Int4 | None:
        """The integers of a linear (a parameter's name without `.weight`), or None if it is stored as floats.

        In llm-awq's v2 the weights that they stand for are off from `parameter`'s by the rounding of its zero points.
        Raises CheckpointError if scales or zero points are damaged.
        """
        return self._unpack(linear, awq_formats.unpack) if linear in self._packed_linears else None

    @cached_property
    def packed(self) -> Packed | None:
        """How the linears in 4 bits are stored; None if there are none.

        Reads zero points, up to the first linear that is not symmetric. Raises CheckpointError as `int4` does.
        """
        packing = self.files.packing
        if packing is None:
            return None
        symmetric = all(
            (self._unpack(linear, awq_formats.zero_points) == MIDDLE).all() for linear in self._packed_linears
        )
        return Packed(packing.format, packing.group_size, symmetric)

    def stored_dtype(self, name: str) -> str:
        """The type in which a parameter is stored, as safetensors calls it; "I4" for a linear in 4 bits."""
        if name.removesuffix(".weight") in self._packed_linears:
            return "I4"
        stored = self.files.tensors[name]
        return stored.file.entries[stored.name].dtype

    def parameters(self) -> dict[str, NDArray[np.float32]]:
        """All parameters."""
        return {name: self.parameter(name) for name in parameter_shapes(self.config)}

    def sha256(self) -> str:
        """Digest of what an export reads: configs, tokenizer and parameters. Raises CheckpointError."""
        digest, root = hashlib.sha256(), self.path.resolve()
        named = {}
        for path in self.files.paths:
            place = path.parent.resolve() / path.name
            inside = place.is_relative_to(root)
            named[(place.relative_to(root) if inside else Path("vision_tower") / path.name).as_posix()] = path
        for name in sorted(named):
            try:
                found = fsio.sha256(named[name].resolve())
            except OSError as error:
                raise _cannot_read(named[name], error) from None
            digest.update(f"{name} {found}\n".encode())
        return digest.hexdigest()

    def _check_tensors(self) -> None:
        shapes, tensors = parameter_shapes(self.config), self.files.tensors
        known = set(shapes)
        for name, shape in shapes.items():
            linear = name.removesuffix(".weight")
            if is_quantised(name) and f"{linear}.qweight" in tensors and name not in tensors:
                known |= set(self._check_packed(linear, shape))
                self._packed_linears.append(linear)
                continue
            if name not in tensors:
                place = self.path if self.files.single_folder else self.path / component(name)
                raise CheckpointError(f"{place}: no tensor {name.partition('.')[2]!r}, expected shape {list(shape)}")
            stored = tensors[name]
            found = stored.file.entries[stored.name].shape
            if found != shape:
                raise CheckpointError(
                    f"{stored.file.path}: tensor {stored.name!r} has shape {list(found)}, expected {list(shape)} "
                    "by config.json"
                )
        for name in sorted(set(tensors) - known):
            if not _is_inert(name, self.config):
                stored = tensors[name]
                raise CheckpointError(
                    f"{stored.file.path}: holds {stored.name!r}, for which the config.json of its part has no use",
                    "a model without it would compute something else: check that config.json belongs to these weights",
                )
        if self.files.packing and not self._packed_linears:
            raise CheckpointError(
                f"{self.files.configs['llm'].source}: says that the weights are in 4 bits, but no linear has a qweight",
                f"if the weights are floats, remove {QUANTIZATION_CONFIG!r} from it",
            )

    def _check_packed(self, linear: str, shape: Shape) -> tuple[str, ...]:
        """The names of a packed linear's parts, all there and of the right type and shape."""
        stored, packing = self.files.tensors[f"{linear}.qweight"], self.files.packing
        path = stored.file.path
        if packing is None:
            raise CheckpointError(
                f"{path}: holds {stored.name!r}, a linear in 4 bits, but {self.files.configs['llm'].source} has no "
                f"{QUANTIZATION_CONFIG!r}",
                "add what was written beside these weights: quant_method, bits, group_size, version",
            )
        names = packed_names(packing.format, linear)
        parts = [self.files.tensors[name] for name in names if name in self.files.tensors]
        entries = {part.name: part.file.entries[part.name] for part in parts}
        found = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
        try:
            check_parts(packing, stored.name.removesuffix(".qweight"), found, (shape[0], shape[1]))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error.message}", error.hint) from None
        return names

    def _unpack(self, linear: str, compute: Callable[[Packing, str, Tensors], T]) -> T:
        """What `compute` makes of a packed linear, whose parts are mapped."""
        packing = self.files.packing
        assert packing is not None, linear
        parts = [self.files.tensors[name] for name in packed_names(packing.format, linear)]
        try:
            name = parts[0].name.removesuffix(".qweight")
            return compute(packing, name, {part.name: part.file.array(part.name) for part in parts})
        except CheckpointError as error:
            raise CheckpointError(f"{parts[0].file.path}: {error.message}", error.hint) from None


def _cannot_read(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: {error.strerror or error}, expected a part of the checkpoint that can be read",
        "copy the checkpoint again, or make it readable: chmod -R u+rX CHECKPOINT",
    )


def _tokenizer(files: Files) -> tuple[str, TokenizerConfig]:
    """tokenizer.json, converted if only a sentencepiece model is there, and what that does not say."""
    folder = files.tokenizer
    path = folder / "tokenizer.json"
    slow = (folder / "tokenizer.model").is_file()
    kind = _tokenizer_config(folder).get("tokenizer_class")
    # Where a slow LLaMA tokenizer exists, the original takes that one (spec section 3.3).
    if slow and (not path.is_file() or kind in ("LlamaTokenizer", "LlamaTokenizerFast")):
        converted = convert(folder)
        config = TokenizerConfig(converted.bos_token, SLOW_TOKENIZER_PREFIX, converted.special_tokens)
        return converted.tokenizer_json, config
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; expected a tokenizer.json or a tokenizer.model")
    bos = _tokenizer_config(folder).get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    if bos is not None and not isinstance(bos, str):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: 'bos_token' is {bos!r}, expected text")
    tokenizer_json = fsio.read_text(path, follow_links=True)
    if bos is not None and Tokenizer(tokenizer_json, str(path)).control_id(bos) is None:
        bos = None
    return tokenizer_json, TokenizerConfig(bos)


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _eos_tokens(files: Files, tokenizer: Tokenizer) -> set[str]:
    """Tokens that end a text, by the tokenizer and by the LLM's configs."""
    eos = _tokenizer_config(files.tokenizer).get("eos_token")
    found = {eos.get("content") if isinstance(eos, dict) else eos}
    path = files.tokenizer / "generation_config.json"
    for values in (files.configs["llm"].data, read_json(path) if path.is_file() else {}):
        ids = values.get("eos_token_id")
        for i in ids if isinstance(ids, list) else [ids]:
            found.add(tokenizer.control_token(i) if type(i) is int else None)
    return {token for token in found if isinstance(token, str)}


def _protect(tokenizer_json: str, cfg: VilaConfig) -> str:
    """The tokenizer with all control tokens of the template marked as special: what is typed never becomes one."""
    controls = {*get_template(cfg.profile.template).controls, *cfg.profile.stop_tokens, *cfg.tokenizer.special_tokens}
    data = json.loads(tokenizer_json)
    for token in data.get("added_tokens", []):
        token["special"] = token["special"] or token["content"] in controls
    return json.dumps(data, ensure_ascii=False, indent=1)


def _is_inert(name: str, cfg: VilaConfig) -> bool:
    """Whether a stored tensor is known to have no part in inference."""
    if name.endswith((".rotary_emb.inv_freq", ".position_ids")):  # follow from the config
        return True
    if name == "llm.lm_head.weight":
        return cfg.llm.tie_word_embeddings
    if name.startswith(_OTHER_HALF_OF_CLIP):
        return True
    behind = range(cfg.vision_tower.num_layers_run, cfg.vision_tower.num_hidden_layers)
    parts = ("head.", "post_layernorm.", *(f"encoder.layers.{layer}." for layer in behind))
    return name.startswith(tuple(f"{VISION_TOWER}.{part}" for part in parts))


_OTHER_HALF_OF_CLIP = tuple(
    f"vision_tower.{name}" for name in ("text_model.", "logit_scale", "text_projection.", "visual_projection.")
)
