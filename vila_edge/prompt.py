"""Turns with `<image>` and `<video>` marks to chunks: runs of token ids, and slots, in the user's order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from vila_edge.config import Profile
from vila_edge.errors import PromptError
from vila_edge.templates import Template, get_template
from vila_edge.tokenizer import Tokenizer

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"
STEP_BY_STEP = "Think step-by-step."  # the paper's chain-of-thought cue

_MARK = re.compile(f"{IMAGE_MARK}|{VIDEO_MARK}")


@dataclass(frozen=True)
class Turn:
    """What one side says. A mark in a user's text is the place of one image or video."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True)
class TextChunk:
    """A run of token ids."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class ImageSlot:
    """The place of slot `index`, counted from 0 in order of appearance: an image, a tile, or a video."""

    index: int


Chunk = TextChunk | ImageSlot


@dataclass(frozen=True)
class Control:
    """A control token of the template, as against the same characters in somebody's text."""

    token: str


Piece = str | Control | ImageSlot


@dataclass(frozen=True)
class Shown:
    """One image or video, as far as the prompt is concerned: its mark, and what stands for that in the model's text."""

    mark: str
    expansion: str  # marks, one for each slot, and the text between them


def place_media(text: str, marks: Sequence[str], profile: Profile) -> str:
    """`text` with the `marks` of its images and videos: marks already there stay, otherwise the media lead.

    How an image leads is the profile's (spec sections 3.3, 3.4). Raises PromptError if there are marks, but not
    one for each image and video, in this order.
    """
    if not check_text(text, marks):
        return "".join(profile.image_lead if mark == IMAGE_MARK else mark for mark in marks) + text
    return text


def check_text(text: str, marks: Sequence[str]) -> bool:
    """Whether `text` has marks. Raises PromptError if it has, but not those of its images and videos."""
    found = _MARK.findall(text)
    if found:
        check_marks(found, marks)
    return bool(found)


def expand_marks(turns: Sequence[Turn], shown: Sequence[Shown], profile: Profile) -> list[Turn]:
    """The turns as the model reads them: each mark as what its image or video takes.

    Raises PromptError unless there is one image or video for each mark of the user's turns, in this order.
    """
    marks = [mark for turn in turns if turn.role == "user" for mark in _MARK.findall(turn.text)]
    check_marks(marks, [item.mark for item in shown])
    expansions = iter(shown)
    expanded = []
    for turn in turns:
        text = turn.text
        if turn.role == "user":
            text = _MARK.sub(lambda _: next(expansions).expansion, text)
        expanded.append(Turn(turn.role, text.strip() if profile.strip_turns else text))
    return expanded


def few_shot(examples: Sequence[str], question: str, profile: Profile) -> str:
    """A prompt of answered examples, one image each, and the question behind them."""
    return "".join(profile.few_shot.replace("{answer}", answer) for answer in examples) + question


def think_step_by_step(question: str) -> str:
    """The question with the cue that asks for a chain of thought (spec section 3.6)."""
    return f"{question} {STEP_BY_STEP}" if question else STEP_BY_STEP


def assemble(turns: Sequence[Turn], tokenizer: Tokenizer, profile: Profile) -> list[Chunk]:
    """A conversation as chunks, ending where the model is to continue (or after the last answer)."""
    return tokenize(render(turns, get_template(profile.template)), tokenizer, profile)


def document(text: str, tokenizer: Tokenizer, profile: Profile) -> list[Chunk]:
    """Plain text with marks as chunks, without a template: what pre-training reads."""
    return tokenize(_split_marks(text), tokenizer, profile)


def render(turns: Sequence[Turn], template: Template) -> Iterator[Piece]:
    """The pieces of a conversation. Slots are numbered through all turns. Raises PromptError if there is no turn."""
    if not turns or turns[0].role != "user":
        raise PromptError("a conversation starts with the user")
    yield from _split_controls(template.opening, template)
    slots = 0
    for number, turn in enumerate(turns, 1):
        if turn.role == "assistant":
            yield template.answer_lead + turn.text
            end = template.after_last_answer if number == len(turns) else template.after_answer
            yield from _split_controls(end, template)
            continue
        yield from _split_controls(template.before_user, template)
        for piece in _split_marks(turn.text, slots):
            slots += isinstance(piece, ImageSlot)
            yield piece
        yield from _split_controls(template.after_user + template.before_answer, template)


