"""A stage as data: what it trains, at what rate, for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

StageName = Literal["text", "align", "pretrain", "sft"]


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    `trains` are prefixes of parameter names; all others are frozen. `muon` gives the matrices of hidden layers
    to Muon, which trains a small model from scratch in far fewer steps, and the rest to AdamW.
    """

    name: StageName
    trains: tuple[str, ...]
    learning_rate: float
    steps: int
    tokens_per_batch: int
    optimizer: Literal["adamw", "muon"] = "adamw"
    schedule: Literal["linear", "cosine"] = "cosine"
    warmup_share: float = 0.03
    max_grad_norm: float = 1.0


PROJECTOR = ("mm_projector",)  # stage 0
PROJECTOR_AND_LLM = ("mm_projector", "llm")  # stages 1 and 2: the LLM is updated, the tower is not
