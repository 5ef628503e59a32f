"""A conversation sees all that was said and shown before, and reads it only once."""

from __future__ import annotations

from pathlib import Path

import pytest

from vila_edge.errors import ImageError, PromptError
from vila_edge.pipeline import Pipeline
from vila_edge.prompt import Turn
from vila_edge.sampler import Sampling
from vila_edge.session import Session

SHORT = Sampling(temperature=1.5, seed=3, max_new_tokens=6)


def test_the_second_answer_is_that_of_the_whole_conversation(pipeline: Pipeline, pictures: list[Path]) -> None:
    session = Session(pipeline, SHORT)
    first = session.ask("What is <image>?", pictures[:1]).finish()
    second = session.ask("And <image>?", pictures[1:2]).finish()
    turns = [Turn("user", "What is <image>?"), Turn("assistant", first.text), Turn("user", "And <image>?")]
    whole = pipeline.stream(turns, pictures[:2], SHORT).finish()
    assert second.token_ids == whole.token_ids
    assert second.timings.prompt_tokens == whole.timings.prompt_tokens
    assert second.timings.cached_tokens >= first.timings.prompt_tokens
    assert session.history == [*turns, Turn("assistant", second.text)]
    assert [image.source for image in session.media] == [str(path) for path in pictures[:2]]


def test_an_error_leaves_the_conversation_as_it_was(pipeline: Pipeline, pictures: list[Path]) -> None:
    session = Session(pipeline, SHORT)
    session.ask("Hi").finish()
    before = session.history
    with pytest.raises(ImageError):
        session.ask("What?", ["nowhere.png"])
    with pytest.raises(PromptError):
        session.ask("<image> <image>", pictures[:1])
    assert session.history == before
    assert session.ask("Go on").finish().finish_reason is not None


def test_a_stopped_answer_stays_as_far_as_it_came(pipeline: Pipeline) -> None:
    session = Session(pipeline, Sampling(temperature=1.5, seed=3, max_new_tokens=40))
    reply = session.ask("Hi")
    for _ in reply:
        reply.cancel()
    assert reply.finish_reason == "cancelled"
    assert session.history[-1] == Turn("assistant", reply.text)
    assert session.ask("Go on").finish().finish_reason is not None


def test_a_cleared_session_is_a_new_one(pipeline: Pipeline, pictures: list[Path]) -> None:
    session = Session(pipeline, SHORT)
    first = session.ask("What is <image>?", pictures[:1]).finish()
    session.clear()
    assert (session.history, session.media, session.positions_used) == ([], [], 0)
    assert session.ask("What is <image>?", pictures[:1]).finish().token_ids == first.token_ids
