"""The stages of an answer, timed one by one on the pipeline that answers prompts. Times are milliseconds."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge.bench.workload import Workload, noise_images, random_ids
from vila_edge.engine.protocol import Engine, Generating
from vila_edge.pipeline import Pipeline
from vila_edge.sampler import Sampling
from vila_edge.timing import Timings
from vila_edge.visual import look, slot_embeds

FloatArray = NDArray[np.float32]
IMAGE_STAGES = {"preprocess": "preprocess_ms", "encode": "vision_ms", "project": "projector_ms"}


@dataclass
class Samples:
    """Every sample of each stage. `decode` has one for each token, by the positions that it began behind."""

    preprocess: list[float] = field(default_factory=list)  # of all images together, as the next two
    encode: list[float] = field(default_factory=list)
    project: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    decode: dict[int, list[float]] = field(default_factory=dict)


def measure(pipeline: Pipeline, work: Workload) -> Samples:
    """Every stage `work.warmup` times for nothing, then `work.repeat` times for the record."""
    samples = Samples()
    rounds = work.warmup + work.repeat
    for round_ in range(rounds if work.images else 0):
        timings, _ = see(pipeline, work.images)
        if round_ >= work.warmup:
            for stage, attribute in IMAGE_STAGES.items():
                getattr(samples, stage).append(getattr(timings, attribute))
    cache = pipeline.engine.new_cache(work.capacity)
    ids = random_ids(pipeline.config, work.capacity)
    for round_ in range(rounds):
        cache.truncate(0)
        start = time.perf_counter()
        prefill(pipeline.engine, pipeline.engine.embed_tokens(ids[: work.prompt_tokens]), cache)
        if round_ >= work.warmup:
            samples.prefill.append((time.perf_counter() - start) * 1e3)
    for context in work.contexts:
        cache.truncate(0)
        prefill(pipeline.engine, pipeline.engine.embed_tokens(ids[:context]), cache)
        times = [
            _decode(pipeline.engine, cache, context, ids[context : context + work.new_tokens]) for _ in range(rounds)
        ]
        samples.decode[context] = [sample for found in times[work.warmup :] for sample in found]
    return samples


def see(pipeline: Pipeline, images: int) -> tuple[Timings, list[FloatArray]]:
    """Images of noise through preprocessing, tower and projector: their times, and what stands for them [S, D] each."""
    timings, embeds = Timings(), []
    image_end = pipeline.engine.embed_tokens(pipeline.tokenizer.encode(pipeline.config.profile.image_end))
    for visual in pipeline.plan(noise_images(images)):
        looked = look(visual, pipeline.engine, pipeline.config, timings)
        embeds += slot_embeds(visual, looked.image_embeds, pipeline.config, image_end)
    return timings, embeds


def prefill(engine: Engine, inputs_embeds: FloatArray, cache: Any) -> FloatArray:
    """Logits [V] of the last position, in the chunks that the pipeline takes."""
    for start in range(0, len(inputs_embeds), engine.prefill_chunk):
        logits = engine.forward(inputs_embeds[start : start + engine.prefill_chunk], cache)
    return logits[0]


def _decode(engine: Engine, cache: Any, context: int, ids: Any) -> list[float]:
    """Each token's time: looked up, and run behind what is there, as the pipeline does between two samples.

    An engine that samples by itself chooses its own tokens behind the first, as many.
    """
    cache.truncate(context)
    times = []
    if isinstance(engine, Generating):
        tokens = engine.generate(ids[0], cache, Sampling(), seed=0)
        for _ in ids:
            start = time.perf_counter()
            next(tokens)
            times.append((time.perf_counter() - start) * 1e3)
        return times
    for token in ids:
        start = time.perf_counter()
        engine.forward(engine.embed_tokens([token]), cache)
        times.append((time.perf_counter() - start) * 1e3)
    return times
