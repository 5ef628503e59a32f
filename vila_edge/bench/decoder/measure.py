"""What is timed of one decoder: prefill, the first step behind it, and steps in a row."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_edge.bench.decoder.options import Options
from vila_edge.bench.percentiles import times
from vila_edge.engine.cuda.decode_loop import AHEAD, DecodeLoop, Running
from vila_edge.engine.cuda.decoder import Decoder, attention_shape
from vila_edge.engine.cuda.device import Device, Stream
from vila_edge.engine.cuda.kv_cache import CudaCache
from vila_edge.errors import BackendError
from vila_edge.kernels.attention import KvCache
from vila_edge.sampler import Sampling

GREEDY = Sampling()

Now = Callable[[], float]  # seconds
Row = dict[str, Any]


class Measured:
    """A decoder under the clock. `now` is the host's: what a user waits for."""

    def __init__(
        self, decoder: Decoder, device: Device, stream: Stream, kv_cache: KvCache, options: Options, now: Now
    ) -> None:
        self._decoder, self._device, self._stream, self._options, self._now = decoder, device, stream, options, now
        self._shape = attention_shape(decoder.llm, kv_cache)

    def prefill(self, tokens: int) -> Row:
        """Milliseconds of a prompt of so many tokens, and of the first step behind it.

        From embeddings on the host to logits there, and from those to the token that the GPU chooses.
        """
        decoder, now = self._decoder, self._now
        embeds, cache = self._embeds(tokens), decoder.new_cache(tokens + self._options.room)
        prefills, steps = list[float](), list[float]()
        for round_ in range(1 + self._options.repeat):  # the first is for nothing: its graph is captured
            cache.truncate(0)
            self._stream.synchronize()  # of steps that the last round had launched ahead
            start = now()
            logits = decoder.forward(embeds, cache, (-1,))
            filled = now()
            next(self._steps([cache], int(logits[0].argmax())))
            if round_:
                prefills.append((filled - start) * 1e3)
                steps.append((now() - filled) * 1e3)
        found = times(prefills)
        return {"tokens": tokens, **found, "tokens_per_s": tokens / found["p50_ms"] * 1e3, "first_step": times(steps)}

    def decode(self, batch: int, context: int) -> Row:
        """Milliseconds of a step, by the host's clock and by the GPU's; `absent` says why if caches have no room."""
        row, new = {"batch": batch, "context": context}, self._options.new_tokens
        capacity = context + self._options.room
        try:
            caches = [self._decoder.new_cache(capacity) for _ in range(batch)]
        except BackendError as error:
            return row | {"absent": error.message}
        self._fill(caches, context)
        rounds = [(self._wall(caches, context), self._gpu(caches, context)) for _ in range(1 + self._options.repeat)]
        walls, gpus = zip(*rounds[1:], strict=True)
        positions = context + self._options.warm + (new + 1) / 2  # that a step attends over, in the mean of those timed
        found = times(walls)
        layers = self._decoder.llm.num_hidden_layers
        return {
            **row,
            "absent": None,
            **found,
            "gpu": times(gpus),
            "tokens_per_s": batch / found["p50_ms"] * 1e3,
            "launches_per_token": self._decoder.launches_per_token,
            "kv_cache_bytes": round(batch * layers * self._shape.layer_bytes(1) * positions),
        }

    def _wall(self, caches: list[CudaCache], context: int) -> float:
        """As an answer is decoded: every token is read by the host."""
        steps, new = self._begin(caches, context), self._options.new_tokens
        start = self._now()
        for _ in range(new):
            next(steps)
        return (self._now() - start) * 1e3 / new

    def _gpu(self, caches: list[CudaCache], context: int) -> float:
        """The same graphs back to back, without the host."""
        self._begin(caches, context)
        new = self._options.new_tokens
        graph = self._decoder.graph(len(caches), context + self._options.warm + AHEAD + new, "greedy")
        with contextlib.ExitStack() as events:
            first, last = self._device.event(), self._device.event()
            events.callback(first.free)
            events.callback(last.free)
            first.record(self._stream)
            for _ in range(new):
                graph.launch(self._stream)
            last.record(self._stream)
            self._stream.synchronize()
            return last.since_us(first) / 1e3 / new

    def _begin(self, caches: list[CudaCache], context: int) -> Iterator[list[int | None]]:
        """Steps behind the context, so many taken that the host is ahead."""
        for cache in caches:
            cache.truncate(context)
        steps = self._steps(caches, 0)
        for _ in range(self._options.warm):
            next(steps)
        return steps

    def _steps(self, caches: Sequence[CudaCache], token: int) -> Iterator[list[int | None]]:
        sequences = [Running(cache, token, GREEDY, seed=0) for cache in caches]
        return iter(DecodeLoop(self._decoder, self._device, self._stream, sequences))

    def _fill(self, caches: list[CudaCache], context: int) -> None:
        """The same keys and values in each: computed once, and copied."""
        first, *others = caches
        self._decoder.forward(self._embeds(context), first, ())
        nbytes = self._shape.layer_bytes(first.capacity)
        for cache in others:
            for target, source in zip(cache.layers_at, first.layers_at, strict=True):
                self._device.copy_on_device_async(target, source, nbytes, self._stream)
            cache.length = first.length
        self._stream.synchronize()

    def _embeds(self, tokens: int) -> NDArray[np.float32]:
        return np.random.default_rng(0).standard_normal((tokens, self._decoder.llm.hidden_size), np.float32)
