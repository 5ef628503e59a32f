"""What torch takes on a GPU for the products and projectors that `vila-edge bench kernels` measures.

    python -m benchmarks.gpu_peers.torch_gpu JOB       JOB as JSON: {"models": [...], "repeat": 20}; prints JSON

Of each product [n, k] and number of rows: the library's product in 16 bits; the same behind a dequantisation of 4-bit
weights, which torch.compile makes one kernel of where it can; torch's own int4 GEMM, where it takes the shape. Weights
are other ones in turn, so many that none comes from L2. All of it in CUDA graphs.

A projector is the architecture run by torch in 16 bits, eagerly and as a graph: one launch for each step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.gpu_peers.torch_clock import CudaClock, Work
from vila_edge import architecture
from vila_edge.bench.kernels.memory import sets_for
from vila_edge.bench.kernels.shapes import Projection, Shapes
from vila_edge.parameters import component, parameter_shapes
from vila_edge.reference.torch_ops import TorchOps

GROUP = 128
INNER_K_TILES = 8  # of torch's int4 layout
LARGE = 8192  # a product of this many cubed is the rate of the library
Dequantise = Callable[[Tensor, Tensor, Tensor], Tensor]


class Clock(Protocol):
    def graph(self, works: Sequence[Work]) -> float: ...

    def eager(self, works: Sequence[Work]) -> float: ...


def dequantise(packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """[n, k/2] bytes, the first input in the low half, with scales and zeros [n, k/128], to [n, k] of their type."""
    q = torch.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1, GROUP)
    return ((q.to(scales.dtype) - zeros[..., None]) * scales[..., None]).reshape(len(packed), -1)


class Weights:
    """Random weights [n, k] of 4 bits, in as many sets as leave nothing in L2."""

    def __init__(self, n: int, k: int, l2_bytes: int, device: str) -> None:
        self.n, self.k, self.device = n, k, device
        self.l2_bytes = l2_bytes
        count = sets_for(n * k // 2, l2_bytes)
        self.packed = [torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device) for _ in range(count)]
        self.scales = torch.full((n, k // GROUP), 0.01, dtype=torch.float16, device=device)
        self.zeros = torch.randint(0, 16, (n, k // GROUP), device=device).half()

    def dense(self) -> list[Tensor]:
        """In 16 bits, in as many sets as these need."""
        some = self.packed[: sets_for(2 * self.n * self.k, self.l2_bytes)]
        return [dequantise(packed, self.scales, self.zeros) for packed in some]

    def int4(self) -> tuple[list[Tensor], Tensor]:
        """In torch's layout, with its scales and zeros [k/128, n, 2]: w = (q - 8) scale + zero. Raises RuntimeError."""
        swapped = [(packed << 4 | packed >> 4) for packed in self.packed]  # its first input is in the high half
        made = [torch.ops.aten._convert_weight_to_int4pack(packed, INNER_K_TILES) for packed in swapped]
        shift = (8 - self.zeros) * self.scales
        return made, torch.stack([self.scales, shift], -1).transpose(0, 1).contiguous().bfloat16()


def measure_products(
    weights: Weights, rows: Sequence[int], clock: Clock, dequantised: Dequantise
) -> dict[str, dict[str, Any]]:
    """By "n x k x rows": `matmul_us`, `dequantise_us` and `int4_us`, the last None with `int4_refused` if it is."""
    found = dict[str, dict[str, Any]]()
    dense = weights.dense()
    for m in rows:
        x = torch.randn(m, weights.k, device=weights.device).half()
        took = {"matmul_us": clock.graph([_product(x, w) for w in dense])}
        both = [_dequantised_product(x, packed, weights, dequantised) for packed in weights.packed]
        found[f"{weights.n}x{weights.k}x{m}"] = took | {"dequantise_us": clock.graph(both)} | _int4(weights, x, clock)
    return found


def _product(x: Tensor, weight: Tensor) -> Work:
    return lambda: x @ weight.T


def _dequantised_product(x: Tensor, packed: Tensor, weights: Weights, dequantised: Dequantise) -> Work:
    return lambda: x @ dequantised(packed, weights.scales, weights.zeros).T


