"""The same chain in OpenVINO, which compresses such weights itself when it compiles them. Needs openvino and numpy.

python -m benchmarks.int4_peers.openvino_chain FORM CHAIN      one JSON object of samples
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import numpy as np

from benchmarks.int4_peers.form import WIDTHS, Chain, Form, shapes
from benchmarks.int4_peers.timing import integers, sample, scale

GROUP = Form().group_size


def make_model(ov: Any, opset: Any, chain: Chain) -> Any:
    """u4 weights with zero points, subtracted and scaled in groups: the pattern that it knows as compressed."""
    parameter = opset.parameter([-1, WIDTHS[0]], ov.Type.f32, name="x")
    x = parameter
    for seed, (rows, columns) in enumerate(shapes(chain)):
        groups = columns // GROUP
        shape = [rows, groups, GROUP]
        q = opset.convert(_constant(ov, integers(rows * columns, seed), shape), "f16")
        zeros = np.full(rows * groups // 2, 0x88, np.uint8)
        centred = opset.subtract(q, opset.convert(_constant(ov, zeros, [rows, groups, 1]), "f16"))
        scales = opset.constant(np.full((rows, groups, 1), scale(columns), np.float16))
        weight = opset.reshape(opset.multiply(centred, scales), np.array([rows, columns]), special_zero=False)
        x = opset.matmul(x, opset.convert(weight, "f32"), transpose_a=False, transpose_b=True)
    return ov.Model([opset.result(x)], [parameter], "chain")


def _constant(ov: Any, packed: Any, shape: list[int]) -> Any:
    tensor = ov.Tensor(ov.Type.u4, ov.Shape(shape))
    np.copyto(tensor.data.reshape(-1).view(np.uint8), packed)
    return ov.op.Constant(tensor)


def main(chain: Chain) -> None:
    ov, opset = importlib.import_module("openvino"), importlib.import_module("openvino.opset13")
    options = {"INFERENCE_NUM_THREADS": chain.threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = GROUP  # activations in 8 bits, as accuracy_level 4 has them
    compiled = ov.Core().compile_model(make_model(ov, opset, chain), "CPU", options)
    request = compiled.create_infer_request()
    rows = sample(lambda x: request.infer({0: x})[0], chain)
    print(json.dumps({"rows": rows, "version": f"OpenVINO {ov.__version__.split('-')[0]}"}))


if __name__ == "__main__":
    main(Chain.from_json(sys.argv[2]))
