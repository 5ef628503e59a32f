"""A result of `run.bench_decoder` as tables: the same cells for a terminal and for markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vila_edge.bench.decoder.targets import judge, torch_absent, torch_decode, torch_prefill
from vila_edge.bench.kernels.report import bandwidth_sheet, beside_torch, code_lines, headline, targets_sheet
from vila_edge.bench.report import DASH, Sheet, markdown_lines

__all__ = ["headline", "markdown", "sheets"]

WITHOUT_TOWER = "the vision tower is not in it: vila-edge bench BUNDLE --backend cuda"

Row = dict[str, Any]


def sheets(found: dict[str, Any]) -> list[Sheet]:
    """What people want to know of it."""
    missing = _missing(found)
    measured = (bandwidth_sheet(found), _decode(found), _first_token(found), _prefill(found))
    return [*measured, *([missing] if missing.rows else []), targets_sheet(judge(found))]


def markdown(found: dict[str, Any]) -> str:
    """The whole result as a document, but for the single samples."""
    lines = [f"# Decoders on {found['gpu']['name']}, random weights", "", headline(found), "", *code_lines(found), ""]
    return "\n".join([*lines, *markdown_lines(sheets(found))])


def _present(found: dict[str, Any]) -> Iterator[Row]:
    return (row for row in found["models"] if row["absent"] is None)


def _decode(found: dict[str, Any]) -> Sheet:
    rows = list[tuple[str, ...]]()
    for row in _present(found):
        for step in row["decode"]:
            if step["absent"] is not None:
                continue
            theirs = torch_decode(found["torch"], row["model"], step["batch"], step["context"])
            rows.append(
                (
                    _name(row),
                    f"{step['context']:,}",
                    f"{step['batch']}",
                    f"{step['tokens_per_s']:,.1f}",
                    _ms(step["p50_ms"]),
                    _ms(step["p95_ms"]),
                    _ms(step["gpu"]["p50_ms"]),
                    f"{step['launches_per_token']}",
                    _mb(step["weight_bytes"]),
                    _mb(step["kv_cache_bytes"]),
                    f"{step['of_copy_bandwidth']:.0%}",
                    f"{step['of_read_bandwidth']:.0%}",
                    f"{theirs:,.1f}" if theirs else DASH,
                    f"{step['tokens_per_s'] / theirs:.2f}" if theirs else DASH,
                )
            )
    times = ("tokens/s", "p50 ms", "p95 ms", "graph ms", "launches")
    columns = ("model, kv_cache", "context", "batch", *times, "weights MB", "kv_cache MB", "of copy", "of read")
    return beside_torch(found, "Decode, a step", columns, ("torch tokens/s", "ours over torch"), rows)


def _first_token(found: dict[str, Any]) -> Sheet:
    prompt, rows = found["options"]["prompt_tokens"], list[tuple[str, ...]]()
    for row in _present(found):
        (prefill,) = (each for each in row["prefill"] if each["tokens"] == prompt)
        parts = (row["projector"]["p50"], prefill["p50_ms"], prefill["first_step"]["p50_ms"])
        stages = (*map(_ms, parts), _ms(sum(parts)))
        rows.append((_name(row), f"{row['load_s']:.1f}", _mb(row["memory_bytes"]), *stages))
    title = f"Load, and the first token behind {prompt:,} positions; {WITHOUT_TOWER}"
    columns = ("model, kv_cache", "load s", "GPU MB", "projector ms", "prefill ms", "first step ms", "together ms")
    return Sheet(title, columns, rows)


def _prefill(found: dict[str, Any]) -> Sheet:
    rows = list[tuple[str, ...]]()
    for row in _present(found):
        for prefill in row["prefill"]:
            theirs = torch_prefill(found["torch"], row["model"], prefill["tokens"])
            dequantise = theirs.get("dequantise_ms")
            rows.append(
                (
                    _name(row),
                    f"{prefill['tokens']:,}",
                    _ms(prefill["p50_ms"]),
                    _ms(prefill["p95_ms"]),
                    f"{prefill['tokens_per_s']:,.0f}",
                    _ms(theirs.get("library_ms")),
                    _ms(dequantise),
                    f"{dequantise / prefill['p50_ms']:.2f}" if dequantise else DASH,
                )
            )
    columns = ("model, kv_cache", "tokens", "p50 ms", "p95 ms", "tokens/s")
    peers = ("library, 16 bits, ms", "dequantise + library ms", "that over ours")
    return beside_torch(found, "Prefill", columns, peers, rows)


def _missing(found: dict[str, Any]) -> Sheet:
    """What had no room, ours and torch's."""
    rows = [(_name(row), row["absent"]) for row in found["models"] if row["absent"] is not None]
    for row in _present(found):
        rows += [
            (f"{_name(row)}, batch {step['batch']} behind {step['context']:,}", step["absent"])
            for step in row["decode"]
            if step["absent"] is not None
        ]
    for model in dict.fromkeys(row["model"] for row in found["models"]):
        if why := torch_absent(found["torch"], model):
            rows.append((f"{model}, torch", why))
    return Sheet("Does not fit", ("what", "why"), rows)


def _name(row: Row) -> str:
    return f"{row['model']}, {row['kv_cache']}"


def _ms(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f}" if size < 1e8 else f"{size / 1e6:,.0f}"
