"""What a reply took: measured on the code that ran, and returned with the result."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Timings:
    """Milliseconds of each stage, and counts. TTFT is the sum of the stages before the first token."""

    load_ms: float = 0.0
    preprocess_ms: float = 0.0
    vision_ms: float = 0.0
    projector_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of prompt_tokens, those that were in the kv_cache already
    image_tokens: int = 0
    new_tokens: int = 0
    decode_steps: int = 0  # calls that decode_ms counts: the first token comes from prefill, the last may be a stop

    @property
    def ttft_ms(self) -> float:
        """Time to the first token."""
        return self.load_ms + self.preprocess_ms + self.vision_ms + self.projector_ms + self.prefill_ms

    @property
    def tokens_per_s(self) -> float:
        """Rate of decode, 0 if one token was enough."""
        return self.decode_steps / self.decode_ms * 1e3 if self.decode_steps else 0.0

    def as_dict(self) -> dict[str, float | int]:
        values = dataclasses.asdict(self) | {"ttft_ms": self.ttft_ms, "tokens_per_s": self.tokens_per_s}
        return {key: round(value, 3) for key, value in values.items()}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time that a block takes to `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + (time.perf_counter() - start) * 1e3)
