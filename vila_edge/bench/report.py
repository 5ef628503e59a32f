"""A benchmark's result as tables: the same cells for a terminal and for markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DASH = "-"


@dataclass(frozen=True)
class Sheet:
    """One table. The first column is text, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def sheets(found: dict[str, Any]) -> list[Sheet]:
    """What people want to know of a result of `run.bench`."""
    return [_stages(found), _decode(found), _other(found), *([_agreement(found)] if found["agreement"] else [])]


def markdown(found: dict[str, Any]) -> str:
    """The whole result as a document, but for the single samples."""
    lines = [f"# {found['bundle']['name']} on {found['machine']['cpu']}", "", headline(found), ""]
    return "\n".join([*lines, *markdown_lines(sheets(found))])


def markdown_lines(tables: Sequence[Sheet]) -> list[str]:
    """Each with its title."""
    lines = list[str]()
    for sheet in tables:
        lines += [f"## {sheet.title}", "", _line(sheet.columns), _line(("---", *("---:",) * (len(sheet.columns) - 1)))]
        lines += [*map(_line, sheet.rows), ""]
    return lines


def headline(found: dict[str, Any]) -> str:
    """What ran where, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(found["versions"].items()))
    return (
        f"{found['date']}, bundle {found['bundle']['sha256'][:12]}, {found['backend']}, "
        f"{found['machine']['cpu']}; {versions}"
    )


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _stages(found: dict[str, Any]) -> Sheet:
    work, rows = found["workload"], []
    for stage, times in found["stages"].items():
        images = f"{work['images']} image{'' if work['images'] == 1 else 's'}"
        of = f"{times['tokens']:,} tokens" if stage == "prefill" else images
        rate = f"{times['tokens_per_s']:.1f}" if stage == "prefill" else DASH
        rows.append((f"{stage}, {of}", _ms(times["p50_ms"]), _ms(times["p95_ms"]), rate))
    for row in found["decode"]:
        name = f"decode, a token behind {row['context']:,}"
        rows.append((name, _ms(row["p50_ms"]), _ms(row["p95_ms"]), f"{row['tokens_per_s']:.1f}"))
    return Sheet("Stages", ("stage", "p50 ms", "p95 ms", "tokens/s"), rows)


def _decode(found: dict[str, Any]) -> Sheet:
    best = found["read_bandwidth"]["bytes_per_s"]
    columns = ("context", "weights MB", "kv_cache MB", "GB/s", f"of {best / 1e9:.1f} GB/s")
    rows = [
        (
            f"{row['context']:,}",
            _mb(row["weight_bytes"]),
            _mb(row["kv_cache_bytes"]),
            f"{row['bytes_per_s'] / 1e9:.2f}",
            DASH if row["fraction_of_read_bandwidth"] is None else f"{row['fraction_of_read_bandwidth']:.0%}",
        )
        for row in found["decode"]
    ]
    return Sheet("What decode reads for a token", columns, rows)


def _other(found: dict[str, Any]) -> Sheet:
    memory, cold = found["memory"], found["cold_start"]
    rows = [
        ("most memory held, MB", _mb(memory["peak"])),
        ("memory held at the end, MB", _mb(memory["resident"])),
        ("memory planned, MB", _mb(memory["planned"])),
        (f"kv_cache of {memory['kv_cache_positions']:,} positions, MB", _mb(memory["kv_cache"])),
        ("load in a fresh process, ms", _ms(cold["load_ms"])),
        (f"its first token, behind {cold['positions']:,} positions, ms", _ms(cold["first_token_ms"])),
        ("most memory it held, MB", _mb((cold["memory"] or {}).get("peak"))),
    ]
    return Sheet("Memory and start", ("", "value"), rows)


def _agreement(found: dict[str, Any]) -> Sheet:
    agreement = found["agreement"]
    rows = [
        ("same most likely token", f"{agreement['top1_agreement']:.1%}"),
        ("KL divergence, nats", f"{agreement['mean_kl']:.2g}"),
    ]
    kinds = f"{found['options']['kv_cache']} against {agreement['against']}"
    title = f"kv_cache in {kinds}, {agreement['positions']} positions of an answer"
    return Sheet(title, ("", "value"), rows)


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _mb(size: float | None) -> str:
    if size is None:
        return DASH
    return f"{size / 1e6:,.1f}" if size < 1e8 else f"{size / 1e6:,.0f}"
