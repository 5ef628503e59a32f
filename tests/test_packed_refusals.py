"""Checkpoints in 4 bits that cannot be read: one error each, which names file, tensor or field."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.families import write_checkpoint
from tests.packed import INDEX, WEIGHTS, edit, llm_folder, pack_checkpoint, quantization_config
from tests.test_packed_checkpoints import FORMATS, LINEAR, PACKED_FILE, Tensors, change_tensors, tiny
from vila_edge.errors import CheckpointError, ConfigError, InputError
from vila_edge.export.awq_formats import Format
from vila_edge.export.checkpoint import Checkpoint


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


def drop_scales(tensors: Tensors) -> None:
    del tensors[f"{LINEAR}.scales"]


def drop_linear(tensors: Tensors) -> None:
    del tensors[f"{LINEAR}.qweight"]


def cut_scales(tensors: Tensors) -> None:
    tensors[f"{LINEAR}.scales"] = tensors[f"{LINEAR}.scales"][:-1]


def widen_scales(tensors: Tensors) -> None:
    tensors[f"{LINEAR}.scales"] = tensors[f"{LINEAR}.scales"].astype(np.float32)


def widen_words(tensors: Tensors) -> None:
    tensors[f"{LINEAR}.qweight"] = tensors[f"{LINEAR}.qweight"].astype(np.int32)


def turn_words(tensors: Tensors) -> None:
    tensors[f"{LINEAR}.qweight"] = np.ascontiguousarray(tensors[f"{LINEAR}.qweight"].T)


def both(tensors: Tensors) -> None:
    tensors[f"{LINEAR}.weight"] = np.zeros((64, 64), np.float16)


def pack_the_head(tensors: Tensors) -> None:
    tensors["lm_head.qweight"] = tensors.pop("lm_head.weight")


OPENED: list[tuple[Format, Callable[[Tensors], object], str]] = [
    ("autoawq-gemm", drop_scales, rf"{WEIGHTS}: no tensor '{LINEAR}.scales', expected F16 \[2, 64\]"),
    ("autoawq-gemm", drop_linear, rf"llm: no tensor '{LINEAR}.weight', expected shape \[64, 64\]"),
    ("autoawq-gemm", cut_scales, rf"{WEIGHTS}: tensor '{LINEAR}.scales' is F16 \[1, 64\], expected F16 \[2, 64\]"),
    ("autoawq-gemm", widen_scales, rf"{WEIGHTS}: tensor '{LINEAR}.scales' is F32 \[2, 64\], expected F16"),
    ("autoawq-gemm", turn_words, rf"{WEIGHTS}: tensor '{LINEAR}.qweight' is I32 \[8, 64\], expected I32 \[64, 8\]"),
    ("autoawq-gemm", both, rf"{WEIGHTS}: holds '{LINEAR}.qweight', for which the config.json of its part has no use"),
    ("autoawq-gemm", pack_the_head, "llm: no tensor 'lm_head.weight'"),
    ("llm-awq-v2", drop_scales, rf"{PACKED_FILE}: no tensor '{LINEAR}.scales', expected F16 \[32, 64\]"),
    ("llm-awq-v2", cut_scales, rf"{PACKED_FILE}: tensor '{LINEAR}.scales' is F16 \[31, 64\], expected F16 \[32, 64\]"),
    ("llm-awq-v2", widen_words, rf"{PACKED_FILE}: tensor '{LINEAR}.qweight' is I32 .*only v2 is read"),
    ("llm-awq-v2", turn_words, rf"{PACKED_FILE}: tensor '{LINEAR}.qweight' is I16 \[64, 16\], expected I16 \[16, 64\]"),
]


@pytest.mark.parametrize(("fmt", "change", "message"), OPENED)
def test_a_part_that_does_not_fit_is_named_before_anything_is_read(
    fmt: Format, change: Callable[[Tensors], object], message: str, v15: Path
) -> None:
    pack_checkpoint(v15, fmt, 32)
    change_tensors(v15 / "llm" / (WEIGHTS if fmt == "autoawq-gemm" else PACKED_FILE), change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(v15)


@pytest.mark.parametrize("fmt", FORMATS)
def test_values_that_are_wrong_are_named_when_they_are_read(fmt: Format, v15: Path) -> None:
    pack_checkpoint(v15, fmt, 32)
    file = v15 / "llm" / (WEIGHTS if fmt == "autoawq-gemm" else PACKED_FILE)

    def spoil(tensors: Tensors) -> None:
        tensors[f"{LINEAR}.scales"][0, 0] = np.inf

    change_tensors(file, spoil)
    checkpoint = Checkpoint(v15)
    for read in (lambda: checkpoint.int4(f"llm.{LINEAR}"), lambda: checkpoint.parameter(f"llm.{LINEAR}.weight")):
        with pytest.raises(CheckpointError, match=f"{file.name}: tensor '{LINEAR}.scales' is not finite"):
            read()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "'quant_method' is 'gptq', expected 'awq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'quant_method' is 'bitsandbytes'"),
        ({"load_in_8bit": True}, "'quant_method' is missing"),
        (quantization_config(32, bits=8), "'bits' is 8, expected 4"),
        (quantization_config(32, version="gemv"), "'version' is 'gemv', expected 'gemm'"),
        (quantization_config(32, version="gemv_fast"), "'version' is 'gemv_fast'"),
        (quantization_config(32, version="marlin"), "'version' is 'marlin'"),
    ],
)
@pytest.mark.parametrize("name", ["VILA-7b", "VILA1.5-3b"])
def test_another_kind_of_quantisation_is_refused_by_name(
    name: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_checkpoint(tiny(name), tmp_path)
    edit(llm_folder(path) / "config.json", quantization_config=config)
    with pytest.raises(CheckpointError, match=f"config.json: quantization_config: {message}.*are read.*16 bits"):
        Checkpoint(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (quantization_config(-1), "'group_size' is -1, expected a positive whole number"),
        (quantization_config(48), r"self_attn.q_proj: a weight \[64, 64\] in groups of 48 cannot be autoawq-gemm"),
        (quantization_config(64), r"'model.layers.0.self_attn.q_proj.scales' is F16 \[2, 64\], expected F16 \[1, 64\]"),
        (quantization_config(32, zero_point="yes"), "'zero_point' is 'yes', expected true or false"),
        (quantization_config(32, mystery=1), "quantization_config: 'mystery' is set to 1"),
        ([1], r"quantization_config is \[1\], expected an object"),
    ],
)
def test_a_wrong_quantization_config_names_the_field(config: Any, message: str, gemm: Path) -> None:
    edit(gemm / "llm" / "config.json", quantization_config=config)
    with pytest.raises(InputError, match=message):
        Checkpoint(gemm)


def test_upper_case_and_a_config_at_the_root_are_read(gemm: Path) -> None:
    edit(gemm / "llm" / "config.json", quantization_config=quantization_config(32, version="GEMM"))
    want = Checkpoint(gemm).parameter(f"llm.{LINEAR}.weight")
    config = json.loads((gemm / "llm" / "config.json").read_text())
    del config["quantization_config"]
    (gemm / "llm" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"q_proj.qweight', a linear in 4 bits, but .*llm/config.json has no"):
        Checkpoint(gemm)
    edit(gemm / "config.json", quantization_config=quantization_config(32))
    np.testing.assert_array_equal(Checkpoint(gemm).parameter(f"llm.{LINEAR}.weight"), want)


def test_a_config_of_4_bits_over_floats_is_refused(v15: Path) -> None:
    edit(v15 / "llm" / "config.json", quantization_config=quantization_config(32))
    with pytest.raises(
        CheckpointError, match=r"llm/config.json: says .* no linear has a qweight .*remove 'quantization"
    ):
        Checkpoint(v15)


def test_an_unknown_key_beside_it_is_still_refused(gemm: Path) -> None:
    edit(gemm / "llm" / "config.json", quantisation_config={})
    with pytest.raises(ConfigError, match="'quantisation_config' is set to"):
        Checkpoint(gemm)


def test_names_that_contradict_what_is_there(v2: Path) -> None:
    folder = v2 / "llm"
    shutil.copy(folder / PACKED_FILE, folder / "other-w4-g32-awq-v2.pt")
    with pytest.raises(CheckpointError, match=f"llm: several files of 4 bits: other-w4-g32-awq-v2.pt, {PACKED_FILE}"):
        Checkpoint(v2)
    (folder / "other-w4-g32-awq-v2.pt").unlink()
    for name, message in (
        ("tiny-w3-g32-awq-v2.pt", "tiny-w3-g32-awq-v2.pt: named as one of 3 bits, expected 4"),
        ("tiny-w4-g0-awq-v2.pt", "groups of 0, expected a positive number"),
        ("tiny-w4-g24-awq-v2.pt", "in groups of 24 cannot be llm-awq-v2"),
    ):
        (file := folder / name).write_bytes((folder / PACKED_FILE).read_bytes())
        (folder / PACKED_FILE).rename(folder / "kept")
        with pytest.raises(CheckpointError, match=message):
            Checkpoint(v2)
        file.unlink()
        (folder / "kept").rename(folder / PACKED_FILE)
    edit(folder / "config.json", quantization_config=quantization_config(64))
    with pytest.raises(CheckpointError, match=f"'group_size' is 64, but {PACKED_FILE} is named as one of 32"):
        Checkpoint(v2)


def test_a_shard_that_is_there_makes_the_missing_one_an_error(v2: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": dict(zip("ab", names, strict=True))}
    (v2 / "llm" / INDEX).write_text(json.dumps(index))
    assert Checkpoint(v2).packed is not None
    save_file({"a": np.zeros(1, np.float16)}, v2 / "llm" / names[0])
    with pytest.raises(CheckpointError, match=rf"llm/{names[1]}: missing .*index.json names"):
        Checkpoint(v2)
