"""A picture to judge a model by: real test digits, questions and the answers given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from vila_edge.media.image import RgbImage

CARD_WIDTH, CARD_HEIGHT, MARGIN, THUMBNAIL, COLUMNS = 460, 190, 16, 72, 2
_INK, _GROUND, _RIGHT, _WRONG = (30, 30, 30), (255, 255, 255), (20, 120, 50), (180, 30, 30)


@dataclass(frozen=True)
class Card:
    """One question with its images (empty for text), what was answered and what is right."""

    title: str
    question: str
    images: tuple[RgbImage, ...]
    answer: str
    expected: str


def contact_sheet(heading: str, cards: Sequence[Card]) -> Image.Image:
    """An RGB image with one card for each question."""
    rows = -(-len(cards) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * CARD_WIDTH + MARGIN, rows * CARD_HEIGHT + 3 * MARGIN), _GROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN // 2), heading, _INK, ImageFont.load_default(18))
    for index, card in enumerate(cards):
        row, column = divmod(index, COLUMNS)
        _draw_card(sheet, draw, card, column * CARD_WIDTH + MARGIN, row * CARD_HEIGHT + 3 * MARGIN)
    return sheet


def _draw_card(sheet: Image.Image, draw: ImageDraw.ImageDraw, card: Card, x: int, y: int) -> None:
    small, large = ImageFont.load_default(14), ImageFont.load_default(16)
    draw.text((x, y), card.title, (110, 110, 110), small)
    for place, image in enumerate(card.images):
        thumbnail = Image.fromarray(image.pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.NEAREST)
        sheet.paste(thumbnail, (x + place * (THUMBNAIL + 8), y + 22))
    text_y = y + 22 + (THUMBNAIL + 8 if card.images else 0)
    draw.text((x, text_y), card.question, _INK, small)
    right = card.answer == card.expected
    answer = card.answer if right else f"{card.answer or '(nothing)'}   (expected: {card.expected})"
    draw.text((x, text_y + 24), answer, _RIGHT if right else _WRONG, large)
