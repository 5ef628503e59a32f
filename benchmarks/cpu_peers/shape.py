"""The decoder that every engine runs. Nothing but the standard library: a peer's interpreter reads this too."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """By default that of VILA1.5-3B."""

    layers: int = 32
    hidden_size: int = 2560
    intermediate_size: int = 6912
    heads: int = 20
    kv_heads: int = 20
    head_dim: int = 128
    vocab_size: int = 32000
    context: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Shape:
        return cls(**json.loads(text))

    @property
    def name(self) -> str:
        """Of files that have this shape."""
        return f"{self.layers}x{self.hidden_size}x{self.intermediate_size}"
