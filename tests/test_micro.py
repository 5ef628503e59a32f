"""The micro VILA's world: what is held out is held out, what is asked has one right answer."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from vila_edge.micro.digits import SIDE, TEST_SIZE, VALIDATION_SIZE, augment, load_splits
from vila_edge.micro.documents import Document, as_text, interleaved, interleaved_document, pair, text_document
from vila_edge.micro.instructions import QUESTIONS, Exchange, conversation, few_shot, follow_up
from vila_edge.micro.recipe import CONFIG, Recipe
from vila_edge.micro.tasks import TASKS, make_prompts
from vila_edge.micro.words import DIGITS, HELD_LABELS, LABELS, NUMBERS, SEEN_LABELS
from vila_edge.parameters import count_parameters
from vila_edge.prompt import IMAGE_MARK
from vila_edge.train.stages import PROJECTOR, PROJECTOR_AND_LLM

SPLITS = load_splits()


def words(text: str) -> set[str]:
    for mark in (IMAGE_MARK, ";", ".", "?", ":", ","):
        text = text.replace(mark, " ")
    return set(text.split())


def test_no_scan_is_in_two_splits() -> None:
    seen = [scan.tobytes() for split in (SPLITS.train, SPLITS.validation, SPLITS.test) for scan in split.scans]
    assert (len(seen), len(SPLITS.validation), len(SPLITS.test)) == (1797, VALIDATION_SIZE, TEST_SIZE)
    assert len(set(seen)) == len(seen)
    for split in (SPLITS.train, SPLITS.validation, SPLITS.test):
        shares = np.bincount(split.labels, minlength=10) / len(split)
        assert (abs(shares - 0.1) < 0.02).all()


def test_pictures_and_their_changed_copies_have_one_form() -> None:
    picture = SPLITS.train.picture(0)
    changed = augment(picture, random.Random(0))
    assert picture.size == changed.size == (SIDE, SIDE)
    assert np.asarray(picture).mean() > 20  # there is ink
    assert 5 < np.abs(np.asarray(picture, float) - np.asarray(changed)).mean() < 80


def test_the_labels_are_eighty_words_in_two_sets() -> None:
    assert (len(set(LABELS)), len(HELD_LABELS), len(SEEN_LABELS)) == (80, 16, 64)
    assert not set(HELD_LABELS) & set(SEEN_LABELS)


def test_a_held_label_never_stands_beside_an_image() -> None:
    rng = random.Random(0)
    shown: set[str] = set()
    told: set[str] = set()
    for _ in range(3000):
        for document in (interleaved_document(rng), text_document(rng), pair(rng)):
            (shown if document.digits else told).update(words(document.text))
        exchanges = conversation(rng)
        target = shown if any(exchange.digits for exchange in exchanges) else told
        for exchange in exchanges:
            target.update(words(exchange.question), words(exchange.answer))
    assert not shown & set(HELD_LABELS)
    assert set(HELD_LABELS) <= told
    assert set(SEEN_LABELS) <= shown


def test_marks_and_digits_agree_everywhere() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        for document in (text_document(rng), interleaved_document(rng), pair(rng)):
            assert document.text.count(IMAGE_MARK) == len(document.digits)
            assert f" {IMAGE_MARK}" not in document.text
            assert f"{IMAGE_MARK} " not in document.text
        for exchange in conversation(rng):
            assert exchange.question.count(IMAGE_MARK) == len(exchange.digits)
            assert exchange.answer


def test_an_image_takes_the_place_of_a_word() -> None:
    parts: list[str | int] = ["", 3, " dax; ", 12, " and ", 7, "."]
    assert as_text(parts) == Document("three dax; twelve and seven.")
    assert interleaved(parts, 1.0, random.Random(0)) == Document("<image>dax; twelve and<image>.", (3, 7))
    assert interleaved(parts, 0.0, random.Random(0)) == as_text(parts)


# Each answer worked out another way than in the package.
ANSWERS: dict[str, Callable[[list[int]], str]] = {
    "naming": lambda d: DIGITS[d[0]],
    "sum": lambda d: NUMBERS[d[0] + d[1]],
    "compare": lambda d: ["the first", "the second"][d.index(max(d))],
    "largest": lambda d: DIGITS[sorted(d)[-1]],
    "smallest": lambda d: DIGITS[sorted(d)[0]],
    "same": lambda d: "yes" if len(set(d)) == 1 else "no",
    "parity": lambda d: ["even", "odd"][d[0] & 1],
    "successor": lambda d: NUMBERS[d[0] + 1],
    "count": lambda d: NUMBERS[len(d)],
    "list": lambda d: " ".join(DIGITS[digit] for digit in d),
    "first": lambda d: DIGITS[d[0]],
    "second": lambda d: DIGITS[d[1]],
}


@pytest.mark.parametrize("kind", QUESTIONS)
def test_answers_are_right(kind: str) -> None:
    rng = random.Random(2)
    for _ in range(200):
        exchange = QUESTIONS[kind].ask(rng)
        assert exchange.answer == ANSWERS[kind](list(exchange.digits))
        second = follow_up(exchange, rng)
        assert second.digits == ()
        assert IMAGE_MARK not in second.question


def test_a_few_shot_prompt_can_be_answered_from_its_examples() -> None:
    rng = random.Random(3)
    maps = set()
    for _ in range(200):
        exchange = few_shot(rng, HELD_LABELS, ways=4)
        *labels, last = exchange.question.split(IMAGE_MARK)[1:]
        shown, query = exchange.digits[:-1], exchange.digits[-1]
        assert last == ""
        assert len(set(shown)) == len(set(labels)) == 4
        assert labels[shown.index(query)] == f"{exchange.answer};"
        maps.add((shown, tuple(labels)))
    assert len(maps) == 200


def test_the_tasks_are_the_same_in_every_run_and_about_held_out_pictures() -> None:
    one, two = (make_prompts(SPLITS.test, 50) for _ in range(2))
    assert tuple(one) == TASKS == tuple(two)
    pictures = {SPLITS.test.picture(i).tobytes() for i in range(len(SPLITS.test))}
    for task in TASKS:
        assert [(p.question, p.answer) for p in one[task]] == [(p.question, p.answer) for p in two[task]]
        for prompt in one[task]:
            assert prompt.question.count(IMAGE_MARK) == len(prompt.images)
            for image in prompt.images:
                assert image.pixels[..., 0].tobytes() in pictures  # type: ignore[union-attr]
    assert all(not words(p.question) & set(SEEN_LABELS) for p in one["icl_4shot"])
    assert {len(p.images) for p in one["icl_4shot"]} == {5}


def test_the_stages_are_those_of_the_paper() -> None:
    recipe = Recipe()
    assert [s.name for s in (recipe.text, recipe.align, recipe.pretrain, recipe.sft)] == [
        "text",
        "align",
        "pretrain",
        "sft",
    ]
    assert recipe.align.trains == PROJECTOR
    assert recipe.pretrain.trains == recipe.sft.trains == PROJECTOR_AND_LLM


def test_it_is_about_a_million_parameters() -> None:
    assert 0.9e6 < count_parameters(CONFIG) < 1.2e6
    assert CONFIG.tokens_per_image == 4


def test_text_questions_are_part_of_the_sft_mixture() -> None:
    rng = random.Random(4)
    first: list[Exchange] = [conversation(rng)[0] for _ in range(2000)]
    share = sum(not exchange.digits for exchange in first) / len(first)
    assert 0.2 < share < 0.35


def test_some_conversations_go_on_about_the_same_images_or_new_ones() -> None:
    rng = random.Random(5)
    seconds = [exchanges for _ in range(2000) if len(exchanges := conversation(rng)) == 2]
    assert sum(bool(first.digits and not second.digits) for first, second in seconds) > 50
    assert sum(bool(first.digits and second.digits) for first, second in seconds) > 50
    assert sum(bool(second.digits and not first.digits) for first, second in seconds) > 20
