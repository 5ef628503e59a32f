"""One form of product in onnxruntime.

python -m benchmarks.int4_peers.ort_chain FORM CHAIN      one JSON object of samples
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from benchmarks.int4_peers.form import FORMS, WIDTHS, Chain, Form, shapes
from benchmarks.int4_peers.timing import integers, sample, scale

OPSET = 21


def make_model(form: Form, chain: Chain) -> bytes:
    """The chain as an ONNX model: x [M, 2560] to y [M, 2560]."""
    nodes, initializers, x = list[Any](), list[Any](), "x"
    for index, (rows, columns) in enumerate(shapes(chain)):
        y = f"y{index}"
        make = _dequantized if form.dequantize else _product
        nodes += make(form, rows, columns, x, y, initializers)
        x = y
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "chain",
        [tensor("x", TensorProto.FLOAT, ["M", WIDTHS[0]])],
        [tensor(x, TensorProto.FLOAT, ["M", WIDTHS[0]])],
        initializers,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _product(form: Form, rows: int, columns: int, x: str, y: str, weights: list[Any]) -> list[Any]:
    groups = columns // form.group_size
    q = integers(rows * columns, len(weights), form.bits).reshape(rows, groups, -1)
    inputs = {"q": q, "s": _scales(rows, groups, columns, form.bits)}
    if form.zero_points:
        inputs["z"] = np.full((rows, -(-groups * form.bits // 8)), 0x88, np.uint8)
    for name, array in inputs.items():
        weights.append(onnx.numpy_helper.from_array(array, f"{name}_{y}"))
    return [
        helper.make_node(
            "MatMulNBits",
            [x, *(f"{name}_{y}" for name in inputs)],
            [y],
            domain="com.microsoft",
            N=rows,
            K=columns,
            bits=form.bits,
            block_size=form.group_size,
            accuracy_level=form.accuracy_level,
        )
    ]


def _dequantized(form: Form, rows: int, columns: int, x: str, y: str, weights: list[Any]) -> list[Any]:
    groups = columns // form.group_size
    packed = integers(rows * columns, len(weights)).tobytes()
    weights.append(helper.make_tensor(f"q_{y}", TensorProto.UINT4, [columns, rows], packed, raw=True))
    weights.append(onnx.numpy_helper.from_array(_scales(groups, rows, columns, form.bits), f"s_{y}"))
    weights.append(
        helper.make_tensor(f"z_{y}", TensorProto.UINT4, [groups, rows], b"\x88" * (groups * rows // 2), raw=True)
    )
    dequantize = helper.make_node(
        "DequantizeLinear", [f"q_{y}", f"s_{y}", f"z_{y}"], [f"w_{y}"], axis=0, block_size=form.group_size
    )
    return [dequantize, helper.make_node("MatMul", [x, f"w_{y}"], [y])]


def _scales(rows: int, groups: int, columns: int, bits: int) -> Any:
    return np.full((rows, groups), scale(columns, bits), np.float32)


def main(name: str, chain: Chain) -> None:
    form, options = FORMS[name], ort.SessionOptions()
    options.intra_op_num_threads = chain.threads
    options.log_severity_level = 3
    if form.dequantize:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(form.accuracy_level))
    loaded = ort.InferenceSession(make_model(form, chain), options, providers=["CPUExecutionProvider"])
    rows = sample(lambda x: loaded.run(None, {"x": x})[0], chain)
    print(json.dumps({"rows": rows, "version": f"onnxruntime {ort.__version__}"}))


if __name__ == "__main__":
    main(sys.argv[1], Chain.from_json(sys.argv[2]))
