"""From documents and conversations to input_ids and labels, tokenised exactly as at run time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vila_edge.config import VilaConfig
from vila_edge.errors import InputError
from vila_edge.prompt import Chunk, TextChunk, Turn, assemble, check_slots, document
from vila_edge.tokenizer import Tokenizer
from vila_edge.train.model import IGNORE_INDEX, IMAGE_TOKEN_INDEX


@dataclass(frozen=True)
class TrainingSample:
    """One sequence. `images` are references that the collator resolves, in order of appearance."""

    input_ids: list[int]
    labels: list[int]
    images: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)


class SampleMaker:
    """Makes the samples of one model."""

    def __init__(self, tokenizer: Tokenizer, cfg: VilaConfig) -> None:
        self.tokenizer, self.cfg = tokenizer, cfg
        self.stop = tokenizer.token_id(cfg.profile.stop_tokens[0])

    def pretraining(self, text: str, images: Sequence[int] = ()) -> TrainingSample:
        """A document: loss on all of its text and on the end token (spec 4.2)."""
        chunks = document(text, self.tokenizer, self.cfg.profile)
        check_slots(chunks, len(images))
        ids = [*self._expand(chunks), self.stop]
        labels = [IGNORE_INDEX if token == IMAGE_TOKEN_INDEX else token for token in ids]
        return TrainingSample(ids, labels, tuple(images))

    def conversation(self, turns: Sequence[Turn], images: Sequence[int] = ()) -> TrainingSample:
        """A conversation that ends with an answer: loss on the answers and their stop tokens alone."""
        chunks = assemble(turns, self.tokenizer, self.cfg.profile)
        check_slots(chunks, len(images))
        ids = self._expand(chunks)
        labels = [IGNORE_INDEX] * len(ids)
        for end, turn in enumerate(turns):
            if turn.role == "assistant":
                before = self._expand(assemble(turns[:end], self.tokenizer, self.cfg.profile))
                after = self._expand(assemble(turns[: end + 1], self.tokenizer, self.cfg.profile))
                if ids[: len(after)] != after or after[: len(before)] != before:
                    raise InputError(f"the tokenizer joins the answer {turn.text!r} with what stands before it")
                labels[len(before) : len(after)] = after[len(before) :]
        return TrainingSample(ids, labels, tuple(images))

    def _expand(self, chunks: Sequence[Chunk]) -> list[int]:
        """Chunks as ids, an image as so many IMAGE_TOKEN_INDEX as it takes positions."""
        image = [IMAGE_TOKEN_INDEX] * self.cfg.tokens_per_image
        return [token for chunk in chunks for token in (chunk.ids if isinstance(chunk, TextChunk) else image)]
