"""Documents for pre-training, as text or with images in the place of number words.

A document is a list of strings and numbers. `as_text` writes the numbers out (a LLaMA's corpus),
`interleaved` shows some of them as images (an MMC4): the same games and stories, so that what the LLM
knows about numbers carries over to their pictures.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vila_edge.micro.words import (
    CAPITALS,
    COLOURS,
    DIGITS,
    HELD_LABELS,
    NAMES,
    NUMBERS,
    SEEN_LABELS,
    THINGS,
)
from vila_edge.prompt import IMAGE_MARK

Parts = list[str | int]  # strings, and numbers that are a word or an image


@dataclass(frozen=True)
class Document:
    """Text with `<image>` marks, and the digit that each of them shows."""

    text: str
    digits: tuple[int, ...] = ()


def as_text(parts: Parts) -> Document:
    return Document("".join(NUMBERS[part] if isinstance(part, int) else part for part in parts))


def interleaved(parts: Parts, share: float, rng: random.Random) -> Document:
    """Each digit becomes an image with probability `share`. No blanks around an image (spec 4.2)."""
    text, digits = "", []
    for part in parts:
        if isinstance(part, str):
            text += part.lstrip(" ") if text.endswith(IMAGE_MARK) else part
        elif part < 10 and rng.random() < share:
            text = text.rstrip(" ") + IMAGE_MARK
            digits.append(part)
        else:
            text += NUMBERS[part]
    return Document(text, tuple(digits))


def label_game(rng: random.Random, labels: Sequence[str]) -> Parts:
    """`three dax; seven wug; three dax;`: a new map from 2-4 digits to labels in every document."""
    ways = rng.choice((2, 3, 4, 4))
    digits = rng.sample(range(10), ways)
    names = dict(zip(digits, rng.sample(list(labels), ways), strict=True))
    order = rng.sample(digits, ways) + rng.choices(digits, k=rng.randint(2, 6))
    parts: Parts = []
    for digit in order:
        parts += [digit, f" {names[digit]}; "]
    return parts


def arithmetic(rng: random.Random) -> Parts:
    """Sums and comparisons as statements."""
    parts: Parts = []
    for _ in range(rng.randint(1, 3)):
        a, b = rng.randrange(10), rng.randrange(10)
        if rng.random() < 0.6:
            parts += [a, " plus ", b, " is ", a + b, ". "]
        elif a != b:
            parts += ["The larger of ", a, " and ", b, " is ", max(a, b), ". "]
        else:
            parts += [a, " and ", b, " are the same. "]
    return parts


def ordering(rng: random.Random) -> Parts:
    """Which of two is larger, by its place."""
    a, b = rng.sample(range(10), 2)
    return ["Of ", a, " and ", b, " the ", "first" if a > b else "second", " is larger. "]


def listing(rng: random.Random) -> Parts:
    """A row of digits, then the same row in words."""
    digits = [rng.randrange(10) for _ in range(rng.randint(1, 4))]
    parts: Parts = []
    for digit in digits:
        parts += [digit, " "]
    return [*parts, ": ", " ".join(DIGITS[digit] for digit in digits), ". "]


def story(rng: random.Random) -> Parts:
    a, b = rng.randrange(10), rng.randrange(10)
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    return [f"{name} has ", a, f" {thing} and finds ", b, " more. Now there are ", a + b, f" {thing}. "]


def succession(rng: random.Random) -> Parts:
    digit = rng.randrange(9)
    return ["After ", digit, " comes ", digit + 1, ". ", digit, " is ", "odd" if digit % 2 else "even", ". "]


def fact(rng: random.Random) -> Parts:
    if rng.random() < 0.6:
        land, capital = rng.choice(list(CAPITALS.items()))
        return [f"The capital of {land} is {capital}. "]
    thing, colour = rng.choice(list(COLOURS.items()))
    return [f"The colour of {thing} is {colour}. "]


def caption(rng: random.Random) -> Parts:
    """An image and its caption: what an image-text pair says."""
    digit = rng.randrange(10)
    ending = rng.choice(("a photo of ", "the digit ", "a picture of ", "this is "))
    return [digit, f" {ending}{DIGITS[digit]}."]


_KINDS: tuple[tuple[float, Callable[[random.Random], Parts]], ...] = (
    (0.30, arithmetic),
    (0.08, ordering),
    (0.14, listing),
    (0.10, story),
    (0.08, succession),
)


def number_document(rng: random.Random, labels: Sequence[str]) -> Parts:
    """A document about numbers: in the text corpus and, with images, in the interleaved one."""
    if rng.random() < 0.4:
        return label_game(rng, labels)
    weights, kinds = zip(*_KINDS, strict=True)
    return rng.choices(kinds, weights)[0](rng)


def text_document(rng: random.Random) -> Document:
    """One document of the LLM's own corpus."""
    if rng.random() < 0.06:
        return as_text(fact(rng))
    return as_text(number_document(rng, rng.choice((SEEN_LABELS, HELD_LABELS))))


def interleaved_document(rng: random.Random) -> Document:
    """One document with images in its text: all numbers shown, or most of them."""
    share = rng.choice((1.0, 0.85))
    lead = as_text(fact(rng)).text if rng.random() < 0.1 else ""
    return interleaved([lead, *number_document(rng, SEEN_LABELS)], share, rng)


def pair(rng: random.Random) -> Document:
    """One image-text pair."""
    return interleaved(caption(rng), 1.0, rng)
