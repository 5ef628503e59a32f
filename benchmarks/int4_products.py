"""4-bit products on this CPU, in every form that a graph can give them, beside OpenVINO: what the bundle's form costs.

    python -m benchmarks.int4_products [--openvino-python PYTHON] [--json FILE]

A chain of products as of VILA1.5-3B's feed-forward layers (2560 to 6912 and back), as many as it takes to be more than
the caches hold, so that one row (decode) reads every weight from memory, and many rows (prefill) compute. Forms take
turns in rounds, each in a process of its own; `read` is the share of the memory's read bandwidth, measured in the same
run, that the stored bytes of the weights make of the time. All have large pages of memory, as vila-edge has. The first form is the bundle's own.

`--openvino-python` is an interpreter with `pip install openvino`. Weights are noise.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.cpu_peers.process import ROOT
from benchmarks.int4_peers.form import FORMS, OPENVINO, Chain, stored_bytes
from vila_edge import huge_pages
from vila_edge.bench.bandwidth import more_than_caches, read_bandwidth
from vila_edge.bench.machine import machine, versions
from vila_edge.cores import usable_cores


@dataclass(frozen=True)
class Figures:
    """Milliseconds of one chain, of every repetition, by rows."""

    rows: dict[int, list[float]]
    version: str


def main(
    openvino_python: Annotated[str | None, typer.Option(help="An interpreter with openvino.")] = None,
    pairs: Annotated[int, typer.Option(min=0, help="Of products: 18 MB each; four times the caches by default.")] = 0,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Rows of a prefill.")] = 256,
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1)] = 5,
    threads: Annotated[int | None, typer.Option("-t", "--threads")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    pairs = pairs or -(-more_than_caches() // stored_bytes(next(iter(FORMS)), Chain(1, (1, 2), 1, 1)))
    chain = Chain(pairs, (1, prompt_tokens), threads or usable_cores(), repetitions)
    names = [*FORMS, *((OPENVINO,) if openvino_python else ())]
    found: dict[str, list[Figures]] = {name: [] for name in names}
    bandwidth: list[float] = []
    for number in range(rounds):
        bandwidth += read_bandwidth(chain.threads)
        for name in names if number % 2 == 0 else reversed(names):
            found[name].append(run(name, chain, openvino_python))
            print(f"round {number + 1}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    bandwidth += read_bandwidth(chain.threads)
    result = report(found, chain, bandwidth)
    print(markdown(result))
    if json_file:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


def run(name: str, chain: Chain, openvino_python: str | None) -> Figures:
    """One round of a form. Raises SystemExit with what it said if it fails."""
    python, module = (openvino_python or "", "openvino_chain") if name == OPENVINO else (sys.executable, "ort_chain")
    command = [python, "-m", f"benchmarks.int4_peers.{module}", name, chain.to_json()]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | huge_pages.environment(os.environ)
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return Figures({int(rows): samples for rows, samples in answer["rows"].items()}, answer["version"])


def report(found: dict[str, list[Figures]], chain: Chain, bandwidth: list[float]) -> dict[str, Any]:
    """Best and median of each form, and their ratios to the first form's: above 1 is slower than the bundle's form."""
    samples = {
        name: {rows: [s for figures in rounds for s in figures.rows[rows]] for rows in chain.rows}
        for name, rounds in found.items()
    }
    first, best = samples[next(iter(samples))], max(bandwidth)
    forms = {}
    for name, by_rows in samples.items():
        size = stored_bytes(name, chain)
        forms[name] = {
            "version": found[name][0].version,
            "stored_bytes": size,
            "decode_ms": min(by_rows[1]),
            "decode_over_first": statistics.median(by_rows[1]) / statistics.median(first[1]),
            "decode_fraction_of_read_bandwidth": size / min(by_rows[1]) * 1e3 / best,
            "prefill_rows": chain.rows[1],
            "prefill_ms": min(by_rows[chain.rows[1]]),
            "prefill_over_first": statistics.median(by_rows[chain.rows[1]]) / statistics.median(first[chain.rows[1]]),
            "samples_ms": by_rows,
        }
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "chain": json.loads(chain.to_json()),
        "read_bandwidth": {"bytes_per_s": best, "samples": bandwidth},
        "forms": forms,
    }


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    rows = next(iter(result["forms"].values()))["prefill_rows"]
    lines = [
        f"{result['date']}, {result['machine']['cpu']}, {result['chain']['threads']} threads; memory is read at "
        f"{result['read_bandwidth']['bytes_per_s'] / 1e9:.1f} GB/s.",
        "",
        f"| form | decode, times the first | of the read bandwidth | prefill of {rows}, times the first |",
        "|---|---:|---:|---:|",
    ]
    for name, form in result["forms"].items():
        cells = f"{form['decode_over_first']:.2f} | {form['decode_fraction_of_read_bandwidth']:.0%}"
        lines.append(f"| {name} | {cells} | {form['prefill_over_first']:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
