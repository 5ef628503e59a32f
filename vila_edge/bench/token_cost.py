"""What a token costs on our kernels: bytes, launches and operations, counted; and a time, from two constants.

A decode step waits for memory and for the gaps between launches, for nothing else: time = launches t0 + bytes / (efficiency
bandwidth). Until the constants are fitted to a GPU they are assumed, and every time is a prediction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vila_edge.bench.boards import Board
from vila_edge.bench.kernels.shapes import Model, Product
from vila_edge.bench.traffic import KV_BYTES
from vila_edge.errors import ConfigError, UsageError
from vila_edge.kernels.sampling import MAX_BATCH
from vila_edge.kernels.w4_layout import GROUP, ROWS

Form = Literal["int4", "int8"]

HALF, SINGLE = 2, 4  # bytes
ASSUMED = "assumed, not measured on any GPU"
PER_LAYER = ("norm, qkv and rope", "output and residual", "norm, gate, up and SwiGLU", "down and residual")
PER_TOKEN = ("embeddings", "lm_head", "largest logits", "choice", "copy of the ring")


@dataclass(frozen=True)
class Decode:
    """A decode step. Raises UsageError for what the kernels do not take."""

    context: int = 256  # positions that attention reads
    batch: int = 1
    kv_cache: str = "float16"
    attention_launches: int = 2  # 2: over parts of the context, then what combines them

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= MAX_BATCH or self.context < 1:
            raise UsageError(
                f"a batch of {self.batch}, a context of {self.context}: expected 1 to {MAX_BATCH}, and 1 or more"
            )
        if self.kv_cache not in KV_BYTES:
            raise UsageError(f"kv_cache {self.kv_cache}: expected one of {', '.join(KV_BYTES)}")
        if self.attention_launches not in (1, 2):
            raise UsageError(f"{self.attention_launches} launches of attention: expected 1 or 2")


@dataclass(frozen=True)
class Cost:
    """Of one step of a batch."""

    bytes: Mapping[str, int]  # by part
    launches: int
    flops: int

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Constants:
    """What turns a cost into a time. Raises ConfigError for what cannot be."""

    t0_us: float = 3.0  # that a launch of a graph takes, whatever it does
    efficiency: float = 0.75  # of the bandwidth, while bytes flow; others' engines reach 0.68 to 0.79 on Orin in all
    math_efficiency: float = 0.5  # of the tensor cores, in a prefill
    source: str = ASSUMED

    def __post_init__(self) -> None:
        within = 0 <= self.t0_us < math.inf and 0 < self.efficiency <= 1 and 0 < self.math_efficiency <= 1
        if not within:
            raise ConfigError(
                f"t0_us {self.t0_us}, efficiency {self.efficiency}, math_efficiency {self.math_efficiency}: "
                "expected 0 or more, and two shares above 0, at most 1"
            )


@dataclass(frozen=True)
class Measurement:
    """Work on a GPU, and how long it took."""

    bytes: float
    launches: float
    us: float


def weight_bytes(product: Product, form: Form) -> int:
    """Of a packed weight: integers, a float16 scale for each group, and with 4 bits a zero point of a byte."""
    numbers = _up(product.n, ROWS) * _up(product.k, GROUP)
    groups = numbers // GROUP
    return numbers // 2 + groups * (HALF + 1) if form == "int4" else numbers + groups * HALF


def decode_cost(model: Model, decode: Decode) -> Cost:
    """Of the next token of each sequence of a batch."""
    batch, layers, heads, hidden = decode.batch, model.layers, model.heads, model.hidden_size
    *products, lm_head = model.products
    found = {f"{product.part} weights": layers * weight_bytes(product, "int4") for product in products} | {
        "lm_head weights": weight_bytes(lm_head, "int8"),  # in which the cuda engine has it, whatever the bundle says
    }
    position = 2 * layers * heads.key_value * heads.dim * KV_BYTES[decode.kv_cache] * batch  # keys and values
    found |= {"kv_cache read": position * decode.context, "kv_cache written": position}
    found["embeddings, norms"] = HALF * hidden * (batch + 2 * layers + 1)
    # Each product reads its inputs and writes its outputs, SwiGLU half of them; two of them read a residual.
    qkv, attended = (heads.query + 2 * heads.key_value) * heads.dim, heads.query * heads.dim
    numbers = (hidden + qkv) + 2 * attended + (attended + 2 * hidden) + (hidden + model.intermediate_size)
    numbers += model.intermediate_size + 2 * hidden
    found["activations"] = HALF * batch * (layers * numbers + 2 * hidden)
    found["logits"] = 2 * SINGLE * batch * model.vocab_size  # written, and read for the largest
    launches = layers * (len(PER_LAYER) + decode.attention_launches) + len(PER_TOKEN)
    return Cost(found, launches, batch * (_flops(model, lm_head=True) + _attention_flops(model, decode.context)))


def decode_us(cost: Cost, board: Board, constants: Constants) -> float:
    """PREDICTED time of a step, in microseconds."""
    return cost.launches * constants.t0_us + 1e6 * cost.total_bytes / (constants.efficiency * board.bytes_per_s)


def prefill_us(model: Model, tokens: int, decode: Decode, board: Board, constants: Constants) -> float:
    """PREDICTED time until the logits behind a prompt are there: operations, or reading the weights if that is longer."""
    if tokens < 1:
        raise UsageError(f"a prompt of {tokens} tokens: expected 1 or more")
    one = decode_cost(model, Decode(1, 1, decode.kv_cache, decode.attention_launches))
    blocks = tokens * _flops(model, lm_head=False)
    flops = (
        blocks + sum(2 * p.n * p.k for p in model.products[-1:]) + _attention_flops(model, tokens * (tokens + 1) // 2)
    )
    math_us = 1e6 * flops / (constants.math_efficiency * board.flops_per_s)
    memory_us = 1e6 * one.total_bytes / (constants.efficiency * board.bytes_per_s)
    return one.launches * constants.t0_us + max(math_us, memory_us)


def fit(measurements: Sequence[Measurement], bytes_per_s: float, source: str) -> Constants:
    """The constants that explain measurements on a GPU of this bandwidth best, by least squares of relative errors.

    Raises ConfigError for fewer than 3, for some that cannot tell launches from bytes, and for a result that cannot be.
    """
    rows = np.array([(row.launches, row.bytes, row.us) for row in measurements], np.float64).reshape(-1, 3)
    if len(rows) < 3 or not np.isfinite(rows).all() or (rows[:, 2] <= 0).any() or not 0 < bytes_per_s < math.inf:
        raise ConfigError(f"{len(rows)} measurements: expected at least 3, of finite numbers and times above 0")
    scale = rows[:, :2].max(0)
    if scale.min() <= 0:
        raise ConfigError("measurements without launches or without bytes: expected both")
    relative = rows[:, :2] / scale / rows[:, 2:]
    if np.linalg.cond(relative / np.linalg.norm(relative, axis=0)) > 1e4:
        raise ConfigError("measurements that cannot tell launches from bytes: expected other ratios of the two")
    t0_us, us_per_byte = np.linalg.lstsq(relative, np.ones(len(rows)), rcond=None)[0] / scale
    if us_per_byte <= 0:
        raise ConfigError("measurements in which more bytes take less time")
    return Constants(float(t0_us), 1e6 / float(us_per_byte) / bytes_per_s, source=source)


def fit_kernels(found: dict[str, Any]) -> Constants:
    """From a result of `bench kernels`: its decode with a batch of 1. Raises ConfigError as `fit` does, or for another file.

    The efficiency is a share of the copy bandwidth that was measured there, not of a data sheet's.
    """
    try:
        chosen = [row for row in found["kernels"] if (row["group"], row["rows"], row["default"]) == ("decode", 1, True)]
        rows = [Measurement(row["bytes"], len(row["launches"]), row["p50_us"]) for row in chosen]
        source = f"fitted to bench kernels on {found['gpu']['name']}, {found['date']}; share of its copy bandwidth"
        return fit(rows, float(found["bandwidth"]["copy"]), source)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"no result of `bench kernels`: {error!r}") from None


def _flops(model: Model, lm_head: bool) -> int:
    """Of a token's products."""
    *products, head = (2 * product.n * product.k for product in model.products)
    return model.layers * sum(products) + (head if lm_head else 0)


def _attention_flops(model: Model, positions: int) -> int:
    """Of scores and sums over so many pairs of positions."""
    return 4 * model.layers * model.heads.query * model.heads.dim * positions


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
