"""Conversations about digits: questions, answers, and few-shot episodes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vila_edge.micro.words import CAPITALS, COLOURS, DIGITS, HELD_LABELS, NUMBERS, ORDINALS, SEEN_LABELS
from vila_edge.prompt import IMAGE_MARK


@dataclass(frozen=True)
class Exchange:
    """A question with `<image>` marks, the digit each of them shows, and the answer."""

    question: str
    digits: tuple[int, ...]
    answer: str


def with_images(text: str, digits: Sequence[int], answer: str) -> Exchange:
    """The images first, each with its newline: where a prompt without marks puts them."""
    return Exchange(f"{IMAGE_MARK}\n" * len(digits) + text, tuple(digits), answer)


def naming(rng: random.Random, text: str | None = None) -> Exchange:
    digit = rng.randrange(10)
    text = text or rng.choice(NAMING)
    return with_images(text, [digit], DIGITS[digit])


def total(rng: random.Random, text: str | None = None) -> Exchange:
    a, b = rng.randrange(10), rng.randrange(10)
    text = text or rng.choice(SUM)
    if IMAGE_MARK in text:
        return Exchange(text, (a, b), NUMBERS[a + b])
    return with_images(text, [a, b], NUMBERS[a + b])


def compare(rng: random.Random, text: str | None = None) -> Exchange:
    a, b = rng.sample(range(10), 2)
    return with_images(text or rng.choice(COMPARE), [a, b], "the first" if a > b else "the second")


def largest(rng: random.Random) -> Exchange:
    digits = rng.sample(range(10), rng.randint(2, 4))
    word, pick = rng.choice((("largest", max), ("smallest", min)))
    return with_images(f"What is the {word} digit?", digits, DIGITS[pick(digits)])


def same(rng: random.Random) -> Exchange:
    a, b = rng.randrange(10), rng.randrange(10)
    b = a if rng.random() < 0.45 else b
    return with_images("Do the images show the same digit?", [a, b], "yes" if a == b else "no")


def parity(rng: random.Random) -> Exchange:
    digit = rng.randrange(10)
    return with_images("Is the digit even or odd?", [digit], "odd" if digit % 2 else "even")


def successor(rng: random.Random) -> Exchange:
    digit = rng.randrange(10)
    return with_images("What comes after this digit?", [digit], NUMBERS[digit + 1])


def count(rng: random.Random) -> Exchange:
    digits = [rng.randrange(10) for _ in range(rng.randint(1, 4))]
    return with_images("How many images are there?", digits, NUMBERS[len(digits)])


def listing(rng: random.Random) -> Exchange:
    digits = [rng.randrange(10) for _ in range(rng.randint(2, 4))]
    return with_images(rng.choice(LISTING), digits, " ".join(DIGITS[digit] for digit in digits))


def nth(rng: random.Random) -> Exchange:
    digits = [rng.randrange(10) for _ in range(rng.randint(2, 4))]
    place = rng.randrange(len(digits))
    return with_images(f"What is the {ORDINALS[place]} digit?", digits, DIGITS[digits[place]])


def addition(rng: random.Random, text: str | None = None) -> Exchange:
    a, b = rng.randrange(10), rng.randrange(10)
    return Exchange((text or rng.choice(ADDITION)).format(a=DIGITS[a], b=DIGITS[b]), (), NUMBERS[a + b])


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


def few_shot(rng: random.Random, labels: Sequence[str], ways: int | None = None, shots: int = 0) -> Exchange:
    """`<image>dax;<image>wug;...<image>`: examples of a map made up for this prompt, then the query.

    Every class is shown once, and `shots` further examples follow.
    """
    ways = ways or rng.choice((2, 3, 4, 4))
    digits = rng.sample(range(10), ways)
    names = dict(zip(digits, rng.sample(list(labels), ways), strict=True))
    shown = rng.sample(digits, ways) + rng.choices(digits, k=shots)
    query = rng.choice(digits)
    examples = "".join(f"{IMAGE_MARK}{names[digit]};" for digit in shown)
    return Exchange(examples + IMAGE_MARK, (*shown, query), names[query])


def few_shot_in_words(rng: random.Random) -> Exchange:
    """The same game with number words in the place of images: the only one that has held labels."""
    game = few_shot(rng, SEEN_LABELS + HELD_LABELS, shots=rng.randint(0, 3))
    question = game.question
    for digit in game.digits:
        question = question.replace(IMAGE_MARK, f" {DIGITS[digit]} ", 1)
    return Exchange(question.strip(), (), game.answer)


NAMING = (
    "What digit is this?",
    "Which digit is shown?",
    "What number is in the image?",
    "What is in the image?",
    "Name the digit.",
)
SUM = (
    "What is the sum?",
    "What is the sum of the digits?",
    "What is the sum of the two digits?",
    "Add the digits.",
    f"What is {IMAGE_MARK} plus {IMAGE_MARK}?",
)
COMPARE = (
    "Which image shows the larger digit?",
    "Which digit is larger?",
    "Which image is larger?",
)
LISTING = ("List the digits.", "What digits are shown?", "Which digits are these?")
ADDITION = ("What is {a} plus {b}?", "What is the sum of {a} and {b}?", "Add {a} and {b}.")

VISUAL: tuple[tuple[float, Callable[[random.Random], Exchange]], ...] = (
    (0.16, naming),
    (0.24, total),
    (0.18, compare),
    (0.08, largest),
    (0.08, same),
    (0.04, parity),
    (0.04, successor),
    (0.04, count),
    (0.08, listing),
    (0.06, nth),
)


def visual(rng: random.Random) -> Exchange:
    """A question about one to four images."""
    weights, kinds = zip(*VISUAL, strict=True)
    return rng.choices(kinds, weights)[0](rng)


def instruction(rng: random.Random, text_share: float = 0.18, few_shot_share: float = 0.14) -> Exchange:
    """One exchange of the joint SFT mixture."""
    kind = rng.random()
    if kind < text_share:
        return text_only(rng)
    if kind < text_share + few_shot_share:
        return few_shot(rng, SEEN_LABELS, shots=rng.randint(0, 3))
    if kind < text_share + few_shot_share + 0.08:
        return few_shot_in_words(rng)
    return visual(rng)
