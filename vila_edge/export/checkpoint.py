"""A trained VILA on the disk, of any era: its config, its tokenizer, and its parameters by the architecture's names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge import fsio
from vila_edge.architecture import VISION_TOWER
from vila_edge.config import TokenizerConfig, VilaConfig
from vila_edge.errors import CheckpointError
from vila_edge.export.checkpoint_config import read_config
from vila_edge.export.eras import Choices, detect
from vila_edge.export.layouts import Files, open_files, read_json
from vila_edge.export.sentencepiece_model import convert
from vila_edge.parameters import component, parameter_shapes
from vila_edge.templates import get_template
from vila_edge.tokenizer import Tokenizer

SLOW_TOKENIZER_PREFIX = "▁"  # sentencepiece's blank


class Checkpoint:
    """An opened checkpoint."""

    def __init__(self, path: str | Path, choices: Choices | None = None) -> None:
        """Checks that every parameter is there and of the right shape; reads none of them.

        Raises CheckpointError or ConfigError that names the file.
        """
        self.path = Path(path)
        self.files = open_files(self.path, choices.vision_tower if choices else None)
        self.tokenizer_json, config = _tokenizer(self.files)
        tokenizer = Tokenizer(self.tokenizer_json, str(self.files.tokenizer / "tokenizer.json"), config)
        profile, self.warnings = detect(self.files, tokenizer, _eos_tokens(self.files, tokenizer), choices or Choices())
        self.config = read_config(self.files, profile, config)
        self.tokenizer_json = _protect(self.tokenizer_json, self.config)
        self._check_tensors()

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.tokenizer_json, str(self.files.tokenizer / "tokenizer.json"), self.config.tokenizer)

    def parameter(self, name: str) -> NDArray[np.float32]:
        """A parameter in float32, read from the disk. Raises CheckpointError if it is not finite."""
        stored = self.files.tensors[name]
        values = stored.file.float32(stored.name)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{stored.file.path}: tensor {stored.name!r} is not finite")
        return values

    def parameters(self) -> dict[str, NDArray[np.float32]]:
        """All parameters."""
        return {name: self.parameter(name) for name in parameter_shapes(self.config)}

    def sha256(self) -> str:
        """Digest of what an export reads: configs, tokenizer and parameters."""
        digest, root = hashlib.sha256(), self.path.resolve()
        named = {}
        for path in self.files.paths:
            place = path.parent.resolve() / path.name
            inside = place.is_relative_to(root)
            named[(place.relative_to(root) if inside else Path("vision_tower") / path.name).as_posix()] = path
        for name in sorted(named):
            digest.update(f"{name} {fsio.sha256(named[name].resolve())}\n".encode())
        return digest.hexdigest()

    def _check_tensors(self) -> None:
        shapes = parameter_shapes(self.config)
        for name, shape in shapes.items():
            if name not in self.files.tensors:
                place = self.path if self.files.single_folder else self.path / component(name)
                raise CheckpointError(f"{place}: no tensor {name.partition('.')[2]!r}, expected shape {list(shape)}")
            stored = self.files.tensors[name]
            found = stored.file.entries[stored.name].shape
            if found != shape:
                raise CheckpointError(
                    f"{stored.file.path}: tensor {stored.name!r} has shape {list(found)}, expected {list(shape)} "
                    "by config.json"
                )
        for name in sorted(set(self.files.tensors) - set(shapes)):
            if not _is_inert(name, self.config):
                stored = self.files.tensors[name]
                raise CheckpointError(
                    f"{stored.file.path}: holds {stored.name!r}, for which the config.json of its part has no use",
                    "a model without it would compute something else: check that config.json belongs to these weights",
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
