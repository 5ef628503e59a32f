"""Measure the cuda engine's decoder on a GPU, in one run: its speed, and that of the memory it is held against."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vila_edge.bench.decoder.measure import Measured, Now
from vila_edge.bench.decoder.options import Options, check
from vila_edge.bench.decoder.shapes import DecoderModel
from vila_edge.bench.decoder.weights import RandomWeights, step_bytes
from vila_edge.bench.kernels.cases import workloads
from vila_edge.bench.kernels.clock import Clock
from vila_edge.bench.kernels.frame import Progress, Row, framed
from vila_edge.bench.kernels.run import measure
from vila_edge.bench.kernels.shapes import Shapes
from vila_edge.engine.cuda.decoder import Decoder
from vila_edge.engine.cuda.device import Device
from vila_edge.engine.cuda.kernels import Find, Kernels
from vila_edge.errors import BackendError
from vila_edge.kernels import store
from vila_edge.kernels.attention import KvCache

FORMAT = 1


def bench_decoder(
    device: Device,
    models: Sequence[DecoderModel],
    options: Options | None = None,
    progress: Progress = lambda step: None,
    find: Find = store.find,
    now: Now = time.perf_counter,
) -> dict[str, Any]:
    """Each model with each kind of kv_cache. Times in milliseconds, sizes in bytes; every sample is there.

    A model that the GPU has no room for is there with `absent`, the reason. The vision tower is no part of this.
    Raises UsageError for lengths that a model does not have, BackendError.
    """
    options = options or Options()
    check(options, models)

    def work(kernels: Kernels, clock: Clock) -> list[Row]:
        rows = list[Row]()
        for model in models:
            progress(f"{model.name}, projector")
            projector = _projector(model, device, kernels, clock)
            for kind in options.kv_caches:
                progress(f"{model.name}, kv_cache in {kind}")
                found = {"model": model.name, "kv_cache": kind, "projector": projector}
                rows.append(found | _decoder(model, kind, device, kernels, options, now))
        return rows

    frame, rows = framed(
        device, find, progress, work, options.kernels_repeat, options.least_us, options.bandwidth_bytes
    )
    copy, read = frame["bandwidth"]["copy"], frame["bandwidth"]["read"]
    for row in rows:
        for step in row["decode"]:
            _hold_against(step, copy, read)
    return {
        "format": FORMAT,
        **frame,
        "options": asdict(options),
        "models": rows,
        "torch": None,  # what benchmarks/gpu_decoder.py adds
    }


def _projector(model: DecoderModel, device: Device, kernels: Kernels, clock: Clock) -> Row:
    """Of one image."""
    shapes = Shapes(models=(), projections=(model.projection,), images=(1,))
    (row,) = measure(next(workloads(shapes, device.multiprocessors)), device, kernels, clock)
    return {"name": row["name"], "tokens": row["tokens"], **{p: row[f"{p}_us"] / 1e3 for p in ("p50", "p95")}}


def _decoder(model: DecoderModel, kind: KvCache, device: Device, kernels: Kernels, options: Options, now: Now) -> Row:
    with contextlib.ExitStack() as resources, device.current():
        stream = device.stream()
        resources.callback(stream.free)
        free, _ = device.memory()
        lengths = sorted({options.prompt_tokens, model.projection.config.tokens_per_image})
        longest = max(options.longest, lengths[-1] + options.room)
        weights, start = RandomWeights(model.llm), now()
        try:
            decoder = Decoder(weights, device, stream, kernels, resources, longest, kind)
        except BackendError as error:
            with contextlib.suppress(BackendError):
                stream.synchronize()
            return {"absent": error.message, "prefill": [], "decode": []}
        resources.callback(stream.synchronize)  # steps that were launched ahead still use what is given back next
        loaded = {"absent": None, "load_s": now() - start, "memory_bytes": free - device.memory()[0]}
        measured = Measured(decoder, device, stream, kind, options, now)
        cases = itertools.product(sorted(set(options.batches)), sorted(set(options.contexts)))
        steps = [measured.decode(*case) | {"weight_bytes": step_bytes(weights, case[0])} for case in cases]
        return loaded | {"prefill": [measured.prefill(tokens) for tokens in lengths], "decode": steps}


def _hold_against(step: Row, copy: float, read: float) -> None:
    """Add what a step reads, as fractions of the memory's speed."""
    if step["absent"] is None:
        step["bytes_per_step"] = step["weight_bytes"] + step["kv_cache_bytes"]
        step["bytes_per_s"] = step["bytes_per_step"] / step["p50_ms"] * 1e3
        step["of_copy_bandwidth"], step["of_read_bandwidth"] = step["bytes_per_s"] / copy, step["bytes_per_s"] / read
