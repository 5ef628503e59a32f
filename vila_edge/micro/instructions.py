"""Conversations about digits: questions, answers, follow-ups and few-shot episodes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vila_edge.micro.words import CAPITALS, COLOURS, DIGITS, HELD_LABELS, NUMBERS, SEEN_LABELS
from vila_edge.prompt import IMAGE_MARK


@dataclass(frozen=True)
class Exchange:
    """A question with `<image>` marks, the digit each of them shows, and the answer."""

    question: str
    digits: tuple[int, ...]
    answer: str


@dataclass(frozen=True)
class Question:
    """What can be asked about images of digits: wordings, the answer, and for how many images."""

    wordings: tuple[str, ...]
    answer: Callable[[Sequence[int]], str]
    images: tuple[int, int]  # fewest and most
    weight: float
    all_different: bool = False
    twins: float = 0.0  # share in which all images show one digit

    def draw(self, rng: random.Random) -> tuple[int, ...]:
        """Digits to ask about."""
        count = rng.randint(*self.images)
        if rng.random() < self.twins:
            return (rng.randrange(10),) * count
        if self.all_different:
            return tuple(rng.sample(range(10), count))
        return tuple(rng.randrange(10) for _ in range(count))

    def ask(self, rng: random.Random) -> Exchange:
        """The images go first, as in a prompt without marks, unless the wording places them."""
        digits, wording = self.draw(rng), rng.choice(self.wordings)
        lead = "" if IMAGE_MARK in wording else f"{IMAGE_MARK}\n" * len(digits)
        return Exchange(lead + wording, digits, self.answer(digits))


QUESTIONS = {
    "naming": Question(
        (
            "What digit is this?",
            "Which digit is this?",
            "What digit is shown?",
            "Which digit is shown?",
            "What number is this?",
            "What number is in the image?",
            "What is in the image?",
            "What is this?",
            "Name the digit.",
        ),
        lambda digits: DIGITS[digits[0]],
        images=(1, 1),
        weight=0.16,
    ),
    "sum": Question(
        (
            "What is the sum?",
            "What is the sum of the digits?",
            "What is the sum of the two digits?",
            "What is the sum of the two images?",
            "Add the digits.",
            f"What is {IMAGE_MARK} plus {IMAGE_MARK}?",
        ),
        lambda digits: NUMBERS[sum(digits)],
        images=(2, 2),
        weight=0.24,
    ),
    "compare": Question(
        (
            "Which image shows the larger digit?",
            "Which digit is larger?",
            "Which image is larger?",
            "Which is larger?",
            f"Which is larger, {IMAGE_MARK} or {IMAGE_MARK}?",
        ),
        lambda digits: "the first" if digits[0] > digits[1] else "the second",
        images=(2, 2),
        weight=0.18,
        all_different=True,
    ),
    "largest": Question(
        ("What is the largest digit?",), lambda digits: DIGITS[max(digits)], images=(2, 4), weight=0.04
    ),
    "smallest": Question(
        ("What is the smallest digit?",), lambda digits: DIGITS[min(digits)], images=(2, 4), weight=0.04
    ),
    "same": Question(
        ("Do the images show the same digit?",),
        lambda digits: "yes" if digits[0] == digits[1] else "no",
        images=(2, 2),
        weight=0.08,
        twins=0.45,
    ),
    "parity": Question(
        ("Is the digit even or odd?",),
        lambda digits: "odd" if digits[0] % 2 else "even",
        images=(1, 1),
        weight=0.04,
    ),
    "successor": Question(
        ("What comes after this digit?",), lambda digits: NUMBERS[digits[0] + 1], images=(1, 1), weight=0.04
    ),
    "count": Question(("How many images are there?",), lambda digits: NUMBERS[len(digits)], images=(1, 4), weight=0.04),
    "list": Question(
        ("List the digits.", "What digits are shown?", "Which digits are these?"),
        lambda digits: " ".join(DIGITS[digit] for digit in digits),
        images=(2, 4),
        weight=0.08,
    ),
    "first": Question(("What is the first digit?",), lambda d: DIGITS[d[0]], images=(2, 4), weight=0.03),
    "second": Question(("What is the second digit?",), lambda d: DIGITS[d[1]], images=(2, 4), weight=0.03),
}
ADDITIONS = ("What is {a} plus {b}?", "What is the sum of {a} and {b}?", "Add {a} and {b}.")


def visual(rng: random.Random) -> Exchange:
    """A question about one to four images."""
    questions = list(QUESTIONS.values())
    return rng.choices(questions, [question.weight for question in questions])[0].ask(rng)


def follow_up(first: Exchange, rng: random.Random) -> Exchange:
    """A second question about the images that were shown with the first."""
    count = len(first.digits)
    fitting = [q for q in QUESTIONS.values() if q.images[0] <= count <= q.images[1] and not q.all_different]
    question = rng.choice(fitting)
    wording = rng.choice([wording for wording in question.wordings if IMAGE_MARK not in wording])
    return Exchange(wording, (), question.answer(first.digits))


def addition(rng: random.Random) -> Exchange:
    a, b = rng.randrange(10), rng.randrange(10)
    return Exchange(rng.choice(ADDITIONS).format(a=DIGITS[a], b=DIGITS[b]), (), NUMBERS[a + b])


def text_only(rng: random.Random) -> Exchange:
    """A question without images."""
    kind = rng.random()
    if kind < 0.55:
        return addition(rng)
    if kind < 0.7:
        a, b = rng.sample(range(10), 2)
        return Exchange(f"Which is larger, {DIGITS[a]} or {DIGITS[b]}?", (), DIGITS[max(a, b)])
    if kind < 0.8:
        digit = rng.randrange(10)
        return Exchange(f"What comes after {DIGITS[digit]}?", (), NUMBERS[digit + 1])
    if kind < 0.9:
        land, capital = rng.choice(list(CAPITALS.items()))
        return Exchange(f"What is the capital of {land}?", (), capital)
    thing, colour = rng.choice(list(COLOURS.items()))
    return Exchange(f"What is the colour of {thing}?", (), colour)


def few_shot(rng: random.Random, labels: Sequence[str], ways: int, more: int = 0) -> Exchange:
    """`<image>dax;<image>wug;...<image>`: examples of a map made up for this prompt, then the query.

    Each of `ways` digits is shown once, and `more` further examples follow.
    """
    digits = rng.sample(range(10), ways)
    names = dict(zip(digits, rng.sample(list(labels), ways), strict=True))
    shown = rng.sample(digits, ways) + rng.choices(digits, k=more)
    query = rng.choice(digits)
    examples = "".join(f"{IMAGE_MARK}{names[digit]};" for digit in shown)
    return Exchange(examples + IMAGE_MARK, (*shown, query), names[query])


def few_shot_in_words(rng: random.Random) -> Exchange:
    """The same game with number words in the place of images: the only one that has held labels."""
    game = few_shot(rng, rng.choice((SEEN_LABELS, HELD_LABELS)), rng.choice(WAYS), rng.randint(0, 3))
    question = game.question
    for digit in game.digits:
        question = question.replace(IMAGE_MARK, f" {DIGITS[digit]} ", 1)
    return Exchange(question.strip(), (), game.answer)


WAYS = (2, 3, 4, 4)


def conversation(rng: random.Random) -> list[Exchange]:
    """One conversation of the joint SFT mixture: few-shot, or about images or text, with one more question in some."""
    kind = rng.random()
    if kind < 0.08:
        return [few_shot_in_words(rng)]
    if kind < 0.28:
        return [few_shot(rng, SEEN_LABELS, rng.choice(WAYS), rng.randint(0, 3))]
    first = text_only(rng) if kind < 0.46 else visual(rng)
    more = rng.random()
    if more < 0.25:  # about something new: without these, images of an earlier turn mix into the answer
        return [first, text_only(rng) if rng.random() < 0.25 else visual(rng)]
    if more < 0.35 and first.digits:
        return [first, follow_up(first, rng)]
    return [first]
