"""Turns with `<image>` marks to chunks: runs of token ids, and image slots, in the user's order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from vila_edge.config import Profile
from vila_edge.errors import PromptError
from vila_edge.templates import Template, get_template
from vila_edge.tokenizer import Tokenizer

IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Turn:
    """What one side says. A `<image>` in a user's text is the place of one image."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True)
class TextChunk:
    """A run of token ids."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class ImageSlot:
    """The place of image `index`, counted from 0 in order of appearance."""

    index: int


Chunk = TextChunk | ImageSlot


@dataclass(frozen=True)
class _Special:
    """A control token of the template, as against the same characters in somebody's text."""

    token: str


def place_images(text: str, count: int) -> str:
    """`text` with exactly `count` image marks: marks already there stay, otherwise the images lead.

    Without a mark, `<image>` and a newline per image go first (spec section 3.3). Raises PromptError if
    there are marks, but not one for each image.
    """
    marks = text.count(IMAGE_MARK)
    if marks == count:
        return text
    if marks == 0:
        return f"{IMAGE_MARK}\n" * count + text
    raise _mismatch(marks, count)


def assemble(turns: Sequence[Turn], tokenizer: Tokenizer, profile: Profile) -> list[Chunk]:
    """A conversation as chunks, ending where the model is to continue (or after the last answer)."""
    return tokenize(render(turns, get_template(profile.template)), tokenizer)


def document(text: str, tokenizer: Tokenizer) -> list[Chunk]:
    """Plain text with image marks as chunks, without a template: what pre-training reads."""
    return tokenize(_split_marks(text), tokenizer)


def render(turns: Sequence[Turn], template: Template) -> Iterator[str | _Special | ImageSlot]:
    """The pieces of a conversation. Image slots are numbered through all turns."""
    if not turns or turns[0].role != "user":
        raise PromptError("a conversation starts with the user")
    yield template.opening
    slots = 0
    for turn in turns:
        if turn.role == "assistant":
            yield template.answer_lead + turn.text
            yield _Special(template.stop)
            continue
        yield template.before_user
        for piece in _split_marks(turn.text, slots):
            slots += isinstance(piece, ImageSlot)
            yield piece
        yield template.after_user
        yield template.before_answer


def tokenize(pieces: Iterator[str | _Special | ImageSlot], tokenizer: Tokenizer) -> list[Chunk]:
    """Text pieces between two image slots are joined and tokenised alone, one bos in front of all."""
    chunks: list[Chunk] = []
    ids: list[int] = list(tokenizer.prefix)
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        ids.extend(tokenizer.encode(text) if text else ())
        text = ""
        if isinstance(piece, _Special):
            ids.append(tokenizer.token_id(piece.token))
            continue
        if ids:
            chunks.append(TextChunk(tuple(ids)))
        chunks.append(piece)
        ids = []
    ids.extend(tokenizer.encode(text) if text else ())
    if ids:
        chunks.append(TextChunk(tuple(ids)))
    return chunks


def check_slots(chunks: Sequence[Chunk], count: int) -> None:
    """Raises PromptError unless there is one image for each slot."""
    slots = sum(isinstance(chunk, ImageSlot) for chunk in chunks)
    if slots != count:
        raise _mismatch(slots, count)


def _split_marks(text: str, first: int = 0) -> Iterator[str | ImageSlot]:
    parts = text.split(IMAGE_MARK)
    yield parts[0]
    for index, part in enumerate(parts[1:], first):
        yield ImageSlot(index)
        yield part


def _mismatch(marks: int, images: int) -> PromptError:
    return PromptError(
        f"the prompt has {_plural(marks, f'{IMAGE_MARK} mark')}, but {_plural(images, 'image')} came with it",
        "give one image for each mark, or no mark at all: then the images go first",
    )


def _plural(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"
