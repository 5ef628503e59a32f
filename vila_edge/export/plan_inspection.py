"""What a TensorRT-RTX engine says of itself, read from its bytes: for tests and people, where no GPU is at hand.

An engine cannot be loaded without its GPU. One that was built with ProfilingVerbosity.DETAILED carries readable
text, which is no documented format: seen in TensorRT-RTX 1.7.1, and another version may write it differently. What
is found is there; what is not found may still be.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_TENSOR = re.compile(
    rb"tensor=\{ alignment=\d+ (?:const_payload_size=(?P<size>\d+) )?dims=\{(?P<dims>[^{}\n]*)\}[^\n]*? "
    rb'name="(?P<name>[^"\n]+)"[^\n]*? region=(?P<region>\S+)[^\n]*? type=(?P<type>\w+) \}'
)
_KERNEL = re.compile(rb" (?:function|runtime_fusion)=\{ name=(?:__myl)?_(\w+)")
_WIDENED = re.compile(r"(Repl)?CastMulCast")  # integers times scales, written to memory: a product would end in Fc


@dataclass(frozen=True)
class PlanTensor:
    """A tensor of the network. `shape` has None where a dimension varies."""

    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class PlanDescription:
    """`tensors`: the named ones, of the first profile. `constants`: part of the plan -> type -> bytes; profiles that
    share their weights list them once each. `kernels`: how often each fused kernel is named."""

    tensors: dict[str, PlanTensor]
    constants: dict[str, dict[str, int]]
    kernels: Counter[str]

    @property
    def widened(self) -> int:
        """Kernels that widen a quantised weight in memory before its product, instead of inside of it."""
        return sum(count for name, count in self.kernels.items() if _WIDENED.fullmatch(name))


def describe_plan(plan: bytes | memoryview) -> PlanDescription:
    """What the text in a serialised engine shows; empty for an engine without such text."""
    tensors = dict[str, PlanTensor]()
    constants = dict[str, dict[str, int]]()
    seen = set[tuple[str, str]]()
    for match in _TENSOR.finditer(plan):
        name, region, dtype = (match[key].decode() for key in ("name", "region", "type"))
        if match["size"] is None:
            tensors.setdefault(name.removesuffix(".1"), PlanTensor(dtype, _shape(match["dims"].decode())))
        elif (region, name) not in seen:
            seen.add((region, name))
            sizes = constants.setdefault(region, {})
            sizes[dtype] = sizes.get(dtype, 0) + int(match["size"])
    return PlanDescription(tensors, constants, Counter(name.decode() for name in _KERNEL.findall(plan)))


def _shape(dims: str) -> tuple[int | None, ...]:
    """`1 "__mye5267_proxy.1" 64` -> (1, None, 64)"""
    return tuple(int(size) if size.isdigit() else None for size in dims.split())
