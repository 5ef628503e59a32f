"""Accuracy counts an answer that is exactly the expected one and has ended by itself."""

from __future__ import annotations

from typing import Any

import pytest

from vila_edge.eval.run import GREEDY, Prompt, accuracy
from vila_edge.pipeline import FinishReason, Pipeline, Reply


@pytest.mark.parametrize(
    ("text", "finish_reason", "counts"),
    [
        ("seven", "stop", True),
        ("seven", "length", False),  # it would have gone on
        ("Seven", "stop", False),
        ("seven teen", "stop", False),
        ("", "stop", False),
    ],
)
def test_what_counts_as_right(
    text: str, finish_reason: FinishReason, counts: bool, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def generate(*arguments: Any) -> Reply:
        asked.append(arguments)
        return Reply(seed=0, text=text, finish_reason=finish_reason)

    monkeypatch.setattr(pipeline, "generate", generate)
    done: list[None] = []
    prompts = [Prompt("What digit is this?", (), "seven"), Prompt("And now?", (), "nothing like it")]
    assert accuracy(pipeline, prompts, lambda: done.append(None)) == (0.5 if counts else 0)
    assert asked == [(prompt.question, prompt.images, GREEDY) for prompt in prompts]
    assert len(done) == 2
    assert GREEDY.temperature == 0