def prompt_text(pieces: Iterable[Piece], slots: Sequence[str] = ()) -> str:
    """A rendered conversation as one string, its slots as given or as `<image>`: for people and for comparison."""
    text = ""
    for piece in pieces:
        if isinstance(piece, ImageSlot):
            text += slots[piece.index] if slots else IMAGE_MARK
        else:
            text += piece.token if isinstance(piece, Control) else piece
    return text


def tokenize(pieces: Iterable[Piece], tokenizer: Tokenizer, profile: Profile) -> list[Chunk]:
    """Pieces to chunks, by the rule of the era (spec sections 3.3, 3.4)."""
    runs: list[list[str | Control]] = [[]]
    slots = []
    for piece in pieces:
        if isinstance(piece, ImageSlot):
            slots.append(piece)
            runs.append([])
        else:
            runs[-1].append(piece)
    if profile.tokenization == "whole":
        ids = [_run_ids(run, tokenizer) for run in runs]
        ids[0] = [*tokenizer.prefix, *ids[0]]
    else:
        ids = [[*tokenizer.prefix, *_run_ids(run, tokenizer)] for run in runs]
        # The original's rule, to the letter: also where the prompt spells the bos that the tokenizer does not add.
        if ids[0][:1] == [tokenizer.bos_id]:
            ids = [ids[0], *(run[1:] for run in ids[1:])]
    chunks: list[Chunk] = []
    for run, slot in zip(ids, [*slots, None], strict=True):
        if run:
            chunks.append(TextChunk(tuple(run)))
        if slot:
            chunks.append(slot)
    return chunks


def check_slots(chunks: Sequence[Chunk], count: int) -> None:
    """Raises PromptError unless there is one image for each slot."""
    slots = sum(isinstance(chunk, ImageSlot) for chunk in chunks)
    if slots != count:
        raise _mismatch(slots, count)


def _run_ids(run: Sequence[str | Control], tokenizer: Tokenizer) -> list[int]:
    """Ids of what stands between two slots. Text that is cut by nothing is tokenised as one."""
    joined: list[str | int] = []
    for piece in run:
        control = tokenizer.control_id(piece.token) if isinstance(piece, Control) else None
        text = piece.token if isinstance(piece, Control) else piece
        if control is not None:
            joined.append(control)
        elif text and joined and isinstance(joined[-1], str):
            joined[-1] += text
        elif text:
            joined.append(text)
    prefix = tokenizer.config.prefix
    if prefix and joined:
        if isinstance(joined[0], str):
            joined[0] = prefix + joined[0]
        elif joined[0] not in map(tokenizer.control_id, tokenizer.config.special_tokens):
            joined.insert(0, prefix)
    return [i for part in joined for i in (tokenizer.encode(part) if isinstance(part, str) else (part,))]


def _split_controls(text: str, template: Template) -> Iterator[str | Control]:
    """A template's own text: control tokens are found by their characters here, and only here."""
    if not template.controls:
        yield text
        return
    for part in re.split("(" + "|".join(map(re.escape, template.controls)) + ")", text):
        yield Control(part) if part in template.controls else part


def _split_marks(text: str, first: int = 0) -> Iterator[str | ImageSlot]:
    parts = _MARK.split(text)
    yield parts[0]
    for index, part in enumerate(parts[1:], first):
        yield ImageSlot(index)
        yield part


def check_marks(found: Sequence[str], given: Sequence[str]) -> None:
    """Raises PromptError unless the marks found are those of what is given."""
    if len(found) != len(given):
        raise _mismatch(len(found), len(given))
    for number, (mark, kind) in enumerate(zip(found, given, strict=True), 1):
        if mark != kind:
            raise PromptError(
                f"mark {number} of the prompt is {mark}, but what comes with it is {'a video' if kind == VIDEO_MARK else 'an image'}",
                "images and videos go to the marks in their order",
            )


def _mismatch(marks: int, images: int) -> PromptError:
    return PromptError(
        f"the prompt has {_plural(marks, f'{IMAGE_MARK} mark')}, but {_plural(images, 'image')} came with it",
        "give one image for each mark, or no mark at all: then the images go first",
    )


def _plural(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"
