"""From a prompt with images to an answer: reproducible, bounded, and honest about what it did."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.tiny import TINY
from vila_edge.caches import ImageCache, Prefix
from vila_edge.errors import ContextError, ImageError, InputError, PromptError, UsageError
from vila_edge.pipeline import Pipeline, load
from vila_edge.prompt import Turn
from vila_edge.sampler import Sampling

HOT = Sampling(temperature=1.5, seed=11, max_new_tokens=30)


def test_the_same_seed_gives_the_same_tokens_twice_and_elsewhere(
    pipeline: Pipeline, tiny_bundle: Path, pictures: list[Path]
) -> None:
    first = pipeline.generate("What is <image>?", pictures[:1], HOT)
    assert first.token_ids == pipeline.generate("What is <image>?", pictures[:1], HOT).token_ids
    other = Sampling(temperature=1.5, seed=12, max_new_tokens=30)
    assert first.token_ids != pipeline.generate("What is <image>?", pictures[:1], other).token_ids
    program = (
        "import vila_edge, sys, json;"
        "p = vila_edge.load(sys.argv[1], threads=1);"
        "s = vila_edge.Sampling(temperature=1.5, seed=11, max_new_tokens=30);"
        "print(json.dumps(p.generate('What is <image>?', [sys.argv[2]], s).token_ids))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_bundle), str(pictures[0])], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == first.token_ids


def test_onnxruntime_and_the_numpy_oracle_answer_the_same(
    make_bundle: Callable[[str], Path], pictures: list[Path]
) -> None:
    fast, slow = (load(make_bundle("fp32"), backend, threads=1) for backend in ("onnxruntime", "numpy"))
    prompt = "Is <image> larger than <image>?"
    assert fast.generate(prompt, pictures[:2], HOT).token_ids == slow.generate(prompt, pictures[:2], HOT).token_ids


def test_the_image_matters_and_so_does_its_place(pipeline: Pipeline, pictures: list[Path]) -> None:
    """Random weights hardly look at an image, so the logits are compared, not the tokens."""

    def first_logits(prompt: str, images: list[Path]) -> NDArray[np.float32]:
        seen: list[NDArray[np.float32]] = []

        def watch(_: object, logits: NDArray[np.float32]) -> int:
            seen.append(logits)
            return 3

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vila_edge.pipeline.Sampler.__call__", watch)
            pipeline.generate(prompt, images, Sampling(max_new_tokens=1))
        return seen[0]

    a, b, _ = pictures
    answers = [
        first_logits("one <image> two <image> three", [a, b]),
        first_logits("one <image> two <image> three", [b, a]),
        first_logits("one <image> <image> two three", [a, b]),
    ]
    for i in range(3):
        for j in range(i):
            assert np.abs(answers[i] - answers[j]).max() > 1e-3


def test_an_answer_ends_at_its_limit_or_the_context(pipeline: Pipeline, tiny_bundle: Path) -> None:
    reply = pipeline.generate("Hi", sampling=Sampling(temperature=2, seed=0, max_new_tokens=5))
    assert (len(reply.token_ids), reply.finish_reason) == (5, "length")
    short = load(tiny_bundle, threads=1, context=20)
    short.stop_ids = frozenset()
    reply = short.generate("Hi", sampling=Sampling(temperature=2, seed=0))
    assert reply.timings.prompt_tokens + len(reply.token_ids) == 20
    assert reply.finish_reason == "length"


def test_a_stop_token_ends_the_answer_and_is_not_shown(pipeline: Pipeline) -> None:
    free = pipeline.generate("Hi", sampling=HOT)
    assert len(free.token_ids) > 4
    pipeline.stop_ids = frozenset({free.token_ids[3]})
    stopped = pipeline.generate("Hi", sampling=HOT)
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[3])]
    assert stopped.finish_reason == "stop"


def test_streamed_pieces_are_the_text(pipeline: Pipeline) -> None:
    reply = pipeline.stream([Turn("user", "Hi")], sampling=HOT)
    pieces = list(reply)
    assert "".join(pieces) == reply.text == pipeline.generate("Hi", sampling=HOT).text
    assert not reply.text.startswith(" ")


def test_a_cancelled_reply_stops_before_the_next_token(pipeline: Pipeline) -> None:
    reply = pipeline.stream([Turn("user", "Hi")], sampling=HOT)
    for _ in reply:
        reply.cancel()
    assert reply.finish_reason == "cancelled"
    assert len(reply.token_ids) <= 4  # a piece of text may take some tokens to become certain


def test_a_prompt_longer_than_the_context_is_an_error(pipeline: Pipeline, pictures: list[Path]) -> None:
    with pytest.raises(ContextError, match=r"the prompt takes \d+ positions \(27 of 3 images and \d+ of text\)"):
        pipeline.generate("<image> <image> <image>" + " seven" * 200, pictures)


def test_what_does_not_fit_together_is_an_error(pipeline: Pipeline, pictures: list[Path]) -> None:
    with pytest.raises(PromptError, match="2 <image> marks, but 1 image"):
        pipeline.generate("<image> <image>", pictures[:1])
    with pytest.raises(PromptError):
        pipeline.stream([Turn("user", "no marks")], pictures[:1])
    with pytest.raises(ImageError, match="no such file"):
        pipeline.generate("<image>", ["nowhere.png"])


def test_long_prompts_are_prefilled_in_chunks(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pipeline.generate("seven " * 40, sampling=HOT)
    monkeypatch.setattr(type(pipeline.engine), "prefill_chunk", 7)
    assert pipeline.generate("seven " * 40, sampling=HOT).token_ids == whole.token_ids


def test_timings_count_what_happened(pipeline: Pipeline, pictures: list[Path]) -> None:
    t = pipeline.generate(
        "<image> and <image>", pictures[:2], Sampling(temperature=2, seed=1, max_new_tokens=6)
    ).timings
    assert t.image_tokens == 2 * TINY.tokens_per_image == 18
    assert t.prompt_tokens > 18
    assert (t.cached_tokens, t.new_tokens, t.decode_steps) == (0, 6, 5)
    assert all(ms > 0 for ms in (t.load_ms, t.preprocess_ms, t.vision_ms, t.projector_ms, t.prefill_ms, t.decode_ms))
    assert t.as_dict()["ttft_ms"] == pytest.approx(t.ttft_ms, abs=1e-3)
    assert t.tokens_per_s == pytest.approx(5 / t.decode_ms * 1000)


def test_an_image_is_encoded_once(pipeline: Pipeline, pictures: list[Path]) -> None:
    pipeline.generate("<image>", pictures[:1], HOT)
    assert pipeline.generate("<image> again", pictures[:1], HOT).timings.vision_ms == 0


def test_the_image_cache_gives_up_the_least_recently_used() -> None:
    entry = np.zeros((10, 10), np.float32)
    cache = ImageCache(budget=2 * entry.nbytes)
    for digest in ("a", "b"):
        cache.put(digest, entry)
    cache.get("a")
    cache.put("c", entry)
    assert [cache.get(digest) is not None for digest in "abc"] == [True, False, True]


def test_a_prefix_is_kept_as_far_as_it_is_the_same(pipeline: Pipeline) -> None:
    prefix: Prefix = pipeline.new_prefix()
    turns = [Turn("user", "one two three four")]
    pipeline.stream(turns, sampling=HOT, prefix=prefix).finish()
    longer = [Turn("user", "one two three nine")]
    reused = pipeline.stream(longer, sampling=HOT, prefix=prefix).finish()
    fresh = pipeline.stream(longer, sampling=HOT).finish()
    assert 4 <= reused.timings.cached_tokens < reused.timings.prompt_tokens
    assert reused.token_ids == fresh.token_ids


def test_another_image_in_the_same_place_is_read_anew(pipeline: Pipeline, pictures: list[Path]) -> None:
    prefix: Prefix = pipeline.new_prefix()
    turns = [Turn("user", "<image> what is it?")]
    pipeline.stream(turns, pictures[:1], HOT, prefix).finish()
    other = pipeline.stream(turns, pictures[1:2], HOT, prefix).finish()
    assert 0 < other.timings.cached_tokens < other.timings.prompt_tokens - TINY.tokens_per_image
    assert other.token_ids == pipeline.stream(turns, pictures[1:2], HOT).finish().token_ids


def test_a_tokenizer_of_another_model_is_refused(pipeline: Pipeline) -> None:
    smaller = dataclasses.replace(TINY, llm=dataclasses.replace(TINY.llm, vocab_size=TINY.llm.vocab_size - 1))
    with pytest.raises(InputError, match="the LLM's vocab_size is"):
        Pipeline("wrong", smaller, pipeline.tokenizer, pipeline.engine)


def test_a_context_out_of_range_and_an_unknown_backend(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="a context of 129 positions: this model has 1 to 128"):
        load(tiny_bundle, context=129)
    with pytest.raises(UsageError, match="unknown backend 'cudnn'"):
        load(tiny_bundle, backend="cudnn")
