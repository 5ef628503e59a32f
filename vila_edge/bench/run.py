"""Measure a bundle on this machine, in one run. Nothing here is a claim: every number is of this run alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vila_edge.backends import CUDA
from vila_edge.bench.agreement import compare, wider_answer
from vila_edge.bench.bandwidth import read_bandwidth
from vila_edge.bench.cold import cold_start
from vila_edge.bench.gpu import gpu_read_bandwidth
from vila_edge.bench.machine import machine, process_memory, versions
from vila_edge.bench.percentiles import times
from vila_edge.bench.stages import IMAGE_STAGES, Samples, measure
from vila_edge.bench.traffic import kv_cache_bytes, parts_of, weight_bytes
from vila_edge.bench.workload import Options, Workload, plan_workload
from vila_edge.bundle import Bundle
from vila_edge.caches import PREFILL_CHUNK
from vila_edge.cores import usable_cores
from vila_edge.engine.plan import Backend, plan, tiles_at_once
from vila_edge.pipeline import Pipeline, load
from vila_edge.visual import TOWER_BATCH

Progress = Callable[[str], None]


def bench(bundle: Path, options: Options | None = None, progress: Progress = lambda step: None) -> dict[str, Any]:
    """Everything about a bundle on this machine. Times in milliseconds, sizes in bytes; every sample is there.

    `progress` is told what is being done. Raises BundleError, UsageError for lengths that do not fit the model, and
    BackendError if a process cannot run.
    """
    options = options or Options()
    opened = Bundle.open(bundle)
    work = plan_workload(opened, options)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    progress("a fresh process")
    cold = cold_start(bundle, options, work)  # before the model is loaded here: there may be room for one alone
    wide = None
    if options.kv_cache != "float32":
        progress("an answer with a wider kv_cache")
        wide = wider_answer(bundle, options)
    on_gpu, bandwidth = options.backend == CUDA, list[float]()
    if on_gpu:
        progress("reading memory of the GPU")
        bandwidth = gpu_read_bandwidth()
    progress("loading")
    pipeline = load(bundle, options.backend, options.threads, kv_cache=options.kv_cache, projector=options.projector)
    threads = _threads(pipeline, options)
    if not on_gpu:
        progress("reading memory")
        bandwidth = read_bandwidth(threads)
    progress("stages")
    samples = measure(pipeline, work)
    memory = process_memory()
    if not on_gpu:
        progress("reading memory")
        bandwidth += read_bandwidth(threads)
    agreement = None
    if wide:
        progress("the same answer with a kv_cache in 8 bits")
        agreement = compare(wide, options, pipeline)
    best = max(bandwidth)
    return {
        "date": date,
        "machine": machine(),
        "versions": versions(),
        "bundle": {"name": pipeline.name, "sha256": pipeline.bundle_digest},
        "backend": pipeline.engine.backend,
        "threads": threads,
        "options": dataclasses.asdict(options),
        "workload": dataclasses.asdict(work),
        "stages": _stages(samples, work),
        "decode": _decode(opened, _kv_type(options), samples, work, best if options.on_cpu or on_gpu else None),
        "cold_start": cold,
        "agreement": agreement,
        "memory": _memory(opened, options, work, memory),
        "read_bandwidth": {
            "of": "GPU" if on_gpu else "CPU",
            "bytes_per_s": best,
            "threads": None if on_gpu else threads,
            "samples": bandwidth,
        },
    }


def _threads(pipeline: Pipeline, options: Options) -> int:
    """Those of the engine, or as many as this process may use."""
    return options.threads or int(getattr(pipeline.engine, "threads", 0)) or usable_cores()


def _stages(samples: Samples, work: Workload) -> dict[str, Any]:
    images = {stage: times(getattr(samples, stage)) for stage in IMAGE_STAGES if work.images}
    prefill = times(samples.prefill)
    rate = {"tokens": work.prompt_tokens, "tokens_per_s": work.prompt_tokens / prefill["p50_ms"] * 1e3}
    return images | {"prefill": prefill | rate}


def _decode(bundle: Bundle, kind: str, samples: Samples, work: Workload, best: float | None) -> list[dict[str, Any]]:
    """A row for each context. `kv_cache_bytes` are those of the positions that a token reads, in the mean.

    `best`: bytes a second that the engine's device reads from memory at most; None if that was not measured.
    """
    weights, rows = weight_bytes(bundle.config, parts_of(bundle)), []
    for context, found in samples.decode.items():
        token = times(found)
        positions = context + (work.new_tokens + 1) / 2
        kv_cache = kv_cache_bytes(bundle.config, positions, kind)
        read = (weights + kv_cache) / token["p50_ms"] * 1e3
        rows.append(
            token
            | {
                "context": context,
                "tokens_per_s": 1e3 / token["p50_ms"],
                "weight_bytes": weights,
                "kv_cache_bytes": kv_cache,
                "bytes_per_token": weights + kv_cache,
                "bytes_per_s": read,
                "fraction_of_read_bandwidth": read / best if best else None,
            }
        )
    return rows


def _kv_type(options: Options) -> str:
    """What the engine keeps keys and values in."""
    return options.kv_cache if options.on_cpu or options.kv_cache == "int8" else "float16"


def _memory(bundle: Bundle, options: Options, work: Workload, held: dict[str, int] | None) -> dict[str, Any]:
    """What this process held at the end of the stages, beside what was planned for it."""
    cfg, planned = bundle.config, None
    tiles = tiles_at_once(cfg, TOWER_BATCH) if work.images else 0
    if options.on_cpu:
        backend: Backend = "onnxruntime, int8" if options.kv_cache == "int8" else "onnxruntime"
        backend = "numpy" if options.backend == "numpy" else backend
        planned = plan(cfg, parts_of(bundle), backend, work.capacity, PREFILL_CHUNK, tiles).total
    return {
        **(held or {"peak": None, "resident": None}),
        "kv_cache": kv_cache_bytes(cfg, work.capacity, _kv_type(options)),
        "kv_cache_positions": work.capacity,
        "planned": planned,
    }
