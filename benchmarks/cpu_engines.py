"""vila-edge and llama.cpp side by side on this CPU, in one run, on decoders of one shape with random weights.

    python -m benchmarks.cpu_engines WORK_DIR --llama-bench PATH [--gguf-python PYTHON] [--json FILE] [--markdown FILE]

WORK_DIR gets a bundle (4 bits in groups of 128 with zero points, lm_head in 8 bits) and files for llama.cpp (Q4_0 and
Q4_1, output Q8_0) of VILA1.5-3B's decoder, 1.6 GB each. What is there already is taken: remove it when the format of
a bundle has changed. `--gguf-python` is an interpreter with `pip install gguf`. How llama-bench is built:
`--llama-bench help`. Run this from the repository.

Engines take turns, in rounds; every other round goes backwards. Each measures in processes of its own: prefill of 512
positions into an empty kv_cache, decode behind so many positions, the first token of a fresh process, the most memory
that it held. The kv_cache is in 32 or 8 bits here, in 16 bits there. `busy` is the share of the machine that went to
other programs: figures of a busy machine are worth little. The bandwidth of reading memory is measured in each round.

What is claimed are ratios of one run. Weights are noise: nothing is said of how good an answer is. Q4_0 and Q4_1 have a
scale for each 32 numbers, Q4_1 a minimum as well: a token reads more bytes of them than of the bundle.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.cpu_peers import llama_bench, ours
from benchmarks.cpu_peers.job import COLD_POSITIONS, Figures, Job
from benchmarks.cpu_peers.process import ROOT
from benchmarks.cpu_peers.shape import Shape
from vila_edge.bench.bandwidth import read_bandwidth
from vila_edge.bench.machine import machine
from vila_edge.cores import usable_cores

OURS = {"ours-float32": "float32", "ours-int8": "int8"}  # by kv_cache
PEERS = {"llama.cpp-Q4_0": "Q4_0", "llama.cpp-Q4_1": "Q4_1"}

Rounds = dict[str, list[Figures]]


def main(
    folder: Annotated[Path, typer.Argument(metavar="WORK_DIR", help="Where models are made.")],
    llama_bench_path: Annotated[Path | None, typer.Option("--llama-bench", help="The program.")] = None,
    gguf_python: Annotated[str, typer.Option(help="An interpreter with gguf.")] = sys.executable,
    engine: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join([*OURS, *PEERS])}; all.")] = None,
    layers: Annotated[int, typer.Option(help="Decoder blocks.")] = 32,
    prompt_tokens: Annotated[int, typer.Option()] = 512,
    context: Annotated[list[int] | None, typer.Option("-c", "--context", help="64, 1024 and 2048.")] = None,
    new_tokens: Annotated[int, typer.Option("-n", "--new-tokens")] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, help="In each round.")] = 2,
    threads: Annotated[int | None, typer.Option("-t", "--threads")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown")] = None,
) -> None:
    shape = Shape(layers=layers)
    job = Job(threads or usable_cores(), prompt_tokens, tuple(context or (64, 1024, 2048)), new_tokens, repetitions)
    names = choose(engine, llama_bench_path)
    runners = {name: make_runner(name, folder, shape, job, llama_bench_path, gguf_python) for name in names}
    found: Rounds = {name: [] for name in names}
    bandwidth: list[float] = []
    for number in range(rounds):
        bandwidth += read_bandwidth(job.threads)
        for name in names if number % 2 == 0 else reversed(names):
            found[name].append(runners[name]())
            print(f"round {number + 1}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    bandwidth += read_bandwidth(job.threads)
    result = report(found, shape, job, bandwidth)
    print(markdown(result))
    if json_file:
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    if markdown_file:
        markdown_file.write_text(markdown(result))


def choose(engines: list[str] | None, program: Path | None) -> list[str]:
    """The engines to run, ours first: others are compared with the first. Raises SystemExit."""
    known = [*OURS, *PEERS]
    for name in engines or ():
        if name not in known:
            raise SystemExit(f"--engine {name}: expected one of {', '.join(known)}")
    chosen = [name for name in known if name in (engines or known)]
    if any(name in PEERS for name in chosen):
        if program is None:
            raise SystemExit(f"llama.cpp needs --llama-bench PATH; {llama_bench.RECIPE}\nor choose --engine ours-...")
        llama_bench.check(program)
    return chosen


def make_runner(
    name: str, folder: Path, shape: Shape, job: Job, program: Path | None, gguf_python: str
) -> Callable[[], Figures]:
    """What measures an engine once. Its model is made now if it is not there."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if name in OURS:
        bundle = folder / f"bundle-{shape.name}"
        make(bundle, [sys.executable, "-m", "benchmarks.cpu_peers.random_bundle", str(bundle), shape.to_json()])
        return lambda: ours.run(bundle, OURS[name], job)
    assert program is not None
    model, path = folder / f"{PEERS[name]}-{shape.name}.gguf", program.resolve()
    command = [
        os.path.abspath(gguf_python),
        "-m",
        "benchmarks.cpu_peers.random_gguf",
        str(model),
        shape.to_json(),
        PEERS[name],
    ]
    make(model, command)
    return lambda: llama_bench.run(path, model, shape, job)


