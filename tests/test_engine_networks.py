"""The networks that TensorRT reads out of the graphs, before it builds anything: their bindings, and what is computed
in which type."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.families import FAMILIES, config_of, shrink
from tests.graphs import handmade_bundle
from tests.test_tensorrt_graphs import FORMS, STRUCTURES, stored_as
from tests.tiny import TINY
from vila_edge.bundle import Bundle
from vila_edge.engine.tensorrt_options import COMPONENTS, BuildOptions, KVForm, graph_bindings
from vila_edge.export.engines import write_files

trt = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx: it reads graphs without a GPU")

# Where sums are long and differences small; and where the time goes.
WIDE = ("SOFTMAX", "NORMALIZATION", "REDUCE", "UNARY")
NARROW = ("MATRIX_MULTIPLY", "CONVOLUTION", "ATTENTION_INPUT")

Read = Callable[[Bundle, str, KVForm], Any]
Types = dict[str, set[tuple[str, ...]]]  # kind of a layer -> types of its inputs


def options_of(form: KVForm) -> BuildOptions:
    return BuildOptions(context=24, chunk=16, images=2, form=form)


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """The network of a component, strongly typed; it lives as long as the test."""
    alive: list[Any] = []
    logger, numbers = trt.Logger(trt.Logger.ERROR), itertools.count()

    def read(bundle: Bundle, component: str, form: KVForm) -> Any:
        folder = tmp_path / f"graph {next(numbers)}"
        folder.mkdir()
        graph = write_files(bundle, component, options_of(form), folder)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        assert parser.parse_from_file(str(graph))
        alive.extend((builder, network, parser))
        return network

    return read


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return handmade_bundle(TINY, stored_as(TINY, "int8"), tmp_path_factory.mktemp("tiny") / "bundle")


def types_of(network: Any) -> Types:
    found: Types = {}
    for layer in map(network.get_layer, range(network.num_layers)):
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        found.setdefault(layer.type.name, set()).add(tuple(x.dtype.name for x in inputs if x is not None))
    return found


def check_types(types: Types) -> None:
    for kinds, meant in ((WIDE, "FLOAT"), (NARROW, "HALF")):
        for kind in kinds:
            assert {name for names in types.get(kind, ()) for name in names} <= {meant, "BOOL"}, kind
    assert types.get("DEQUANTIZE", set()) <= {("INT4", "HALF")}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", [*STRUCTURES, "NVILA-8B-Video"])
def test_networks_have_the_bindings_and_types_that_are_meant(
    family: str, form: KVForm, read: Read, tmp_path: Path
) -> None:
    cfg = config_of(shrink(FAMILIES[family]), tmp_path)
    bundle = handmade_bundle(cfg, stored_as(cfg, "int4"), tmp_path / "bundle")
    names = {trt.float32: "float32", trt.float16: "float16", trt.int64: "int64"}
    for component in COMPONENTS:
        network, layout = read(bundle, component, form), graph_bindings(cfg, component, options_of(form))
        found = [network.get_input(i) for i in range(network.num_inputs)]
        found += [network.get_output(i) for i in range(network.num_outputs)]
        meant = [
            (b.name, b.dtype, tuple(-1 if isinstance(d, str) else d for d in b.shape))
            for b in (*layout.inputs, *layout.outputs)
        ]
        assert [(t.name, names[t.dtype], tuple(t.shape)) for t in found] == meant
        check_types(types_of(network))


@pytest.mark.parametrize("form", FORMS)
def test_norms_and_softmax_are_islands_of_float32(form: KVForm, tiny: Bundle, read: Read) -> None:
    """All but Attention's own softmax, whose precision TensorRT cannot be told."""
    tower, projector, decoder = (types_of(read(tiny, component, form)) for component in COMPONENTS)
    for types in (tower, projector, decoder):
        check_types(types)
    assert {"NORMALIZATION", "SOFTMAX", "MATRIX_MULTIPLY", "CONVOLUTION"} <= tower.keys()
    assert {"NORMALIZATION", "MATRIX_MULTIPLY"} <= projector.keys()
    attention = "SOFTMAX" if form == "append" else "ATTENTION_INPUT"
    assert {"REDUCE", "UNARY", "MATRIX_MULTIPLY", "DEQUANTIZE", attention} <= decoder.keys()


def test_attention_cannot_be_told_the_precision_of_its_softmax(
    tiny: Bundle, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should this fail one day, `ScatterOps` is to ask for float32."""
    from vila_edge.export.tensorrt_ops import ScatterOps

    def node(ops: ScatterOps, op_type: str, *inputs: str, **attributes: Any) -> str:
        more: dict[str, Any] = {"softmax_precision": 1} if op_type == "Attention" else {}
        return str(super(ScatterOps, ops).node(op_type, *inputs, **attributes, **more))

    monkeypatch.setattr(ScatterOps, "node", node, raising=False)
    with pytest.raises(AssertionError):
        read(tiny, "decoder", "scatter")
