"""What is measured: held-out prompts of five kinds, the same for every run and engine."""

from __future__ import annotations

import random
from collections.abc import Sequence

from vila_edge.eval.run import Prompt
from vila_edge.media.image import RgbImage, load_image
from vila_edge.micro.digits import Digits
from vila_edge.micro.instructions import QUESTIONS, Exchange, addition, few_shot
from vila_edge.micro.words import HELD_LABELS, SEEN_LABELS

PROMPTS_PER_TASK = 400
SEED = 1
WAYS = 4  # of a few-shot prompt: four digits, each shown once with a label; chance is 1 in 4

# `icl_4shot` uses label words that never stood beside an image in training, `icl_4shot_seen` words that did;
# the map from digits to labels is new in every prompt of both.
TASKS = ("naming", "sum", "compare", "icl_4shot", "icl_4shot_seen", "text")


def make_prompts(digits: Digits, count: int | None = None) -> dict[str, list[Prompt]]:
    """Task -> `count` (by default PROMPTS_PER_TASK) prompts about pictures of `digits`, a held-out split."""
    pictures = [load_image(digits.picture(index)) for index in range(len(digits))]
    by_label = digits.by_label()
    return {task: _prompts(task, count or PROMPTS_PER_TASK, pictures, by_label) for task in TASKS}


def _prompts(task: str, count: int, pictures: Sequence[RgbImage], by_label: list[list[int]]) -> list[Prompt]:
    rng = random.Random(f"{SEED} {task}")
    prompts = []
    for _ in range(count):
        exchange = _exchange(task, rng)
        images = tuple(pictures[rng.choice(by_label[digit])] for digit in exchange.digits)
        prompts.append(Prompt(exchange.question, images, exchange.answer))
    return prompts


def _exchange(task: str, rng: random.Random) -> Exchange:
    if task == "icl_4shot":
        return few_shot(rng, HELD_LABELS, WAYS)
    if task == "icl_4shot_seen":
        return few_shot(rng, SEEN_LABELS, WAYS)
    return addition(rng) if task == "text" else QUESTIONS[task].ask(rng)
