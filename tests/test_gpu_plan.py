"""The memory plan of a GPU: weights to the byte of what its graphs read, and terms that grow as they should."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest

from tests.test_plan import parts_of, random_bundle
from tests.tiny import TINY
from vila_edge.bundle import Bundle
from vila_edge.config import VilaConfig
from vila_edge.engine.gpu_plan import gpu_plan, onnxruntime_weights, tensorrt_weights
from vila_edge.engine.plan import Backend
from vila_edge.engine.tensorrt_options import COMPONENTS, BuildOptions
from vila_edge.export.engines import write_files
from vila_edge.export.onnxruntime_ops import ROPE_COS, ROPE_SIN
from vila_edge.export.storage import Storage

TIED = dataclasses.replace(TINY, llm=dataclasses.replace(TINY.llm, tie_word_embeddings=True))
FORMS = {
    "int4": Storage(lm_head="int8", group_size=32),
    "int4 symmetric, int8 tower": Storage(lm_head="int4", vision="int8", group_size=32, symmetric=True),
    "fp16": Storage("fp16"),
}
GPU: tuple[Backend, ...] = ("tensorrt", "onnxruntime-cuda")


def read_by(graph: Path) -> dict[str, int]:
    """Bytes of each tensor outside of a graph that it reads."""
    model = onnx.load(graph, load_external_data=False)
    tensors = [tensor for tensor in model.graph.initializer if tensor.external_data]
    places = {tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in tensors}
    return {name: int(place["length"]) for name, place in places.items()}


@pytest.mark.parametrize("cfg", [TINY, TIED], ids=["", "tied"])
@pytest.mark.parametrize("form", FORMS)
def test_weights_are_planned_to_the_byte(form: str, cfg: VilaConfig, tmp_path: Path) -> None:
    bundle = Bundle.open(random_bundle(cfg, FORMS[form], tmp_path / "b"))
    parts = parts_of(bundle.path)
    for component in COMPONENTS:
        (tmp_path / component).mkdir()
        graph = write_files(bundle, component, BuildOptions(context=64, chunk=16), tmp_path / component)
        assert tensorrt_weights(cfg, parts, component) == sum(read_by(graph).values())
    found = read_by(bundle.path / "graphs" / "onnxruntime" / "decoder_float16.onnx")
    tables = found[ROPE_COS] + found[ROPE_SIN]  # stored in 32 bits, and used in 16
    assert onnxruntime_weights(cfg, parts, "decoder") == sum(found.values()) - tables // 2


def test_each_part_grows_with_its_own_measure(tiny_bundle: Path) -> None:
    parts = parts_of(tiny_bundle)
    for backend in GPU:
        base, longer, more = (
            gpu_plan(TINY, parts, backend, context, 32, tiles) for context, tiles in ((64, 1), (128, 1), (64, 2))
        )
        assert (longer.kv_cache, longer.images, longer.weights) == (2 * base.kv_cache, base.images, base.weights)
        assert (more.images, more.prefill, more.kv_cache) == (2 * base.images, base.prefill, base.kv_cache)
        assert longer.prefill > base.prefill
        assert not base.measured


def test_a_kv_cache_is_in_16_bits(tiny_bundle: Path) -> None:
    llm = TINY.llm
    for backend in GPU:
        found = gpu_plan(TINY, parts_of(tiny_bundle), backend, 77, 32, 1).kv_cache
        assert found == 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim * 2 * 77
