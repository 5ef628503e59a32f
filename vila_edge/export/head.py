"""Logits of a checkpoint's last hidden states."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from vila_edge import architecture
from vila_edge.config import LlmConfig
from vila_edge.export.encoder import WatchingOps
from vila_edge.export.source import Source
from vila_edge.export.workers import Workers

FloatArray = NDArray[np.float32]


class Head:
    """The last norm and lm_head of a checkpoint, read some rows at a time."""

    def __init__(self, source: Source, cfg: LlmConfig, pool: Workers) -> None:
        self._source, self._cfg, self._pool = source, cfg, pool
        self.largest = 0.0  # magnitude that was seen, behind the norm or among logits
        linear = architecture.EMBED_TOKENS if cfg.tie_word_embeddings else "llm.lm_head"
        self.weight = f"{linear}.weight"

    def logits(self, states: FloatArray) -> FloatArray:
        """States of the last block [S, D] to logits [S, V]."""
        ops = WatchingOps({f"{architecture.LLM}.norm.weight": self._source[f"{architecture.LLM}.norm.weight"]})
        x = ops.rms_norm(torch.from_numpy(np.array(states)), f"{architecture.LLM}.norm", self._cfg.rms_norm_eps)
        pieces = self._source.pieces(self.weight)
        columns = self._pool.map(lambda rows: (x @ torch.from_numpy(rows).T).numpy(), pieces)
        found = np.concatenate(list(columns), -1)
        self.largest = float(np.max([self.largest, ops.largest, found.max(), -found.min()]))  # not a number stays
        return found
