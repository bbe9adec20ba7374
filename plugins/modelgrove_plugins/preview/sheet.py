"""A comparison sheet: pictures side by side under their titles, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_MARGIN = 12
_TEXT_SIZE = 14
_LINE = 18
_LABEL_WIDTH = 150


def compose(columns: Sequence[tuple[str, Path]], rows: Sequence[str] = ()) -> Image.Image:
    """Join PNG files under their titles; see `join`."""
    return join([(title, _open(path)) for title, path in columns], rows)


def join(columns: Sequence[tuple[str, Image.Image]], rows: Sequence[str] = ()) -> Image.Image:
    """Join pictures under their titles; `rows` labels equal bands of the pictures at the left.

    Pictures keep their size; titles are wrapped to the picture's width.
    """
    pictures = [picture for _, picture in columns]
    font = ImageFont.load_default(_TEXT_SIZE)
    titles = [_wrap(title, picture.width, font) for (title, _), picture in zip(columns, pictures, strict=True)]
    left = _MARGIN + (_LABEL_WIDTH if rows else 0)
    top = _MARGIN + max(map(len, titles)) * _LINE + _MARGIN // 2
    width = left + sum(picture.width + _MARGIN for picture in pictures)
    sheet = Image.new("RGB", (width, top + max(picture.height for picture in pictures) + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    _write_labels(draw, rows, top, pictures[0].height, font)
    for lines, picture in zip(titles, pictures, strict=True):
        for number, line in enumerate(lines):
            draw.text((left, top - _MARGIN // 2 - (len(lines) - number) * _LINE), line, "black", font)
        sheet.paste(picture, (left, top))
        left += picture.width + _MARGIN
    return sheet


def _write_labels(
    draw: ImageDraw.ImageDraw,
    rows: Sequence[str],
    top: int,
    height: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    for number, label in enumerate(rows):
        lines = _wrap(label, _LABEL_WIDTH - _MARGIN, font)
        middle = top + (number + 0.5) * height / len(rows) - len(lines) * _LINE / 2
        for line_number, line in enumerate(lines):
            draw.text((_MARGIN, middle + line_number * _LINE), line, "black", font)


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Lines no wider than `width` pixels; a word wider than that stands alone."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")
