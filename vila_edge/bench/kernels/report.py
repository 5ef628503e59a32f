"""A result of `run.bench_kernels` as tables: the same cells for a terminal and for markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vila_edge.bench.kernels.targets import Judged, judge, torch_product, torch_projector
from vila_edge.bench.report import DASH, Sheet, markdown_lines

Row = dict[str, Any]


def sheets(found: dict[str, Any]) -> list[Sheet]:
    """What people want to know of it."""
    kernels = (_decode(found), _prefill(found), _projector(found), _other(found))
    return [bandwidth_sheet(found), *kernels, targets_sheet(judge(found))]


def markdown(found: dict[str, Any]) -> str:
    """The whole result as a document, but for the single samples."""
    lines = [f"# Kernels on {found['gpu']['name']}", "", headline(found), "", *code_lines(found), ""]
    return "\n".join([*lines, *markdown_lines(sheets(found))])


def headline(found: dict[str, Any]) -> str:
    """What ran where, in one line."""
    gpu, driver, torch = found["gpu"], found["driver"], found["torch"] or {"absent": "not asked for"}
    peer = f"torch {torch['version']} (CUDA {torch['cuda']})" if "version" in torch else f"no torch: {torch['absent']}"
    return (
        f"{found['date']}, {gpu['name']} (compute capability {gpu['compute_capability']}), driver {driver['version'] or DASH} "
        f"for CUDA {driver['cuda']}, NVRTC {found['toolkit']['nvrtc']}, commit {found['commit'] or DASH}; {peer}"
    )


def code_lines(found: dict[str, Any]) -> list[str]:
    """Where the code of each file was from."""
    return [f"* `{file}`: {why}" for file, why in found["toolkit"]["code"].items()]


def _defaults(found: dict[str, Any], group: str) -> Iterator[tuple[Row, str]]:
    """Rows of what is launched by default, each with the best other tile: how long that takes, relative to it."""
    rows = [row for row in found["kernels"] if row["group"] == group]
    for row in rows:
        others = [
            other["p50_us"] / row["p50_us"]
            for other in rows
            if (other["name"], other["rows"]) == (row["name"], row["rows"]) and not other["default"]
        ]
        if row["default"]:
            yield row, f"{min(others):.2f}" if others else DASH


def bandwidth_sheet(found: dict[str, Any]) -> Sheet:
    """What everything is measured against."""
    bandwidth = found["bandwidth"]
    rows = [
        (
            f"{kind}, by {one['by']}",
            *(f"{row['bytes_per_s'] / 1e9:,.1f}" for row in (one, again)),
            f"{max(one['bytes_per_s'], again['bytes_per_s']) / bandwidth[kind]:.0%}",
        )
        for kind in ("copy", "read")
        for one, again in zip(bandwidth["before"], bandwidth["after"], strict=True)
        if one["kind"] == kind
    ]
    return Sheet("Memory, in GB/s", ("way", "before", "after", "of the best"), rows)


def _decode(found: dict[str, Any]) -> Sheet:
    ones = {row["name"]: row["p50_us"] for row, _ in _defaults(found, "decode") if row["rows"] == 1}
    rows = list[tuple[str, ...]]()
    for row, other in _defaults(found, "decode"):
        peer = torch_product(found["torch"], row)
        of_one = f"{row['p50_us'] / ones[row['name']]:.2f}" if row["name"] in ones else DASH
        rows.append(
            (
                _product(row),
                f"{row['rows']}",
                f"{row['bytes'] / 1e6:.2f}",
                *_times(row),
                f"{row['of_copy_bandwidth']:.0%}",
                f"{row['of_read_bandwidth']:.0%}",
                of_one,
                other,
                _us(peer.get("int4_us")),
                _us(peer.get("dequantise_us")),
            )
        )
    columns = ("weight", "batch", "MB", "p50 us", "p95 us", "of copy", "of read", "of batch 1", "other tile")
    return beside_torch(found, "Decode: GEMV", columns, ("torch int4 us", "dequantise + library us"), rows)


def _prefill(found: dict[str, Any]) -> Sheet:
    rows = list[tuple[str, ...]]()
    for row, other in _defaults(found, "prefill"):
        peer = torch_product(found["torch"], row)
        rows.append(
            (
                _product(row),
                f"{row['rows']:,}",
                *_times(row),
                *_rates(row, found),
                other,
                _us(peer.get("matmul_us")),
                _us(peer.get("dequantise_us")),
                _us(peer.get("int4_us")),
            )
        )
    columns = ("weight", "tokens", "p50 us", "p95 us", "TFLOP/s", "of library", "other tile")
    peers = ("library, 16 bits, us", "dequantise + library us", "torch int4 us")
    return beside_torch(found, "Prefill: GEMM", columns, peers, rows)


def _projector(found: dict[str, Any]) -> Sheet:
    rows = list[tuple[str, ...]]()
    for row, _ in _defaults(found, "projector"):
        peer = torch_projector(found["torch"], row)
        gain = f"{peer['graph_us'] / row['p50_us']:.2f}" if peer else DASH
        rows.append(
            (
                row["name"],
                f"{row['rows']}",
                f"{len(row['launches'])}",
                *_times(row),
                f"{row['of_copy_bandwidth']:.0%}",
                *_rates(row, found),
                _us(peer.get("eager_us")),
                _us(peer.get("graph_us")),
                gain,
            )
        )
    columns = ("projector", "images", "launches", "p50 us", "p95 us", "weights, of copy", "TFLOP/s", "of library")
    peers = ("torch eager us", "torch in a graph us", "graph over ours")
    return beside_torch(found, "Projector", columns, peers, rows)


def beside_torch(
    found: dict[str, Any], title: str, columns: tuple[str, ...], peers: tuple[str, ...], rows: list[tuple[str, ...]]
) -> Sheet:
    """The last columns are torch's; without it they would be empty."""
    if "version" in (found["torch"] or {}):
        return Sheet(title, (*columns, *peers), rows)
    return Sheet(title, columns, [row[: len(columns)] for row in rows])


def _other(found: dict[str, Any]) -> Sheet:
    rows = [
        (row["name"], f"{row['rows']:,}", *_times(row), f"{row['of_copy_bandwidth']:.0%}")
        for row, _ in _defaults(found, "other")
    ]
    return Sheet("Between the products", ("kernel", "rows", "p50 us", "p95 us", "of copy"), rows)


def targets_sheet(judgement: Sequence[Judged]) -> Sheet:
    """What was wanted, and what was found."""
    rows = [
        (
            judged.target + (f" ({judged.where})" if judged.where else ""),
            f"{judged.sense} {judged.limit:.2f}",
            DASH if judged.found is None else f"{judged.found:.2f}",
            judged.verdict,
        )
        for judged in judgement
    ]
    return Sheet("Targets, the worst of each", ("target", "wanted", "found", ""), rows)


def _product(row: Row) -> str:
    return f"{row['name']} {row['n']}x{row['k']}"


def _times(row: Row) -> tuple[str, str]:
    return _us(row["p50_us"]), _us(row["p95_us"])


def _rates(row: Row, found: dict[str, Any]) -> tuple[str, str]:
    """TFLOP/s, and the share of what the library does with large matrices."""
    library = (found["torch"] or {}).get("matmul_flops_per_s")
    share = f"{row['flops_per_s'] / library:.0%}" if library else DASH
    return f"{row['flops_per_s'] / 1e12:.1f}", share


def _us(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
