"""Every form in which a parameter can be stored computes what its integers stand for, and takes the space it should."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.graphs import graph_engine, handmade_bundle
from tests.tiny import TINY, random_parameters
from vila_edge import int4, int8, kv_scales
from vila_edge.config import VilaConfig
from vila_edge.export.storage import Storage, StoragePlan, file_of
from vila_edge.reference.engine import bundle_parameters, numpy_engine
from vila_edge.tensorfile import TensorFile

TIED = dataclasses.replace(TINY, llm=dataclasses.replace(TINY.llm, tie_word_embeddings=True))
STORAGES = {
    "lm_head int8": (TINY, Storage(lm_head="int8", group_size=32)),
    "lm_head int4": (TINY, Storage(lm_head="int4", group_size=16)),
    "tied int8": (TIED, Storage(lm_head="int8", group_size=32)),
    "tied int4": (TIED, Storage(lm_head="int4", group_size=32)),
    "tied fp16": (TIED, Storage(lm_head="fp16", group_size=32)),
    "vision int8": (TINY, Storage(vision="int8", group_size=32)),
    "symmetric": (TINY, Storage(lm_head="int4", group_size=32, symmetric=True)),
    "fp32": (TINY, Storage("fp32", "fp32", "fp32", "fp32")),
}
IDS = [5, 9, 2, 33, 7, 1]


def tensors_of(cfg: VilaConfig, storage: Storage) -> dict[str, NDArray[Any]]:
    """Random parameters in their forms."""
    plan, tensors = StoragePlan(cfg, storage), dict[str, NDArray[Any]]()
    for name, values in random_parameters(cfg).items():
        form, linear = plan.form(name), name.removesuffix(".weight")
        if form == "int8":
            weight = int8.quantize(values)
            tensors |= dict(zip(int8.part_names(linear), (weight.q, weight.scales), strict=True))
        elif form == "int4":
            grid = int4.quantize(values, storage.group_size, storage.symmetric)
            tensors |= int4.to_tensors(linear, grid, storage.symmetric)
        else:
            tensors[name] = values.astype(np.float32 if form == "fp32" else np.float16)
    return tensors


@pytest.mark.parametrize(("cfg", "storage"), list(STORAGES.values()), ids=list(STORAGES))
def test_graphs_compute_with_each_form_as_it_is(cfg: VilaConfig, storage: Storage, tmp_path: Path) -> None:
    tensors = tensors_of(cfg, storage)
    bundle = handmade_bundle(cfg, tensors, tmp_path / "oracle")
    oracle, engine = numpy_engine(cfg, bundle_parameters(bundle)), graph_engine(cfg, tensors, tmp_path / "engine")
    pixels = np.random.default_rng(1).standard_normal((2, 3, 46, 46)).astype(np.float32)
    features = oracle.encode_images(pixels)
    np.testing.assert_allclose(engine.encode_images(pixels), features, atol=1e-4)
    np.testing.assert_allclose(engine.project(features), oracle.project(features), atol=1e-4)
    embeds = oracle.embed_tokens(IDS)
    np.testing.assert_array_equal(engine.embed_tokens(IDS), embeds)
    got = engine.forward(embeds, engine.new_cache(len(IDS)), range(len(IDS)))
    np.testing.assert_allclose(got, oracle.forward(embeds, oracle.new_cache(len(IDS)), range(len(IDS))), atol=2e-4)


@pytest.mark.parametrize(("cfg", "storage"), list(STORAGES.values()), ids=list(STORAGES))
def test_the_plan_says_what_is_written_and_where(cfg: VilaConfig, storage: Storage, tmp_path: Path) -> None:
    scales = {name: np.ones(shape, np.float32) for name, (_, shape) in kv_scales.specs(cfg.llm).items()}
    bundle = handmade_bundle(cfg, tensors_of(cfg, storage) | scales, tmp_path)
    plan = StoragePlan(cfg, storage)
    stored = {f"weights/{path.name}": TensorFile(path).entries for path in (bundle.path / "weights").iterdir()}
    assert {file: set(entries) for file, entries in stored.items()} == {
        f: set(specs) for f, specs in plan.files.items()
    }
    for name, place in plan.places().items():
        assert stored[f"weights/{place.location}"][name] == place.entry
        assert file_of(name) == f"weights/{place.location}"
    sizes = {name: entry.length for entries in stored.values() for name, entry in entries.items()}
    assert plan.parameter_bytes() == sum(
        size for name, size in sizes.items() if not name.startswith(("llm.rope.", "kv_cache."))
    )


def test_what_is_in_which_form() -> None:
    plan = StoragePlan(TINY, Storage(lm_head="int8", vision="int8", group_size=32))
    forms = {
        "llm.model.layers.1.mlp.down_proj.weight": "int4",
        "llm.model.layers.1.input_layernorm.weight": "fp16",
        "llm.lm_head.weight": "int8",
        "llm.model.embed_tokens.weight": "fp16",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": "int8",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias": "fp16",
        "vision_tower.vision_model.embeddings.patch_embedding.weight": "fp16",
        "vision_tower.vision_model.embeddings.position_embedding.weight": "fp16",
        "mm_projector.layers.2.weight": "int8",
        "mm_projector.layers.1.weight": "fp16",
    }
    assert {name: plan.form(name) for name in forms} == forms
    tied = StoragePlan(TIED, Storage(lm_head="int8", group_size=32))
    assert tied.form("llm.model.embed_tokens.weight") == "int8"
    assert "llm.lm_head.weight" not in tied.shapes


@pytest.mark.parametrize("columns", [128, 72, 300])
def test_eight_bits_are_within_half_a_step(columns: int) -> None:
    """Rows that are no whole number of groups are filled up, and cut again."""
    weight = np.random.default_rng(2).standard_normal((6, columns)).astype(np.float32)
    rounded = int8.quantize(weight)
    assert rounded.q.shape == (6, -(-columns // 128) * 128)
    got = rounded.dequantize(columns)
    assert got.shape == weight.shape
    step = np.repeat(rounded.scales.astype(np.float32), 128, 1)[:, :columns]
    assert (np.abs(got - weight) <= 0.51 * step).all()
    assert np.isfinite(int8.quantize(np.zeros((2, 128))).dequantize(128)).all()
