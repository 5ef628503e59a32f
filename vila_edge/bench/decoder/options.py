"""What is run, and whether it fits the models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from vila_edge.bench.decoder.shapes import DecoderModel
from vila_edge.bench.kernels.bandwidth import LEAST
from vila_edge.bench.kernels.clock import LEAST_US
from vila_edge.engine.cuda.decode_loop import AHEAD
from vila_edge.errors import UsageError
from vila_edge.kernels.attention import KvCache
from vila_edge.kernels.w4 import MAX_BATCH

CONTEXTS = (256, 1024, 2048)
BATCHES = (1, 8)
KV_CACHES: tuple[KvCache, ...] = get_args(KvCache)
PROMPT_TOKENS = 1024
SHORTEST = 2  # positions of a prefill: one alone is a step


@dataclass(frozen=True)
class Options:
    """Decode is `new_tokens` steps behind each of `contexts`, for each of `batches`; all is measured `repeat` times.

    `warm` steps go before those that are timed: then the host is ahead, and the GPU never waits.
    The last three are of the projector and the memory, which are measured as in `bench kernels`.
    """

    contexts: Sequence[int] = CONTEXTS
    batches: Sequence[int] = BATCHES
    kv_caches: Sequence[KvCache] = KV_CACHES
    prompt_tokens: int = PROMPT_TOKENS
    warm: int = 8
    new_tokens: int = 64
    repeat: int = 5
    kernels_repeat: int = 20
    least_us: float = LEAST_US
    bandwidth_bytes: int = LEAST

    @property
    def room(self) -> int:
        """Positions that a kv_cache has behind a context: for all steps that are taken, and those launched ahead."""
        return self.warm + self.new_tokens + AHEAD + 1

    @property
    def longest(self) -> int:
        """Positions of the longest kv_cache."""
        return max(*self.contexts, self.prompt_tokens) + self.room


def check(options: Options, models: Sequence[DecoderModel]) -> None:
    """Raises UsageError for lengths that a model does not have, or batches that no step takes."""
    for model in models:
        most = model.llm.context_length - options.room
        if not SHORTEST <= options.prompt_tokens <= most:
            raise UsageError(
                f"a prompt of {options.prompt_tokens}: {model.name} has {SHORTEST} to {most:,} positions for it"
            )
        for context in options.contexts:
            if not SHORTEST <= context <= most:
                wanted = f"with {options.room} positions behind it, {model.name} has {SHORTEST} to {most:,}"
                raise UsageError(f"--context {context}: {wanted}")
    for batch in options.batches:
        if not 1 <= batch <= MAX_BATCH:
            raise UsageError(f"--batch {batch}: expected 1 to {MAX_BATCH}")
