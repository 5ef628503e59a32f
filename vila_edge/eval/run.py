"""Prompts with known answers, put to a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vila_edge.media.image import ImageSource
from vila_edge.pipeline import Pipeline
from vila_edge.sampler import Sampling

GREEDY = Sampling(temperature=0.0, max_new_tokens=16)


@dataclass(frozen=True)
class Prompt:
    """A question with its images, and the one answer that counts."""

    question: str
    images: tuple[ImageSource, ...]
    answer: str


def accuracy(pipeline: Pipeline, prompts: Sequence[Prompt], on_prompt: Callable[[], None] = lambda: None) -> float:
    """Share of prompts, 0..1, whose greedy answer is exactly the expected one, its end included."""
    right = 0
    for prompt in prompts:
        reply = pipeline.generate(prompt.question, prompt.images, GREEDY)
        right += reply.text == prompt.answer and reply.finish_reason == "stop"
        on_prompt()
    return right / len(prompts)
