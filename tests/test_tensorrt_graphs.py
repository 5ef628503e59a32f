"""The graphs for TensorRT, run in onnxruntime against the numpy oracle: every family, every form of the weights.

onnxruntime widens float16 products to float32, so this shows the graphs to be right, not how a GPU rounds.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from tests.families import FAMILIES, config_of, shrink
from tests.graphs import handmade_bundle
from tests.tensorrt_graphs import GraphRunner, has_tensor_scatter
from tests.tiny import TINY, random_parameters
from vila_edge import int4, int8
from vila_edge.bundle import WEIGHTS, Bundle
from vila_edge.config import ProjectorConfig, VilaConfig
from vila_edge.engine.tensorrt_options import COMPONENTS, BuildOptions, KVForm, graph_bindings
from vila_edge.errors import BackendError
from vila_edge.export import tensorrt_weights
from vila_edge.export.engines import write_files
from vila_edge.export.graph_ops import GraphOps, row_slices
from vila_edge.export.tensorrt_weights import CONVERTED, stage_weights
from vila_edge.parameters import component, is_quantised, linears
from vila_edge.reference.engine import bundle_parameters, numpy_engine
from vila_edge.tensorfile import TensorFile

# float16 keeps 11 bits. Some tens of roundings one behind the other were seen to add up to 12 of the last bit,
# in units of the standard deviation of what comes out; anything that is wired wrongly is off by hundreds.
TOLERANCE = 32 * 2.0**-11
FORMS: tuple[KVForm, ...] = ("scatter", "append")
# One of each structure: the others shrink to the same sizes as one of these.
STRUCTURES = ("VILA-7b", "VILA1.5-3b-s2", "Llama-3-VILA1.5-8B", "NVILA-8B", "NVILA-Lite-15B", "NVILA-Lite-2B")
SCATTER_RUNS = pytest.mark.skipif(not has_tensor_scatter(), reason="needs an onnxruntime with TensorScatter")
RUNNABLE_FORMS = [pytest.param("scatter", marks=SCATTER_RUNS), "append"]
STORAGES = ("fp32", "fp16", "int4", "int4 symmetric", "int8")
RNG = np.random.default_rng(3)


def stored_as(cfg: VilaConfig, storage: str) -> dict[str, NDArray[Any]]:
    """Random weights; int4 has float16 beside it, int8 an int4 decoder."""
    params = random_parameters(cfg, dtype=np.float32 if storage == "fp32" else np.float16)
    tensors: dict[str, NDArray[Any]] = {}
    for name, value in params.items():
        linear = name.removesuffix(".weight")
        if is_quantised(name) and storage.startswith("int"):
            symmetric = storage == "int4 symmetric"
            tensors |= int4.to_tensors(linear, int4.quantize(value, 16, symmetric), symmetric)
        elif storage == "int8" and name.endswith(".weight") and linear in linears(cfg):
            weight = int8.quantize(value)
            tensors |= dict(zip(int8.part_names(linear), (weight.q, weight.scales), strict=True))
        else:
            tensors[name] = value
    return tensors


def agree(got: NDArray[Any], want: NDArray[Any]) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * want.std())


def check(bundle: Bundle, folder: Path, form: KVForm) -> None:
    """Images, projector, then a prompt at once, in chunks and token by token."""
    cfg, size = bundle.config, bundle.config.vision_tower.image_size
    oracle = numpy_engine(cfg, bundle_parameters(bundle))
    runner = GraphRunner(bundle, BuildOptions(context=24, chunk=16, form=form), folder)
    pixels = RNG.standard_normal((2, 3, size, size)).astype(np.float32)
    agree(runner.encode_images(pixels), oracle.encode_images(pixels))
    shape = (2, cfg.vision_tower.num_features, cfg.mm_hidden_size)
    features = RNG.standard_normal(shape).astype(np.float16).astype(np.float32)
    agree(runner.project(features), oracle.project(features))
    embeds = oracle.embed_tokens(RNG.integers(0, cfg.llm.vocab_size, 13).tolist())
    want = oracle.forward(embeds, oracle.new_cache(13), range(13))
    agree(runner.forward(embeds, range(13)), want)
    runner.reset()
    parts = [(0, 5), (5, 9), *((i, i + 1) for i in range(9, 13))]
    agree(np.concatenate([runner.forward(embeds[a:b], range(b - a)) for a, b in parts]), want)
    runner.reset()
    agree(runner.forward(embeds, [12, 4]), want[[12, 4]])


@pytest.mark.parametrize("form", RUNNABLE_FORMS)
@pytest.mark.parametrize("family", STRUCTURES)
def test_every_structure_of_the_families(family: str, form: KVForm, tmp_path: Path) -> None:
    cfg = config_of(shrink(FAMILIES[family]), tmp_path)
    check(handmade_bundle(cfg, stored_as(cfg, "int4"), tmp_path / "bundle"), tmp_path / "graphs", form)


@pytest.mark.parametrize("form", RUNNABLE_FORMS)
@pytest.mark.parametrize("storage", STORAGES)
def test_every_form_of_the_weights(storage: str, form: KVForm, tmp_path: Path) -> None:
    check(handmade_bundle(TINY, stored_as(TINY, storage), tmp_path / "bundle"), tmp_path / "graphs", form)


@pytest.mark.parametrize("projector", ["linear", "mlp3x_gelu", "mlp_downsample_3x3_s2"])
def test_the_other_projectors(projector: str, tmp_path: Path) -> None:
    cfg = dataclasses.replace(TINY, mm_projector=ProjectorConfig(projector))
    check(handmade_bundle(cfg, stored_as(cfg, "int8"), tmp_path / "bundle"), tmp_path / "graphs", "append")


@pytest.mark.parametrize("form", RUNNABLE_FORMS)
def test_graphs_are_valid_and_have_the_inputs_and_outputs_of_the_bindings(form: KVForm, tmp_path: Path) -> None:
    bundle = handmade_bundle(TINY, stored_as(TINY, "int8"), tmp_path / "bundle")
    options = BuildOptions(context=24, chunk=16, form=form)
    runner = GraphRunner(bundle, options, tmp_path / "graphs")
    for name, path in runner.graphs.items():
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load_from_string(path.read_bytes())
        assert (model.ir_version, model.opset_import[0].version) == {"scatter": (11, 24), "append": (10, 21)}[form]
        layout = graph_bindings(TINY, name, options)
        for declared, meant in ((model.graph.input, layout.inputs), (model.graph.output, layout.outputs)):
            assert [_declared(value) for value in declared] == [(b.name, b.dtype, b.shape) for b in meant]


def _declared(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return value.name, dtype, tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)


def test_large_weights_are_cut_by_rows() -> None:
    """The head of an NVILA-8B: 1.09 GB in 16 bits, 545 MB in 8, 273 MB in 4."""
    limit = GraphOps.max_initializer
    slices = row_slices(152_064, 2 * 3584, limit)
    assert [(part.start, part.stop) for part in slices] == [(0, 50_688), (50_688, 101_376), (101_376, 152_064)]
    assert all((part.stop - part.start) * 2 * 3584 <= limit == 512 << 20 for part in slices)
    assert row_slices(152_064, 3584, limit) == [slice(0, 76_032), slice(76_032, 152_064)]
    assert row_slices(152_064, 3584 / 2, limit) == [slice(0, 152_064)]
    assert row_slices(5, 10, limit=20) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert row_slices(1, 100, limit=20) == [slice(0, 1)]


@pytest.mark.parametrize("storage", ["fp16", "int4", "int8"])
def test_cut_weights_compute_the_same(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphOps, "max_initializer", 1500)
    bundle = handmade_bundle(TINY, stored_as(TINY, storage), tmp_path / "bundle")
    check(bundle, tmp_path / "graphs", "append")
    names = {
        i.name
        for i in onnx.load(str(tmp_path / "graphs/decoder/decoder.onnx"), load_external_data=False).graph.initializer
    }
    assert len({name for name in names if "lm_head" in name}) > 10


def test_integers_are_converted_exactly_in_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_weights, "PIECE", 300)
    tensors = stored_as(TINY, "int8")
    bundle = handmade_bundle(TINY, tensors, tmp_path / "bundle")
    (tmp_path / "decoder").mkdir()
    places = stage_weights(bundle, "decoder", tmp_path / "decoder")
    file = TensorFile(tmp_path / "decoder" / CONVERTED)
    assert {name for name, place in places.items() if place.location == CONVERTED} == set(file.entries)

    def signed(name: str) -> NDArray[np.int64]:
        packed = file.array(name)
        nibbles = int4.unpack(packed, 2 * packed.shape[1]).astype(np.int64)
        return np.where(nibbles > 7, nibbles - 16, nibbles)

    name = "llm.model.layers.1.mlp.up_proj"
    weight = int4.from_tensors(name, tensors)
    np.testing.assert_array_equal(signed(f"{name}.qweight") + 8, weight.q)
    zero_terms = weight.scales.astype(np.float32) * (8 - weight.zeros.astype(np.float32))
    np.testing.assert_array_equal(file.array(f"{name}.zero_terms"), zero_terms.astype(np.float16))
    head = int8.from_tensors("llm.lm_head", tensors)
    high, low = (signed(f"llm.lm_head.{digit}.qweight") for digit in ("high", "low"))
    np.testing.assert_array_equal(16 * high + low + 8, head.q.astype(np.int64) - 128)
    np.testing.assert_array_equal(file.array("llm.lm_head.high.scales"), 16 * head.scales)
    np.testing.assert_array_equal(file.array("llm.lm_head.low.scales"), head.scales)
    np.testing.assert_array_equal(file.array("llm.lm_head.zero_terms"), 8 * head.scales)


def test_float16_weights_are_used_where_they_lie(tmp_path: Path) -> None:
    bundle = handmade_bundle(TINY, stored_as(TINY, "fp16"), tmp_path / "bundle")
    for name in COMPONENTS:
        (tmp_path / name).mkdir()
        write_files(bundle, name, BuildOptions(context=24, chunk=16), tmp_path / name)
        assert not (tmp_path / name / CONVERTED).exists()
        links = {path for path in (tmp_path / name).iterdir() if path.suffix == ".safetensors"}
        assert all(link.resolve().parent == (tmp_path / "bundle" / WEIGHTS).resolve() for link in links)
        assert {"llm" if name == "decoder" else name} == {component(link.name) for link in links}


def test_a_weight_that_16_bits_cannot_hold_is_named(tmp_path: Path) -> None:
    tensors = stored_as(TINY, "fp32")
    tensors["mm_projector.layers.2.weight"][3, 4] = -70_000
    bundle = handmade_bundle(TINY, tensors, tmp_path / "bundle")
    (tmp_path / "graph").mkdir()
    with pytest.raises(BackendError, match=r"mm_projector\.layers\.2\.weight: its largest value 7e\+04 does not fit"):
        write_files(bundle, "mm_projector", BuildOptions(context=24, chunk=16), tmp_path / "graph")
