"""Engines built ahead of time for SM86, without a GPU: that TensorRT takes the graphs as they are meant."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cpu_peers import random_bundle
from benchmarks.cpu_peers.shape import Shape
from tests.families import FAMILIES, config_of, shrink
from tests.graphs import handmade_bundle
from tests.test_tensorrt_graphs import FORMS, STRUCTURES, stored_as
from tests.tiny import TINY
from vila_edge.bundle import Bundle
from vila_edge.config import VilaConfig
from vila_edge.engine.tensorrt_options import MAX_KEPT, BuildOptions, KVForm, graph_bindings
from vila_edge.errors import BackendError, UsageError
from vila_edge.export.engines import build_engine, build_graph, load_timing_cache, profiles, write_files
from vila_edge.export.plan_inspection import describe_plan
from vila_edge.parameters import parameter_shapes

trt = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx: it builds engines without a GPU")

SM86 = (8, 6)
TYPES = {"float32": "float", "float16": "half", "int64": "int64"}  # as an engine's text has them
OPTIONS = BuildOptions(context=24, chunk=16, images=2)

Build = Callable[..., memoryview]


def options_of(form: KVForm) -> BuildOptions:
    return dataclasses.replace(OPTIONS, form=form)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """build_engine for SM86, each time in a folder of its own."""

    def build(bundle: Bundle, component: str, options: BuildOptions = OPTIONS, **more: Any) -> memoryview:
        folder = tmp_path / f"build {len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        arguments = {"compute_capability": SM86, "timing_cache": None, "progress": None} | more
        return build_engine(arguments.pop("runtime", trt), bundle, component, options, folder=folder, **arguments)

    return build


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return handmade_bundle(TINY, stored_as(TINY, "int8"), tmp_path_factory.mktemp("tiny") / "bundle")


def packed_bytes(bundle: Bundle) -> int:
    """What the bundle's weights of 4 bits take, without scales."""
    names = [name for name in parameter_shapes(bundle.config) if ".layers." in name and name.endswith("_proj.weight")]
    return sum(int(np.prod(parameter_shapes(bundle.config)[name])) // 2 for name in names if name.startswith("llm."))


def check_plan(plan: memoryview, cfg: VilaConfig, component: str, options: BuildOptions) -> None:
    """Types and shapes of inputs and outputs are those of the bindings, as far as the engine's text has them."""
    tensors = describe_plan(plan).tensors
    layout = graph_bindings(cfg, component, options)
    told = [binding for binding in (*layout.inputs, *layout.outputs) if binding.name in tensors]
    for binding in told:
        shape = tuple(None if isinstance(d, str) else d for d in binding.shape)
        assert (tensors[binding.name].dtype, tensors[binding.name].shape) == (TYPES[binding.dtype], shape)
    if component == "decoder":  # of outputs TensorRT-RTX may write nothing
        cache = "present_key_0" if options.form == "scatter" else "past_key_0"  # past_ and present_ can be one
        assert {"inputs_embeds", "position_ids", "logits_to_keep", cache} <= {b.name for b in told}


@pytest.mark.parametrize("family", [*STRUCTURES, "NVILA-8B-Video"])
def test_engines_of_a_family(family: str, tmp_path: Path, build: Build) -> None:
    cfg = config_of(shrink(FAMILIES[family]), tmp_path)
    bundle = handmade_bundle(cfg, stored_as(cfg, "int4"), tmp_path / "bundle")
    for component in ("vision_tower", "mm_projector"):
        check_plan(build(bundle, component), cfg, component, OPTIONS)
    for form in FORMS:
        plan = build(bundle, "decoder", options_of(form))
        check_plan(plan, cfg, "decoder", options_of(form))
        weights = [types["int4"] for types in describe_plan(plan).constants.values() if "int4" in types]
        assert weights == [packed_bytes(bundle)] * 2  # one for each profile


def test_eight_bits_stay_eight_bits_in_the_decoder(tiny: Bundle, build: Build) -> None:
    plan = describe_plan(build(tiny, "decoder"))
    head = TINY.llm.vocab_size * 128  # a row of 64 inputs is stored as a whole group of 128
    weights = [types["int4"] for types in plan.constants.values() if "int4" in types]
    assert weights == [packed_bytes(tiny) + head] * 2


@pytest.mark.parametrize("heads", [(8, 8), (14, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_weights_are_widened_inside_the_products_alone(
    form: KVForm, heads: tuple[int, int], tmp_path: Path, build: Build
) -> None:
    """At the width of a head of a real model, where TensorRT chooses other kernels than for tiny ones."""
    query, key_value = heads
    llm = dataclasses.replace(
        TINY.llm,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=1,
        num_attention_heads=query,
        num_key_value_heads=key_value,
        head_dim=128,
    )
    cfg = dataclasses.replace(TINY, llm=llm)
    bundle = handmade_bundle(cfg, stored_as(cfg, "int4 symmetric"), tmp_path / "bundle")
    plan = describe_plan(build(bundle, "decoder", dataclasses.replace(OPTIONS, form=form, context=128)))
    assert plan.kernels["ReplCastMulCastFc"] >= 8  # qkv, o, gate and up, down, in both profiles
    assert plan.widened == 0
    assert any("mha" in kernel for kernel in plan.kernels)


def test_prefill_and_decode_have_a_profile_each() -> None:
    prefill, decode = profiles(TINY, "decoder", options_of("append"))
    assert prefill["inputs_embeds"] == ((1, 1, 64), (1, 16, 64), (1, 16, 64))
    assert decode["inputs_embeds"] == ((1, 1, 64),) * 3
    for profile in (prefill, decode):
        assert profile["past_key_1"] == ((1, 0, 2, 16), (1, 12, 2, 16), (1, 24, 2, 16))
        assert profile["logits_to_keep"] == ((1,), (1,), (MAX_KEPT,))
        assert profile["position_ids"] == tuple(shape[:2] for shape in profile["inputs_embeds"])
    assert profiles(TINY, "decoder", options_of("scatter"))[0]["past_key_1"] == ((1, 2, 24, 16),) * 3
    assert profiles(TINY, "vision_tower", OPTIONS) == [
        {"pixel_values": ((1, 3, 46, 46), (2, 3, 46, 46), (2, 3, 46, 46))}
    ]


def test_a_target_that_is_not_offered_is_refused(tiny: Bundle, build: Build) -> None:
    with pytest.raises(BackendError, match=r"cannot build for SM87, it offers SM75, SM80, SM86") as error:
        build(tiny, "mm_projector", compute_capability=(8, 7))
    assert "on the device itself" in error.value.hint


def test_plain_tensorrt_builds_for_its_own_gpu_alone(tiny: Bundle, build: Build) -> None:
    """Its API is the same but for the choice of another GPU."""
    content = {name: value for name, value in vars(trt).items() if name != "ComputeCapability"}
    plain = types.SimpleNamespace(**content | {"__name__": "tensorrt", "__version__": "10.3.0"})
    with pytest.raises(BackendError, match=r"tensorrt 10\.3\.0 builds for the GPU of this machine alone"):
        build(tiny, "mm_projector", runtime=plain)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "Failed to parse the ONNX model"),
        (lambda data: data.replace(b"LayerNormalization", b"LayerNormalizatioN"), "LayerNormalizatioN"),
        (lambda data: b"", "at least one output"),
    ],
)
def test_a_damaged_graph_is_refused_in_tensorrts_words(
    damage: Callable[[bytes], bytes], message: str, tiny: Bundle, tmp_path: Path
) -> None:
    graph = write_files(tiny, "mm_projector", OPTIONS, tmp_path)
    graph.write_bytes(damage(graph.read_bytes()))
    with pytest.raises(BackendError, match=rf"mm_projector: tensorrt_rtx .*{message}"):
        build_graph(trt, graph, "mm_projector", profiles(TINY, "mm_projector", OPTIONS), compute_capability=SM86)


def test_a_weights_file_that_is_gone_is_refused(tiny: Bundle, tmp_path: Path) -> None:
    graph = write_files(tiny, "mm_projector", OPTIONS, tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(BackendError, match="mm_projector: tensorrt_rtx .* Failed to import initializer"):
        build_graph(trt, graph, "mm_projector", profiles(TINY, "mm_projector", OPTIONS), compute_capability=SM86)


def test_a_context_beyond_the_models_is_refused(tiny: Bundle, build: Build) -> None:
    with pytest.raises(UsageError, match="a context of 129 positions: the model was made for 128"):
        build(tiny, "decoder", BuildOptions(context=129, chunk=16))


def test_progress_is_told_and_can_stop_the_build(tiny: Bundle, build: Build) -> None:
    told: list[tuple[str, int, int]] = []
    build(tiny, "mm_projector", progress=lambda *step: told.append(step))
    assert len(told) > 10
    assert all(0 <= step <= steps for _, step, steps in told)

    def stop(phase: str, step: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tiny, "mm_projector", progress=stop)


class FakeConfig:
    """A builder's config that takes timing caches with the right first word."""

    def create_timing_cache(self, content: bytes) -> bytes | None:
        return content if content.startswith(b"good") or not content else None

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        return not ignore_mismatch and b"another GPU" not in cache


@pytest.mark.parametrize(
    ("content", "taken"),
    [(b"good: measured here", b"good: measured here"), (b"damaged", b""), (b"good: another GPU", b""), (None, b"")],
)
def test_a_timing_cache_is_taken_if_it_fits(content: bytes | None, taken: bytes, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "timing").write_bytes(content)
    assert load_timing_cache(FakeConfig(), tmp_path / "timing") == taken
    assert load_timing_cache(FakeConfig(), None) is None


def test_tensorrt_rtx_measures_nothing_and_leaves_no_timing_cache(tiny: Bundle, build: Build, tmp_path: Path) -> None:
    build(tiny, "mm_projector", timing_cache=tmp_path / "timing")
    assert not (tmp_path / "timing").exists()


def test_an_engine_without_text_is_described_as_empty() -> None:
    plan = describe_plan(b"\0" * 1000)
    assert (plan.tensors, plan.constants, plan.widened) == ({}, {}, 0)


@pytest.mark.slow
def test_a_decoder_of_the_size_of_vila15_3b(tmp_path: Path, build: Build) -> None:
    """32 blocks of real dimensions, 4 bits with zero points and lm_head in 8: minutes, and 8 GB of memory."""
    shape = Shape()
    random_bundle.write(shape, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    options = dataclasses.replace(OPTIONS, context=2048, chunk=512)
    plan = build(bundle, "decoder", options)
    check_plan(plan, bundle.config, "decoder", options)
    described = describe_plan(plan)
    weights = [types["int4"] for types in described.constants.values() if "int4" in types]
    packed = packed_bytes(bundle) + shape.vocab_size * shape.hidden_size  # a byte is two digits of 4 bits
    assert weights == [packed] * 2  # one for each profile, of the same bytes
    assert packed < len(plan) < 1.12 * packed
    assert described.kernels["ReplCastMulCastFc"] == 2 * (4 * shape.layers + 1)  # qkv, o, gate and up, down; lm_head
    assert described.widened == 0
    attention = sum(count for kernel, count in described.kernels.items() if "mha" in kernel)
    assert attention == 2 * shape.layers