def make(target: Path, command: list[str]) -> None:
    """Run what makes it, by a process of its own, which lends no memory to those that are measured."""
    if target.exists():
        return
    print(f"making {target}", file=sys.stderr, flush=True)
    if subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(f"{target} could not be made")


def report(found: Rounds, shape: Shape, job: Job, bandwidth: list[float]) -> dict[str, Any]:
    """Every figure, and best and median of each, beside their ratios to the first engine's."""
    first = next(iter(found))
    measures = {name: figures_by_measure(rounds, job) for name, rounds in found.items()}
    summary = [
        {
            "measure": measure,
            "engine": name,
            "best": min(values[measure]),
            "median": statistics.median(values[measure]),
            "best_over_first": min(values[measure]) / min(measures[first][measure]),
            "median_over_first": statistics.median(values[measure]) / statistics.median(measures[first][measure]),
        }
        for measure in measures[first]
        for name, values in measures.items()
    ]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "cores_usable": usable_cores(),
        "shape": dataclasses.asdict(shape),
        "job": dataclasses.asdict(job),
        "first": first,
        "versions": {key: value for rounds in found.values() for key, value in rounds[0].versions.items()},
        "read_bandwidth": {"bytes_per_s": max(bandwidth), "samples": bandwidth},
        "fraction_of_read_bandwidth": {
            name: fractions(name, rounds, shape, job, max(bandwidth)) for name, rounds in found.items()
        },
        "busy": {name: max(figures.busy for figures in rounds) for name, rounds in found.items()},
        "summary": summary,
        "rounds": {name: [dataclasses.asdict(figures) for figures in rounds] for name, rounds in found.items()},
    }


def figures_by_measure(rounds: list[Figures], job: Job) -> dict[str, list[float]]:
    """All samples of one engine, by what they are of; of each, less is better."""
    prefill = [sample for figures in rounds for sample in figures.prefill_ms]
    found = {f"prefill of {job.prompt_tokens}, ms": prefill}
    for context in job.contexts:
        samples = [sample for figures in rounds for sample in figures.decode_ms[str(context)]]
        found[f"decode behind {context}, ms a token"] = samples
    found[f"first token of a fresh process, {COLD_POSITIONS} positions, ms"] = [f.first_token_ms for f in rounds]
    found["most memory, MB"] = [figures.peak_bytes / 1e6 for figures in rounds]
    found["most memory until the first token, MB"] = [figures.cold_peak_bytes / 1e6 for figures in rounds]
    return found


def fractions(name: str, rounds: list[Figures], shape: Shape, job: Job, bandwidth: float) -> dict[str, float]:
    """Of the bandwidth, what the fastest decode reads of weights and kv_cache, by context."""
    size = {"float32": 4, "int8": 1}[OURS[name]] if name in OURS else 2  # bytes of a number in the kv_cache
    position = 2 * shape.layers * shape.kv_heads * shape.head_dim * size
    found = {}
    for context in job.contexts:
        milliseconds = min(sample for figures in rounds for sample in figures.decode_ms[str(context)])
        read = rounds[0].weight_bytes + position * (context + (job.new_tokens + 1) / 2)
        found[str(context)] = read / milliseconds * 1e3 / bandwidth
    return found


def markdown(result: dict[str, Any]) -> str:
    """The table: of every measure the best of each engine, and how many times the first engine's it is."""
    names, shape, job = list(result["rounds"]), result["shape"], result["job"]
    cells: dict[str, dict[str, str]] = {}
    for row in result["summary"]:
        ratios = f"{row['best_over_first']:.2f} / {row['median_over_first']:.2f}"
        cells.setdefault(row["measure"], {})[row["engine"]] = f"{row['best']:.4g} ({ratios})"
    for context in job["contexts"]:
        values = {n: f"{result['fraction_of_read_bandwidth'][n][str(context)]:.0%}" for n in names}
        cells[f"decode behind {context}, of the read bandwidth"] = values
    cells["busy, at most"] = {name: f"{result['busy'][name]:.0%}" for name in names}
    lines = [
        f"{result['date']}, {result['machine']['cpu']}, {job['threads']} threads, "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + f"; random weights, {shape['layers']} blocks of {shape['hidden_size']} and {shape['intermediate_size']}; "
        + f"memory is read at {result['read_bandwidth']['bytes_per_s'] / 1e9:.1f} GB/s.",
        "",
        f"Best of all rounds (in brackets: the best, and the median, over those of {result['first']}).",
        "",
        f"| | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
    ]
    lines += [f"| {measure} | {' | '.join(row[name] for name in names)} |" for measure, row in cells.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