def _int4(weights: Weights, x: Tensor, clock: Clock) -> dict[str, Any]:
    try:
        packed, scales = weights.int4()
        x = x.bfloat16()
        return {"int4_us": clock.graph([_int4_product(x, w, scales) for w in packed])}
    except (RuntimeError, NotImplementedError) as error:
        return {"int4_us": None, "int4_refused": str(error).splitlines()[0]}


def _int4_product(x: Tensor, packed: Tensor, scales: Tensor) -> Work:
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales)


def measure_projector(
    projection: Projection, images: Sequence[int], clock: Clock, l2_bytes: int, device: str
) -> dict[str, dict[str, float]]:
    """By name and number of images: `eager_us` and `graph_us`."""
    cfg = projection.config
    shapes = {name: s for name, s in parameter_shapes(cfg).items() if component(name) == "mm_projector"}
    numbers = sum(torch.Size(shape).numel() for shape in shapes.values())
    sets = [
        {name: 0.02 * torch.randn(shape, device=device).half() for name, shape in shapes.items()}
        for _ in range(sets_for(2 * numbers, l2_bytes))
    ]
    found = dict[str, dict[str, float]]()
    for count in images:
        x = torch.randn(count, cfg.vision_tower.num_features, cfg.mm_hidden_size, device=device).half()
        works = [lambda p=p, x=x: architecture.mm_projector(TorchOps(p), x, cfg) for p in sets]
        found[f"{projection.name}, {count} images"] = {"eager_us": clock.eager(works), "graph_us": clock.graph(works)}
    return found


def matmul_rate(clock: Clock, device: str, size: int = LARGE) -> float:
    """Operations a second of the library's product of large matrices in 16 bits."""
    a, b = (torch.randn(size, size, device=device).half() for _ in range(2))
    return 2 * size**3 / clock.graph([lambda: a @ b]) * 1e6


def compile_every_shape() -> None:
    torch._dynamo.config.recompile_limit = 256  # a kernel for each shape, and no fall back behind the eighth


def compiled_dequantise(device: str) -> tuple[Dequantise, str]:
    """`dequantise` as one kernel, and by what; as it is where torch cannot compile."""
    one = torch.compile(dequantise, dynamic=False)
    try:
        one(
            torch.zeros(16, 64, dtype=torch.uint8, device=device),
            torch.zeros(16, 1, dtype=torch.float16, device=device),
            torch.zeros(16, 1, dtype=torch.float16, device=device),
        )
    except Exception as error:  # whatever is missing: Triton, a compiler, a driver
        return dequantise, f"torch step by step, as torch.compile fails: {(str(error).splitlines() or ['?'])[0]}"
    return one, "torch.compile"


def measure(shapes: Shapes, clock: Clock, dequantised: Dequantise, l2_bytes: int, device: str) -> dict[str, Any]:
    """All products of 4 bits, and all projectors."""
    products, projectors = dict[str, Any](), dict[str, Any]()
    rows = sorted({*shapes.batches, *shapes.tokens})
    for n, k in {(p.n, p.k): None for model in shapes.models for p in model.products if p.part != "lm_head"}:
        print(f"torch, {n} x {k}", file=sys.stderr, flush=True)
        products |= measure_products(Weights(n, k, l2_bytes, device), rows, clock, dequantised)
    for projection in shapes.projections:
        print(f"torch, {projection.name}", file=sys.stderr, flush=True)
        projectors |= measure_projector(projection, shapes.images, clock, l2_bytes, device)
    return {"products": products, "projectors": projectors}


@torch.inference_mode()
def main(job: dict[str, Any]) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"absent": f"torch {torch.__version__} finds no GPU"}
    compile_every_shape()
    device, clock = "cuda", CudaClock(job["repeat"])
    dequantised, by = compiled_dequantise(device)
    rate = matmul_rate(clock, device)
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    found = measure(Shapes().of(job["models"]), clock, dequantised, l2_bytes, device)
    origin = {"version": torch.__version__, "cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name()}
    return origin | {"dequantise_by": by, "matmul_flops_per_s": rate} | found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))))
