"""The LLM of a 4-bit model as a folder that transformers, vLLM and AutoAWQ load: AutoAWQ's GEMM layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge import architecture, fsio
from vila_edge.config import LlmConfig, RopeConfig
from vila_edge.errors import CheckpointError, ParityError, UsageError
from vila_edge.export.awq_formats import pack_gemm, packed_names
from vila_edge.int4 import Int4
from vila_edge.parameters import Shape, ShapeOps, is_quantised
from vila_edge.tensorfile import DTYPES, Spec, write_stream
from vila_edge.version import __version__

INDEX = "model.safetensors.index.json"
MADE_BY = "vila_edge"  # in the metadata of the index: the version that wrote it

_TOKENIZER = ("tokenizer.json", "tokenizer.model")  # one of them there must be
_TOKENIZER_FILES = (
    *_TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_MAX_TOKENIZER_BYTES = 256 << 20
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


@dataclass(frozen=True)
class LlmWeights:
    """Where the weights come from, by the architecture's names (`llm.model...`), and one at a time.

    read: floats of any width of a parameter. read_int4: the integers of a linear, named without `.weight`.
    """

    config: LlmConfig
    group_size: int
    read: Callable[[str], NDArray[Any]]
    read_int4: Callable[[str], Int4]


def write_autoawq(
    target: Path,
    source: LlmWeights,
    tokenizer: Path,
    bos_token_id: int | None,
    eos_token_id: int | list[int] | None,
    replace: bool = False,
    within: Path | None = None,
) -> None:
    """Write `target`, whole or not at all: config, tokenizer files of the folder `tokenizer`, a file for each block.

    It is made `within` a folder on the same disk, by default beside it. What is not in 4 bits becomes float16. Raises UsageError if `target` exists or the format cannot hold the model,
    CheckpointError if there is no tokenizer, ParityError if a value does not fit into 16 bits.
    """
    shapes = _shapes(source.config)
    _check(source, shapes)
    ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    ids = {key: value for key, value in ids.items() if value is not None}
    with fsio.new_folder(target, replace, within) as folder:
        _copy_tokenizer(tokenizer, folder)
        fsio.write_bytes(folder / "config.json", fsio.json_bytes(hf_config(source.config, source.group_size) | ids))
        fsio.write_bytes(folder / "generation_config.json", fsio.json_bytes(ids))
        files = _files(shapes)
        weight_map: dict[str, str] = {}
        total = 0
        for number, names in enumerate(files, 1):
            file = f"model-{number:05}-of-{len(files):05}.safetensors"
            specs = {part: spec for name in names for part, spec in _specs(name, shapes[name], source.group_size)}
            write_stream(folder / file, specs, _reader(names, source), {"format": "pt"})  # transformers asks for it
            weight_map |= dict.fromkeys(specs, file)
            total += _bytes(specs.values())
        index = {"metadata": {"total_size": total, MADE_BY: __version__}, "weight_map": weight_map}
        fsio.write_bytes(folder / INDEX, fsio.json_bytes(index))


def weight_bytes(cfg: LlmConfig, group_size: int) -> int:
    """What the tensors of such a folder take."""
    return sum(_bytes(spec for _, spec in _specs(name, shape, group_size)) for name, shape in _shapes(cfg).items())


def hf_config(cfg: LlmConfig, group_size: int) -> dict[str, Any]:
    """The config.json of the LLM, as transformers has it."""
    config = {
        "architectures": [_ARCHITECTURES[cfg.model_type]],
        "model_type": cfg.model_type,
        "hidden_act": "silu",
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_hidden_layers,
        "num_attention_heads": cfg.num_attention_heads,
        "num_key_value_heads": cfg.num_key_value_heads,
        "head_dim": cfg.head_dim,
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.context_length,
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_theta": cfg.rope.rope_theta,
        "rope_scaling": _rope_scaling(cfg.rope),
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "torch_dtype": "float16",
        "use_cache": True,
        "quantization_config": {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        },
    }
    if cfg.model_type == "llama":
        return config | {"attention_bias": False, "mlp_bias": False}
    return config | {"use_sliding_window": False, "sliding_window": None}


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.rope_type == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.rope_type, "factor": rope.factor}
    if rope.rope_type == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
        scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    return scaling


def _shapes(cfg: LlmConfig) -> dict[str, Shape]:
    """Shapes of the LLM's parameters by name."""
    ops = ShapeOps()
    embeds = architecture.embed_tokens(ops, (1, 1), cfg)
    architecture.lm_head(ops, architecture.decoder(ops, embeds, cfg), cfg)
    return ops.shapes


def _check(source: LlmWeights, shapes: dict[str, Shape]) -> None:
    for name, shape in shapes.items():
        if is_quantised(name) and (shape[0] % 8 or shape[1] % source.group_size):
            raise UsageError(
                f"{name}: a weight {list(shape)} in groups of {source.group_size} does not fit AutoAWQ's format, "
                "which needs outputs by 8 and whole groups"
            )


def _copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    if not any((tokenizer / name).is_file() for name in _TOKENIZER):
        raise CheckpointError(f"{tokenizer}: has no tokenizer, expected {' or '.join(_TOKENIZER)}")
    for name in _TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            data = fsio.read_bytes(tokenizer / name, _MAX_TOKENIZER_BYTES, follow_links=True)
            fsio.write_bytes(folder / name, data)


def _files(shapes: dict[str, Shape]) -> list[list[str]]:
    """Names for each file: what lies outside of the blocks, then a file for each block."""
    files: dict[str, list[str]] = {"": []}
    block = f"{architecture.LLM}.layers."
    for name in shapes:
        layer = name.removeprefix(block).partition(".")[0] if name.startswith(block) else ""
        files.setdefault(layer, []).append(name)
    return list(files.values())


def _specs(name: str, shape: Shape, group_size: int) -> list[tuple[str, Spec]]:
    """Name, type and shape of what is stored for a parameter."""
    stored = name.removeprefix("llm.")
    if not is_quantised(name):
        return [(stored, ("F16", shape))]
    (rows, columns), groups = shape, shape[1] // group_size
    specs: list[Spec] = [("I32", (columns, rows // 8)), ("F16", (groups, rows)), ("I32", (groups, rows // 8))]
    return list(zip(packed_names("autoawq-gemm", stored.removesuffix(".weight")), specs, strict=True))


def _bytes(specs: Iterable[Spec]) -> int:
    return sum(math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape in specs)


def _reader(names: list[str], source: LlmWeights) -> Callable[[str], list[NDArray[Any]]]:
    """Reads the tensors of a file: a block at once, large tables one by one."""
    if any(map(is_quantised, names)):
        tensors = dict(pair for name in names for pair in _tensors(name, source))
        return lambda part: [tensors[part]]
    return lambda part: [tensor for _, tensor in _tensors(f"llm.{part}", source)]


def _tensors(name: str, source: LlmWeights) -> Iterator[tuple[str, NDArray[Any]]]:
    """What is stored for a parameter, read now."""
    stored = name.removeprefix("llm.")
    if is_quantised(name):
        weight = source.read_int4(name.removesuffix(".weight"))
        yield from pack_gemm(stored.removesuffix(".weight"), weight).items()
        return
    values = source.read(name)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise ParityError(f"{name}: its largest value {np.abs(values).max():.4g} does not fit into 16 bits (65504)")
    yield stored, half
