"""Checkpoints that are in 4 bits already: every layout in which they were released, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tests.families import FAMILIES, Family, shrink, write_checkpoint
from tests.packed import INDEX, WEIGHTS, edit, pack_checkpoint, quantization_config
from tests.test_awq_formats import LLAMA, same
from vila_edge import architecture, int4
from vila_edge.errors import CheckpointError
from vila_edge.export.awq_formats import Format, Packed
from vila_edge.export.checkpoint import Checkpoint
from vila_edge.parameters import is_quantised, parameter_shapes
from vila_edge.reference.torch_ops import TorchOps
from vila_edge.tensorfile import TensorFile

FORMATS: tuple[Format, ...] = ("autoawq-gemm", "llm-awq-v2")
LINEAR = "model.layers.1.self_attn.k_proj"
PACKED_FILE = "tiny-w4-g32-awq-v2.pt"

Tensors = dict[str, NDArray[Any]]


def tiny(name: str) -> Family:
    """A family, shrunk, whose widths llm-awq can pack: multiples of 64."""
    family = shrink(FAMILIES[name])
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 128, "intermediate_size": 192}
    return dataclasses.replace(family, llm=family.llm | heads) if family.era == "nvila" else family


@pytest.fixture
def v15(tmp_path: Path) -> Path:
    return write_checkpoint(tiny("VILA1.5-3b"), tmp_path)


@pytest.fixture
def gemm(v15: Path) -> Path:
    pack_checkpoint(v15, "autoawq-gemm", 32)
    return v15


@pytest.fixture
def v2(v15: Path) -> Path:
    pack_checkpoint(v15, "llm-awq-v2", 32)
    return v15


def change_tensors(path: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a safetensors file, or of a file of torch."""
    if path.suffix == ".pt":
        tensors = {name: tensor.numpy() for name, tensor in torch.load(path).items()}
        change(tensors)
        torch.save({name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}, path)
        return
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", ["VILA-7b", "VILA1.5-3b", "Llama-3-VILA1.5-8B", "NVILA-8B", "NVILA-Lite-2B"])
def test_a_checkpoint_of_any_era_is_read_in_both_formats(name: str, fmt: Format, tmp_path: Path) -> None:
    path = write_checkpoint(tiny(name), tmp_path)
    before = Checkpoint(path)
    floats, config = before.parameters(), before.config
    assert before.packed is None
    assert before.int4(f"llm.{LINEAR}") is None
    assert before.stored_dtype(f"llm.{LINEAR}.weight") == "F16"
    linears = pack_checkpoint(path, fmt, 32)
    checkpoint = Checkpoint(path)
    assert checkpoint.config == config
    assert checkpoint.packed == Packed(fmt, 32, symmetric=False)
    assert checkpoint.warnings == before.warnings
    found = checkpoint.parameters()
    assert found.keys() == floats.keys()
    for parameter, values in floats.items():
        linear = parameter.removesuffix(".weight")
        packed = checkpoint.int4(linear)
        assert (packed is not None) == (linear in linears) == is_quantised(parameter)
        assert checkpoint.stored_dtype(parameter) == ("F16" if packed is None else "I4")
        if packed is None:
            np.testing.assert_array_equal(found[parameter], values)
            continue
        assert same(packed, linears[linear])
        want = packed.dequantize()
        step = np.repeat(packed.scales.astype(np.float32), 32, 1)
        assert found[parameter].dtype == np.float32
        assert (np.abs(found[parameter] - want) <= (0 if fmt == "autoawq-gemm" else 0.0075) * step).all()
        assert np.abs(want - values).mean() < 0.3 * step.mean()


