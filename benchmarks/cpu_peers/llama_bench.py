"""llama.cpp on a GGUF file of the same dimensions, by its own llama-bench.

Its defaults stand: kv_cache in 16 bits, flash attention where it decides so, weights packed anew for the CPU, files
mapped. It gets large pages of memory as ours does. It chooses no token and knows no text: what it times is the same as what is timed of ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cpu_peers.job import COLD_POSITIONS, Figures, Job
from benchmarks.cpu_peers.process import Watched, watch
from benchmarks.cpu_peers.shape import Shape
from vila_edge import huge_pages

RECIPE = """build it from the source that comes with llama-cpp-python on PyPI:
  pip download --no-deps --no-binary :all: llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz
  pip install cmake ninja
  cmake -S llama_cpp_python-*/vendor/llama.cpp -B llama -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \\
        -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
  cmake --build llama --target llama-bench      # then: --llama-bench llama/bin/llama-bench"""


def check(program: Path) -> None:
    """Raises SystemExit that says how to get it."""
    if not program.is_file():
        raise SystemExit(f"--llama-bench {program}: no such file; {RECIPE}")


def run(program: Path, model: Path, shape: Shape, job: Job) -> Figures:
    """One round: prefill, decode behind each context, and a process that starts cold."""
    repeat = ("-r", str(job.repetitions))
    contexts = ",".join(map(str, job.contexts))
    prefill = _bench(program, model, job, "-p", str(job.prompt_tokens), "-n", "0", *repeat)
    decode = _bench(program, model, job, "-p", "0", "-n", str(job.new_tokens), "-d", contexts, *repeat)
    start = _bench(program, model, job, "-p", str(COLD_POSITIONS), "-n", "0", "-r", "1", "--no-warmup")
    first, rows = _rows(prefill)[0], _rows(decode)
    table = 2 * shape.vocab_size * shape.hidden_size  # token_embd is F16; a token reads one row
    return Figures(
        [nanoseconds / 1e6 for nanoseconds in first["samples_ns"]],
        {str(row["n_depth"]): [sample / 1e6 / job.new_tokens for sample in row["samples_ns"]] for row in rows},
        start.first_line_s * 1e3,
        max(prefill.peak_bytes, decode.peak_bytes),
        start.peak_bytes,
        max(prefill.busy, decode.busy),
        {"llama.cpp": f"{first['build_commit']} ({first['build_number']})"},
        first["model_size"] - table + table // shape.vocab_size,
    )


def _bench(program: Path, model: Path, job: Job, *options: str) -> Watched:
    command: Sequence[str] = [str(program), "-m", str(model), "-t", str(job.threads), "-o", "jsonl", *options]
    env = {"LD_LIBRARY_PATH": str(program.resolve().parent), **huge_pages.environment(os.environ)}
    return watch(command, env)


def _rows(done: Watched) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.lines if line.startswith("{")]
