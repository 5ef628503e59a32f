"""vila-edge on the random bundle, timed by the same code as `vila-edge bench`.

    python -m benchmarks.cpu_peers.ours REQUEST      one JSON object of samples

A process loads the bundle as `vila_edge.load` does it, which checks the digest of every file first, and has large
pages of memory, as the command line has them.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path

from benchmarks.cpu_peers.job import COLD_POSITIONS, Figures, Job
from benchmarks.cpu_peers.process import watch
from vila_edge import huge_pages
from vila_edge.bench import cold
from vila_edge.bench.machine import versions
from vila_edge.bench.stages import measure
from vila_edge.bench.traffic import parts_of, weight_bytes
from vila_edge.bench.workload import Options, Workload
from vila_edge.bundle import Bundle
from vila_edge.pipeline import load


def run(bundle: Path, kv_cache: str, job: Job) -> Figures:
    """One round: a process that measures, and one that starts cold."""
    request = {
        "bundle": str(bundle),
        "threads": job.threads,
        "kv_cache": kv_cache,
        "work": {
            "prompt_tokens": job.prompt_tokens,
            "contexts": job.contexts,
            "new_tokens": job.new_tokens,
            "repeat": job.repetitions,
        },
    }
    env = huge_pages.environment(os.environ)
    done = watch([sys.executable, "-m", __name__, json.dumps(request)], env)
    options = Options("onnxruntime", job.threads, kv_cache=kv_cache)
    start = watch(cold.command(bundle, options, Workload(COLD_POSITIONS, (), 1, 1, 0, 0, 0)), env)
    found = json.loads(done.lines[-1])
    decode = {context: means(samples, job.new_tokens) for context, samples in found["decode"].items()}
    return Figures(
        found["prefill"],
        decode,
        start.first_line_s * 1e3,
        done.peak_bytes,
        start.peak_bytes,
        done.busy,
        found["versions"],
        found["weight_bytes"],
    )


def means(samples: list[float], size: int) -> list[float]:
    """Of each `size` samples."""
    return [statistics.fmean(samples[start : start + size]) for start in range(0, len(samples), size)]


def main() -> None:
    request = json.loads(sys.argv[1])
    pipeline = load(request["bundle"], "onnxruntime", request["threads"], kv_cache=request["kv_cache"])
    samples = measure(pipeline, Workload(**request["work"], warmup=1, images=0, image_tokens=0))
    opened = Bundle.open(request["bundle"])
    found = {
        "prefill": samples.prefill,
        "decode": samples.decode,
        "versions": versions(),
        "weight_bytes": weight_bytes(opened.config, parts_of(opened)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