def torch_logits(checkpoint: Checkpoint, ids: NDArray[np.int32], rounded: bool = False) -> NDArray[np.float32]:
    """Logits of the LLM; `rounded`: with the weights that the integers stand for."""
    names = [name for name in parameter_shapes(checkpoint.config) if name.startswith("llm.")]
    params = {name: torch.from_numpy(checkpoint.parameter(name)) for name in names}
    for name in names if rounded else ():
        if (packed := checkpoint.int4(name.removesuffix(".weight"))) is not None:
            params[name] = torch.from_numpy(packed.dequantize())
    cfg, ops = checkpoint.config.llm, TorchOps(params)
    embeds = architecture.embed_tokens(ops, torch.from_numpy(ids), cfg)
    return architecture.lm_head(ops, architecture.decoder(ops, embeds, cfg), cfg).numpy()


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A VILA1.5 around the LLM that llm-awq packed, laid out as the releases are."""
    config = json.loads((LLAMA / "llm_fp" / "config.json").read_text()) | {"transformers_version": "4.36.2"}
    path = write_checkpoint(dataclasses.replace(tiny("VILA1.5-3b"), llm=config), tmp_path)
    pack_checkpoint(path, "llm-awq-v2", 128)
    shutil.copy(LLAMA / "tiny-w4-g128-awq-v2.pt", path / "llm")
    return path


@torch.inference_mode()
def test_the_logits_of_what_llm_awq_packed(golden: Path) -> None:
    checkpoint, stored = Checkpoint(golden), np.load(LLAMA / "awq.npz")
    want = stored["logits_dequantised_v2_fp32"]
    assert np.abs(torch_logits(checkpoint, stored["probe"]) - want).max() < 1e-4
    assert checkpoint.packed == Packed("llm-awq-v2", 128, symmetric=False)
    # Whole zero points in place of the stored products, which were rounded to 16 bits, cost this much and no more.
    assert np.abs(torch_logits(checkpoint, stored["probe"], rounded=True) - want).max() < 0.01


@pytest.mark.parametrize("name", ["tiny-w4-g32-awq-v2.pt", "NVILA-8B-w4-g32-awq-v2.pt", "vila-7b-w4-g32-v2.pt"])
@pytest.mark.parametrize("place", ["llm", "."])
def test_the_file_may_lie_with_the_llm_or_at_the_root(name: str, place: str, v2: Path) -> None:
    want = Checkpoint(v2).parameters()
    (v2 / "llm" / PACKED_FILE).rename(v2 / place / name)
    (v2 / "llm" / INDEX).unlink()  # some releases keep it, some do not
    found = Checkpoint(v2).parameters()
    assert all(np.array_equal(found[parameter], want[parameter]) for parameter in want)


def test_the_group_size_is_in_the_name_or_in_the_config_or_128(golden: Path) -> None:
    want = Checkpoint(golden).parameter(f"llm.{LINEAR}.weight")
    (golden / "llm" / "tiny-w4-g128-awq-v2.pt").rename(golden / "llm" / "llama-awq-v2.pt")
    assert Checkpoint(golden).packed == Packed("llm-awq-v2", 128, symmetric=False)
    np.testing.assert_array_equal(Checkpoint(golden).parameter(f"llm.{LINEAR}.weight"), want)
    edit(golden / "llm" / "config.json", quantization_config=quantization_config(64, version="gemv"))
    with pytest.raises(
        CheckpointError, match=r"llama-awq-v2.pt: tensor 'model.*scales' is zero before .* of 64 inputs"
    ):
        Checkpoint(golden).int4(f"llm.{LINEAR}")
    edit(golden / "llm" / "config.json", quantization_config=quantization_config(128, version="gemv"))
    np.testing.assert_array_equal(Checkpoint(golden).parameter(f"llm.{LINEAR}.weight"), want)


@pytest.mark.parametrize("name", ["NVILA-8B-VT-smooth-scale.pt", "NVILA-8B-AWQ-w4-g128-VT-smooth-scale.pt"])
def test_scales_of_the_vision_tower_are_left_with_a_warning(name: str, v2: Path) -> None:
    (v2 / "llm" / name).write_bytes(b"never read")
    (warning,) = Checkpoint(v2).warnings
    assert warning.startswith(f"{v2 / 'llm' / name}: not read")


def test_whole_floats_go_before_a_packed_file(v15: Path, tmp_path: Path) -> None:
    want = Checkpoint(v15).parameters()
    (v15 / "llm" / PACKED_FILE).write_bytes(b"never read")
    checkpoint = Checkpoint(v15)
    assert checkpoint.packed is None
    assert all(np.array_equal(checkpoint.parameter(name), want[name]) for name in want)
    (warning,) = checkpoint.warnings
    assert re.search(rf"{PACKED_FILE}: not read: .*/llm has other weights", warning)


def test_the_projector_and_a_tower_in_the_one_file_of_a_v10(tmp_path: Path) -> None:
    path = write_checkpoint(tiny("VILA-7b"), tmp_path)
    want = Checkpoint(path).parameters()
    pack_checkpoint(path, "llm-awq-v2", 64)
    file = path / "tiny-w4-g64-awq-v2.pt"
    tower = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    change_tensors(file, lambda tensors: tensors.update({tower: np.full(24, np.nan)}))
    file.rename(path / "vila-7b-w4-g64-v2.pt")
    checkpoint = Checkpoint(path)
    assert checkpoint.packed == Packed("llm-awq-v2", 64, symmetric=False)
    for name in want:
        if not is_quantised(name):
            np.testing.assert_array_equal(checkpoint.parameter(name), want[name])


def test_symmetric_weights_are_known_by_config_or_by_their_zero_points(v15: Path) -> None:
    file, config = v15 / "llm" / WEIGHTS, v15 / "llm" / "config.json"

    def all_eight(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".qzeros")]:
            tensors[name][:] = 0x88888888 - (1 << 32)

    pack_checkpoint(v15, "autoawq-gemm", 16)
    edit(config, quantization_config=quantization_config(16, zero_point=False))
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor 'model.layers.*qzeros' has zero points that"):
        Checkpoint(v15).parameters()
    change_tensors(file, all_eight)
    for stated in (True, False):
        edit(config, quantization_config=quantization_config(16, zero_point=stated))
        checkpoint = Checkpoint(v15)
        assert checkpoint.packed == Packed("autoawq-gemm", 16, symmetric=True)
        linear = checkpoint.int4(f"llm.{LINEAR}")
        assert linear is not None
        assert (linear.zeros == int4.MIDDLE).all()


def test_modules_that_were_not_converted_are_floats(v15: Path) -> None:
    want = Checkpoint(v15).parameter(f"llm.{LINEAR}.weight")
    stored = load_file(v15 / "llm" / WEIGHTS)[f"{LINEAR}.weight"]
    pack_checkpoint(v15, "autoawq-gemm", 32)

    def keep(tensors: Tensors) -> None:
        for part in ("qweight", "scales", "qzeros"):
            del tensors[f"{LINEAR}.{part}"]
        tensors[f"{LINEAR}.weight"] = stored

    change_tensors(v15 / "llm" / WEIGHTS, keep)
    config = quantization_config(32, modules_to_not_convert=["k_proj"], do_fuse=False)
    edit(v15 / "llm" / "config.json", quantization_config=config)
    checkpoint = Checkpoint(v15)
    assert checkpoint.int4(f"llm.{LINEAR}") is None
    assert checkpoint.int4("llm.model.layers.1.self_attn.q_proj") is not None
    np.testing.assert_array_equal(checkpoint.parameter(f"llm.{LINEAR}.weight"), want)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_digest_follows_the_packed_weights(fmt: Format, v15: Path) -> None:
    pack_checkpoint(v15, fmt, 32)
    before = Checkpoint(v15).sha256()
    assert Checkpoint(v15).sha256() == before
    path = v15 / "llm" / (WEIGHTS if fmt == "autoawq-gemm" else PACKED_FILE)

    def flip(tensors: Tensors) -> None:
        tensors[f"{LINEAR}.qweight"][0, 0] ^= 1

    change_tensors(path, flip)
    assert Checkpoint(v15).sha256() != before


def test_a_packed_file_is_never_unpickled(v2: Path) -> None:
    torch.save({"x": Path("y")}, v2 / "llm" / PACKED_FILE)
    with pytest.raises(CheckpointError, match=f"{PACKED_FILE}: data.pkl names .*nothing was run"):
        Checkpoint(v2)


def test_only_what_is_asked_for_is_read(v2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    array = TensorFile.array

    def spied(self: TensorFile, name: str) -> NDArray[Any]:
        read.append(name)
        return array(self, name)

    monkeypatch.setattr(TensorFile, "array", spied)
    checkpoint = Checkpoint(v2)
    assert read == []
    checkpoint.int4(f"llm.{LINEAR}")
    assert {name.rpartition(".")[0] for name in read} == {LINEAR}
