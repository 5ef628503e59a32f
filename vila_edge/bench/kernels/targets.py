"""What the kernels are wanted to reach, as ratios within one run, and whether they did."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

LARGE, SMALL = 60e6, 9e6  # bytes of a weight
MANY_TOKENS = 1024

Row = dict[str, Any]
Found = tuple[float, str]  # a ratio, and where it was found


@dataclass(frozen=True)
class Judged:
    """A target and the worst that was found; `found` None: not measured."""

    target: str
    sense: Literal["at least", "at most"]
    limit: float
    found: float | None
    where: str

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        met = self.found >= self.limit if self.sense == "at least" else self.found <= self.limit
        return "met" if met else "missed"


def judge(result: dict[str, Any]) -> list[Judged]:
    """Every target, of a result of `run.bench_kernels`. What is launched by default counts, and the worst of it."""
    rows = [row for row in result["kernels"] if row["default"]]
    decode = [row for row in rows if row["group"] == "decode"]
    ones = [row for row in decode if row["rows"] == 1]
    return [
        least("GEMV of 60 MB or more, batch 1, of the copy bandwidth", 0.80, _copies(ones, LARGE, float("inf"))),
        least("GEMV of 9 to 60 MB, batch 1, of the copy bandwidth", 0.45, _copies(ones, SMALL, LARGE)),
        most("GEMV, batch 8 over batch 1", 1.25, _batches(decode)),
        most("GEMM of 1024 tokens or more, over dequantise + library", 1.0, _dequantised(rows, result["torch"])),
        least("projector, unfused in a graph over fused", 1.3, _projectors(rows, result["torch"])),
    ]


def least(target: str, limit: float, found: Iterable[Found]) -> Judged:
    """Whether the smallest ratio is at least `limit`."""
    return _judged(target, "at least", limit, found, min)


def most(target: str, limit: float, found: Iterable[Found]) -> Judged:
    """Whether the largest ratio is at most `limit`."""
    return _judged(target, "at most", limit, found, max)


def _judged(
    target: str,
    sense: Literal["at least", "at most"],
    limit: float,
    found: Iterable[Found],
    worst_of: Callable[[list[Found]], Found],
) -> Judged:
    measured = list(found)
    ratio, where = worst_of(measured) if measured else (None, "")
    return Judged(target, sense, limit, ratio, where)


def _copies(rows: list[Row], from_: float, below: float) -> list[Found]:
    return [(row["of_copy_bandwidth"], row["name"]) for row in rows if from_ <= row["bytes"] < below]


def _batches(rows: list[Row]) -> list[Found]:
    ones = {row["name"]: row["p50_us"] for row in rows if row["rows"] == 1}
    return [
        (row["p50_us"] / ones[row["name"]], row["name"]) for row in rows if row["rows"] == 8 and row["name"] in ones
    ]


def _dequantised(rows: list[Row], torch: Any) -> list[Found]:
    found = list[Found]()
    for row in rows:
        peer = torch_product(torch, row)
        if row["group"] == "prefill" and row["rows"] >= MANY_TOKENS and peer:
            found.append((row["p50_us"] / peer["dequantise_us"], f"{row['name']}, {row['rows']} tokens"))
    return found


def _projectors(rows: list[Row], torch: Any) -> list[Found]:
    found = list[Found]()
    for row in rows:
        peer = torch_projector(torch, row)
        if row["group"] == "projector" and peer:
            found.append((peer["graph_us"] / row["p50_us"], f"{row['name']}, {row['rows']} images"))
    return found


def torch_product(torch: Any, row: Row) -> dict[str, Any]:
    """What torch took for the same product, empty if it was not asked: see `benchmarks/gpu_peers`."""
    return ((torch or {}).get("products") or {}).get(f"{row.get('n')}x{row.get('k')}x{row['rows']}") or {}


def torch_projector(torch: Any, row: Row) -> dict[str, Any]:
    """The same for a projector."""
    return ((torch or {}).get("projectors") or {}).get(f"{row['name']}, {row['rows']} images") or {}
