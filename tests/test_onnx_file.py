"""Paths in a graph are found wherever they hide, before a runtime sees them."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from vila_edge import fsio
from vila_edge.bundle import MANIFEST, Bundle, FileEntry, _digest
from vila_edge.engine.onnx_file import check_external_data, external_data
from vila_edge.engine.onnxruntime import OnnxruntimeEngine
from vila_edge.errors import BundleError

SOURCE = Path("decoder.onnx")


def external_tensor(location: str = "w.bin", offset: int = 0, length: int = 4) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model(graph: onnx.GraphProto, functions: list[onnx.FunctionProto] | None = None) -> bytes:
    made = helper.make_model(graph, functions=functions or [])
    return bytes(made.SerializeToString())


def graph(nodes: list[onnx.NodeProto], tensors: list[TensorProto] | None = None) -> onnx.GraphProto:
    return helper.make_graph(nodes, "g", [], [], tensors or [])


def in_initializer() -> bytes:
    return model(graph([], [external_tensor()]))


def in_constant() -> bytes:
    return model(graph([helper.make_node("Constant", [], ["c"], value=external_tensor())]))


def in_sparse_initializer() -> bytes:
    made = graph([])
    made.sparse_initializer.add(values=external_tensor(), dims=[1])
    return model(made)


def in_subgraph() -> bytes:
    inner = graph([], [external_tensor()])
    return model(graph([helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=graph([]))]))


def in_function() -> bytes:
    node = helper.make_node("Constant", [], ["c"], value=external_tensor())
    return model(graph([]), [helper.make_function("d", "f", [], ["c"], [node], [helper.make_opsetid("", 21)])])


def in_a_list_of_tensors() -> bytes:
    return model(graph([helper.make_node("N", [], ["y"], domain="d", a=[external_tensor()])]))


def in_a_list_of_graphs() -> bytes:
    return model(graph([helper.make_node("N", [], ["y"], domain="d", a=[graph([], [external_tensor()])])]))


def in_a_sparse_attribute() -> bytes:
    return model(graph([helper.make_node("N", [], ["y"], domain="d", a=sparse_tensor())]))


def in_a_list_of_sparse_tensors() -> bytes:
    return model(graph([helper.make_node("N", [], ["y"], domain="d", a=[sparse_tensor()])]))


def in_the_indices_of_a_sparse_initializer() -> bytes:
    made = graph([])
    made.sparse_initializer.add(indices=external_tensor(), dims=[1])
    return model(made)


def in_the_default_of_a_functions_attribute() -> bytes:
    function = helper.make_function("d", "f", [], ["c"], [], [helper.make_opsetid("", 21)])
    function.attribute_proto.append(helper.make_attribute("a", external_tensor()))
    return model(graph([]), [function])


def in_training_info(part: str) -> bytes:
    made = helper.make_model(graph([]))
    getattr(made.training_info.add(), part).CopyFrom(graph([], [external_tensor()]))
    return bytes(made.SerializeToString())


def sparse_tensor() -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=external_tensor(), dims=[1])


HIDING_PLACES: list[Callable[[], bytes]] = [
    in_initializer,
    in_constant,
    in_sparse_initializer,
    in_the_indices_of_a_sparse_initializer,
    in_subgraph,
    in_a_list_of_tensors,
    in_a_list_of_graphs,
    in_a_sparse_attribute,
    in_a_list_of_sparse_tensors,
    in_function,
    in_the_default_of_a_functions_attribute,
    functools.partial(in_training_info, "initialization"),
    functools.partial(in_training_info, "algorithm"),
]


@pytest.mark.parametrize("hide", HIDING_PLACES)
def test_external_data_is_found(hide: Callable[[], bytes]) -> None:
    assert [found.location for found in external_data(hide(), SOURCE)] == ["w.bin"]


def test_a_graph_may_read_the_files_beside_each_other(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(8))
    check_external_data(model(graph([], [external_tensor(offset=4)])), tmp_path, SOURCE)


@pytest.mark.parametrize("location", ["/etc/passwd", "../w.bin", "sub/../w.bin", "./w.bin", "", "link.bin", "nowhere"])
def test_a_graph_may_not_read_elsewhere(location: str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(8))
    (tmp_path / "link.bin").symlink_to("/etc/passwd")
    with pytest.raises(BundleError, match="which is not a file of the bundle"):
        check_external_data(model(graph([], [external_tensor(location)])), tmp_path, SOURCE)


@pytest.mark.parametrize(("offset", "length"), [(8, 4), (0, 9), (-4, 4), (0, -1), (2**62, 2**62)])
def test_a_graph_may_not_read_beyond_a_file(offset: int, length: int, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(8))
    with pytest.raises(BundleError, match="which has 8"):
        check_external_data(model(graph([], [external_tensor(offset=offset, length=length)])), tmp_path, SOURCE)


def test_damaged_graphs_are_refused_and_never_crash(tmp_path: Path) -> None:
    rng = random.Random(0)
    whole = in_subgraph()
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            check_external_data(bytes(data[: rng.randint(0, len(data))]), tmp_path, SOURCE)
        except BundleError as error:
            assert "decoder.onnx" in error.message


def test_an_engine_refuses_a_sealed_bundle_whose_graph_reads_elsewhere(bundle_copy: Path) -> None:
    path = bundle_copy / "graphs" / "onnxruntime" / "decoder.onnx"
    made = onnx.load(str(path), load_external_data=False)
    stolen = external_tensor("../../../../etc/hostname", 0, 4)
    stolen.name = "stolen"
    made.graph.initializer.append(stolen)
    path.write_bytes(made.SerializeToString())
    plain = json.loads((bundle_copy / MANIFEST).read_text())
    plain["files"]["graphs/onnxruntime/decoder.onnx"] = vars(FileEntry(fsio.sha256(path), path.stat().st_size))
    (bundle_copy / MANIFEST).write_bytes(fsio.json_bytes(plain | {"digest": _digest(plain)}))
    with pytest.raises(BundleError, match=r"reads weights from '../../../../etc/hostname'"):
        OnnxruntimeEngine(Bundle.open(bundle_copy))


def test_the_walk_agrees_with_the_onnx_package(tiny_bundle: Path) -> None:
    for path in (tiny_bundle / "graphs" / "onnxruntime").iterdir():
        made = onnx.load(str(path), load_external_data=False)
        places = [{e.key: e.value for e in tensor.external_data} for tensor in made.graph.initializer]
        want = [(p["location"], int(p["offset"]), int(p["length"])) for p in places if p]
        got = [(d.location, d.offset, d.length) for d in external_data(path.read_bytes(), path)]
        assert got == want
        assert np.unique([offset for _, offset, _ in got]).size > 1
