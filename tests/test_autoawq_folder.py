"""The folder for transformers, vLLM and AutoAWQ: what it holds is the model, and it is there whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.families import TOKENIZERS
from vila_edge import architecture, int4
from vila_edge.config import LlmConfig, RopeConfig
from vila_edge.errors import CheckpointError, ParityError, UsageError
from vila_edge.export.autoawq_folder import INDEX, LlmWeights, write_autoawq
from vila_edge.export.awq_formats import Packing, check_parts, unpack_gemm
from vila_edge.int4 import Int4
from vila_edge.parameters import ShapeOps, is_quantised
from vila_edge.reference.torch_ops import TorchOps

LLAMA = LlmConfig("llama", 128, 256, 2, 8, 2, 16, 320, 96, 1e-5, RopeConfig(5e5), False)
QWEN2 = dataclasses.replace(LLAMA, model_type="qwen2", rms_norm_eps=1e-6, rope=RopeConfig(1e6))
CONFIGS = {
    "llama": LLAMA,
    "linear rope": dataclasses.replace(LLAMA, rope=RopeConfig(1e4, "linear", 2.0)),
    "llama3 rope": dataclasses.replace(LLAMA, rope=RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64)),
    "other head width": dataclasses.replace(LLAMA, head_dim=32),
    "qwen2": QWEN2,
    "tied": dataclasses.replace(QWEN2, tie_word_embeddings=True),
}
GROUP = 32

Floats = dict[str, NDArray[np.float32]]


def random_model(cfg: LlmConfig) -> tuple[Floats, dict[str, Int4]]:
    """Parameters of an LLM that 16 bits hold exactly; the quantised ones as integers."""
    ops, rng = ShapeOps(), np.random.default_rng(3)
    architecture.lm_head(ops, architecture.decoder(ops, architecture.embed_tokens(ops, (1, 1), cfg), cfg), cfg)
    floats, linears = Floats(), dict[str, Int4]()
    for name, shape in ops.shapes.items():
        noise = rng.standard_normal(shape) * (0.5 if "embed" in name else 0.1) + ("norm" in name)
        if is_quantised(name):
            linears[name.removesuffix(".weight")] = int4.quantize(noise, GROUP)
        else:
            floats[name] = noise.astype(np.float16).astype(np.float32)
    return floats, linears


def write(target: Path, cfg: LlmConfig, floats: Floats, linears: dict[str, Int4], **options: Any) -> Path:
    source = LlmWeights(cfg, GROUP, floats.__getitem__, linears.__getitem__)
    write_autoawq(target, source, TOKENIZERS[cfg.model_type], 1, [2, 3], **options)
    return target


def stored_tensors(folder: Path) -> dict[str, NDArray[Any]]:
    """All tensors, each in the file in which the index says it is."""
    index = json.loads((folder / INDEX).read_text())
    files: dict[str, Any] = {}
    for name in set(index["weight_map"].values()):
        files[name] = safe_open(folder / name, framework="numpy")
        assert files[name].metadata() == {"format": "pt"}  # or transformers refuses it
    assert sum(len(file.keys()) for file in files.values()) == len(index["weight_map"])
    tensors = {name: files[file].get_tensor(name) for name, file in index["weight_map"].items()}
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    return tensors


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_transformers_computes_the_same_of_config_and_unpacked_tensors(name: str, tmp_path: Path) -> None:
    cfg = CONFIGS[name]
    floats, linears = random_model(cfg)
    folder = write(tmp_path / "awq", cfg, floats, linears)
    tensors = stored_tensors(folder)
    state = {name: torch.from_numpy(array).float() for name, array in tensors.items() if array.dtype == np.float16}
    for part in [part for part in tensors if part.endswith(".qweight")]:
        linear = part.removesuffix(".qweight")
        del state[f"{linear}.scales"]
        state[f"{linear}.weight"] = torch.from_numpy(unpack_gemm(linear, tensors).dequantize())
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if cfg.tie_word_embeddings else [])
    assert config.tie_word_embeddings == cfg.tie_word_embeddings
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, cfg.vocab_size, (2, cfg.context_length)))
    params = floats | {f"{linear}.weight": weight.dequantize() for linear, weight in linears.items()}
    ops = TorchOps({name: torch.from_numpy(array) for name, array in params.items()})
    hidden = architecture.decoder(ops, architecture.embed_tokens(ops, ids, cfg), cfg)
    torch.testing.assert_close(model(ids).logits, architecture.lm_head(ops, hidden, cfg), atol=1e-4, rtol=0)


def test_the_layout_is_autoawq_s(tmp_path: Path) -> None:
    floats, linears = random_model(LLAMA)
    folder = write(tmp_path / "awq", LLAMA, floats, linears)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    assert (config["bos_token_id"], config["eos_token_id"], config["max_position_embeddings"]) == (1, [2, 3], 96)
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": [2, 3]}
    tensors = stored_tensors(folder)
    down = "model.layers.1.mlp.down_proj"
    found = {part: (str(array.dtype), array.shape) for part, array in tensors.items() if part.startswith(down)}
    assert found == {
        f"{down}.qweight": ("int32", (256, 16)),
        f"{down}.qzeros": ("int32", (8, 16)),
        f"{down}.scales": ("float16", (8, 128)),
    }
    safetensors = {part: ({"int32": "I32", "float16": "F16"}[dtype], shape) for part, (dtype, shape) in found.items()}
    check_parts(Packing("autoawq-gemm", GROUP), down, safetensors, (128, 256))
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.int32), np.dtype(np.float16)}
    assert len(list(folder.glob("*.safetensors"))) == LLAMA.num_hidden_layers + 1


def test_the_tokenizer_comes_with_it(tmp_path: Path) -> None:
    for cfg in (LLAMA, QWEN2):
        folder = write(tmp_path / cfg.model_type, cfg, *random_model(cfg))
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
            path = TOKENIZERS[cfg.model_type] / name
            assert (folder / name).is_file() == path.is_file()
            assert not path.is_file() or (folder / name).read_bytes() == path.read_bytes()
        theirs = AutoTokenizer.from_pretrained(TOKENIZERS[cfg.model_type])
        assert AutoTokenizer.from_pretrained(folder)("three images").input_ids == theirs("three images").input_ids


def test_one_tensor_is_asked_for_at_a_time_and_once(tmp_path: Path) -> None:
    floats, linears = random_model(LLAMA)
    asked: list[str] = []

    def noted(read: Callable[[str], Any]) -> Callable[[str], Any]:
        return lambda name: (asked.append(name), read(name))[-1]  # type: ignore[func-returns-value]

    source = LlmWeights(LLAMA, GROUP, noted(floats.__getitem__), noted(linears.__getitem__))
    write_autoawq(tmp_path / "awq", source, TOKENIZERS["llama"], None, None)
    assert sorted(asked) == sorted([*floats, *linears])
    assert "eos_token_id" not in json.loads((tmp_path / "awq" / "config.json").read_text())


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = random_model(QWEN2)
    first, second = (write(tmp_path / name, QWEN2, *model) for name in "ab")
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    assert all(path.read_bytes() == (second / path.name).read_bytes() for path in first.iterdir())


def nothing_is_left(folder: Path) -> bool:
    return list(folder.iterdir()) == []


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    floats, linears = random_model(LLAMA)
    name = "llm.model.norm.weight"
    for value in (np.inf, np.nan, 1e5):
        with pytest.raises(ParityError, match=f"{name}: its largest value .* does not fit into 16 bits"):
            write(tmp_path / "awq", LLAMA, floats | {name: np.full(128, value, np.float32)}, linears)
        assert nothing_is_left(tmp_path)
    folder = write(tmp_path / "awq", LLAMA, floats, linears)
    (folder / "mine").write_text("")
    with pytest.raises(UsageError, match="awq exists already"):
        write(folder, LLAMA, floats, linears)
    assert (folder / "mine").is_file()
    assert not (write(folder, LLAMA, floats, linears, replace=True) / "mine").exists()


def test_what_the_format_cannot_hold_is_a_usage_error(tmp_path: Path) -> None:
    floats, linears = random_model(LLAMA)
    for width in (260, 264):
        with pytest.raises(UsageError, match=r"llm.model.layers.0.mlp.*: a weight \[.*26[04].* does not fit AutoAWQ's"):
            write(tmp_path / "awq", dataclasses.replace(LLAMA, intermediate_size=width), floats, linears)
    assert nothing_is_left(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    floats, linears = random_model(LLAMA)
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(TOKENIZERS["llama"], tokenizer, ignore=shutil.ignore_patterns("tokenizer.model", "tokenizer.json"))
    source = LlmWeights(LLAMA, GROUP, floats.__getitem__, linears.__getitem__)
    with pytest.raises(CheckpointError, match="tokenizer: has no tokenizer, expected tokenizer.json or tokenizer.mod"):
        write_autoawq(tmp_path / "awq", source, tokenizer, 1, 2)
    assert not (tmp_path / "awq").exists()
