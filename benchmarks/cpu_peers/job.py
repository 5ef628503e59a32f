"""What every engine is asked to do, and the figures that it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field

COLD_POSITIONS = 16  # of the prompt of a fresh process: its start is what is measured


@dataclass(frozen=True)
class Job:
    """Prefill of `prompt_tokens` into an empty kv_cache, `new_tokens` of decode behind each of `contexts`."""

    threads: int
    prompt_tokens: int
    contexts: tuple[int, ...]
    new_tokens: int
    repetitions: int


@dataclass
class Figures:
    """One round of one engine. Times in milliseconds; of decode, each is the mean of `new_tokens` tokens."""

    prefill_ms: list[float]
    decode_ms: dict[str, list[float]]  # by context
    first_token_ms: float
    peak_bytes: int
    cold_peak_bytes: int
    busy: float  # share of the cores that went to other programs
    versions: dict[str, str] = field(default_factory=dict)
    weight_bytes: int = 0  # that a token reads
