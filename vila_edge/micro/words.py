"""The micro VILA's vocabulary: number words, label words and a few facts."""

from __future__ import annotations

# fmt: off
NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
]
# fmt: on
DIGITS = NUMBERS[:10]
ORDINALS = ["first", "second", "third", "fourth"]

# Pseudo-words for label games. The seen ones stand beside images in training; the held ones stand
# beside number words only, so that a label game with held words and images is new to the model.
LABELS = [onset + rime for rime in ("ax", "ug", "ep", "ib", "ol") for onset in "bdfgjklmnprstvwz"]
HELD_LABELS = LABELS[::5]
SEEN_LABELS = [label for label in LABELS if label not in HELD_LABELS]

NAMES = ["Tom", "Anna", "Ben", "Mia"]
THINGS = ["apples", "books", "coins", "shells"]

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Peru": "Lima",
    "Cuba": "Havana",
    "Norway": "Oslo",
}
COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red", "the sky": "blue", "gold": "yellow"}
