"""Where a token's time goes: the operators of a bundle's decoder, by onnxruntime's own profile, beside the memory's limit.

    python -m benchmarks.decoder_profile BUNDLE [--kv-cache int8] [-c 64] [-p 512] [--json FILE]

For decode, each product's time is compared with what reading its stored bytes takes at the read bandwidth measured in
the same run: where the share is well below that of other products, its kernel is the limit and not the memory. For
prefill, products are given in GFLOP/s. Profiling itself costs a little: shares are of the profiled time.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from vila_edge.backends import KV_CACHES
from vila_edge.bench.bandwidth import read_bandwidth
from vila_edge.bench.machine import machine, versions
from vila_edge.bench.traffic import parts_of
from vila_edge.bindings import CacheType
from vila_edge.bundle import Bundle
from vila_edge.cores import usable_cores
from vila_edge.engine.onnxruntime import OnnxruntimeEngine
from vila_edge.huge_pages import restart
from vila_edge.parameters import fused

KERNEL = "_kernel_time"
PRODUCT, HEAD = "MatMul", "lm_head"  # kinds of operators that read weights, and the last of them


@dataclass(frozen=True)
class Operator:
    """One run of an operator."""

    kind: str  # MatMulNBits
    node: str  # its name in the graph
    milliseconds: float


def main(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE")],
    kv_cache: Annotated[str, typer.Option(help=f"{', '.join(KV_CACHES)}.")] = "float32",
    context: Annotated[int, typer.Option("-c", "--context", min=1, help="Positions behind which it decodes.")] = 64,
    prompt_tokens: Annotated[int, typer.Option("-p", "--prompt-tokens", min=2)] = 512,
    new_tokens: Annotated[int, typer.Option("-n", "--new-tokens", min=1)] = 32,
    threads: Annotated[int | None, typer.Option("-t", "--threads")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    if kv_cache not in KV_CACHES:
        raise SystemExit(f"--kv-cache {kv_cache}: expected one of {', '.join(KV_CACHES)}")
    opened, threads = Bundle.open(bundle), threads or usable_cores()
    bandwidth = read_bandwidth(threads)
    kind = KV_CACHES[KV_CACHES.index(kv_cache)]
    decode = profile(opened, kind, threads, context, new_tokens)
    prefill = profile(opened, kind, threads, prompt_tokens, 0)
    bandwidth += read_bandwidth(threads)
    result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "threads": threads,
        "kv_cache": kv_cache,
        "context": context,
        "prompt_tokens": prompt_tokens,
        "read_bandwidth": {"bytes_per_s": max(bandwidth), "samples": bandwidth},
        "decode": summary(decode, new_tokens, weights_of(opened), max(bandwidth)),
        "prefill": summary(prefill, 1, weights_of(opened), max(bandwidth), prompt_tokens),
    }
    print(markdown(result))
    if json_file:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


def profile(bundle: Bundle, kv_cache: CacheType, threads: int, context: int, new_tokens: int) -> list[Operator]:
    """Operators of `new_tokens` of decode behind a context; with none, of the prefill of the context itself.

    The decoder is loaded for it, and the context computed once before.
    """
    with tempfile.TemporaryDirectory() as folder:
        engine = OnnxruntimeEngine(bundle, threads, kv_cache, profile=Path(folder))
        ids = np.random.default_rng(0).integers(0, engine.cfg.llm.vocab_size, context + new_tokens)
        embeds, cache = engine.embed_tokens(ids.tolist()), engine.new_cache(context + new_tokens)
        chunks = range(0, context, engine.prefill_chunk)
        prefill = [embeds[start : min(context, start + engine.prefill_chunk)] for start in chunks]
        decode = [embeds[position : position + 1] for position in range(context, context + new_tokens)]
        for chunk in prefill:
            engine.forward(chunk, cache)
        if not decode:
            cache.truncate(0)
        for step in decode or prefill:
            engine.forward(step, cache)
        return [operator for file in engine.end_profiles() for operator in operators(file, len(prefill))]


def operators(file: Path, skipped: int) -> list[Operator]:
    """What ran behind the first `skipped` runs of a session, from its profile."""
    events = json.loads(file.read_text())
    runs = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    return [
        Operator(event["args"]["op_name"], event["name"].removesuffix(KERNEL), event["dur"] / 1e3)
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith(KERNEL) and event["ts"] >= runs[skipped]
    ]


def weights_of(bundle: Bundle) -> dict[str, tuple[int, int]]:
    """Linear -> bytes as they are stored, and numbers; a product of several of one input counts all of them."""
    parts, found = parts_of(bundle), dict[str, tuple[int, int]]()
    for name, part in parts.items():
        if name.endswith(".weight"):
            found[name.removesuffix(".weight")] = (part.size, part.numbers)
    for name in list(found):
        whole, members = fused(name)
        if all(member in found for member in members):
            found[whole] = tuple(sum(found[member][i] for member in members) for i in (0, 1))  # type: ignore[assignment]
    return found


def summary(
    found: Iterable[Operator], runs: int, weights: dict[str, tuple[int, int]], bandwidth: float, rows: int = 1
) -> list[dict[str, Any]]:
    """A row for each kind of operator, products by what they multiply with: the most time first."""
    times, sizes = defaultdict[str, float](float), defaultdict[str, list[int]](lambda: [0, 0])
    seen = set[str]()
    for operator in found:
        linear = operator.node.rpartition("/")[0]
        known = weights.get(linear) if operator.kind.startswith(PRODUCT) else None
        name = f"{operator.kind} {linear.rpartition('.')[2]}" if known else operator.kind
        times[name] += operator.milliseconds / runs
        if known and operator.node not in seen:
            seen.add(operator.node)
            sizes[name][0] += known[0]
            sizes[name][1] += known[1]
    total, result = sum(times.values()), []
    for name, milliseconds in sorted(times.items(), key=lambda item: -item[1]):
        row: dict[str, Any] = {"operator": name, "milliseconds": milliseconds, "share": milliseconds / total}
        size, numbers = sizes[name]
        if size and rows == 1:
            row["fraction_of_read_bandwidth"] = size / milliseconds * 1e3 / bandwidth
        elif size and not name.endswith(HEAD):  # which has one row, whatever the prompt
            row["gflop_per_s"] = 2 * numbers * rows / milliseconds / 1e6
        result.append(row)
    return result


def markdown(result: dict[str, Any]) -> str:
    """Both tables."""
    lines = [
        f"{result['date']}, {result['machine']['cpu']}, {result['threads']} threads, kv_cache in {result['kv_cache']}; "
        f"memory is read at {result['read_bandwidth']['bytes_per_s'] / 1e9:.1f} GB/s."
    ]
    titles = {
        "decode": (
            "fraction_of_read_bandwidth",
            f"decode behind {result['context']}",
            "of the read bandwidth",
            "{:.0%}",
        ),
        "prefill": ("gflop_per_s", f"prefill of {result['prompt_tokens']}", "GFLOP/s", "{:.0f}"),
    }
    for stage, (field, title, unit, form) in titles.items():
        lines += ["", f"| {title} | share of the time | {unit} |", "|---|---:|---:|"]
        for row in result[stage]:
            value = form.format(row[field]) if field in row else ""
            lines.append(f"| {row['operator']} | {row['share']:.1%} | {value} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    restart()  # with large pages, as the command line has them
    typer.run(main)
