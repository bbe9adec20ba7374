"""A table of numbers as an SVG picture: one row a pair of adapters, one column a block of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_CELL, _LEFT, _TOP = 26, 240, 120
_FONT = 'font-family="sans-serif" font-size="11"'


def draw(rows: Sequence[tuple[str, Mapping[str, float]]], columns: Sequence[str], title: str) -> str:
    """An SVG document. Values are colours from white (0) to red (1 and more); what a row lacks stays empty."""
    width, height = _LEFT + _CELL * len(columns) + 20, _TOP + _CELL * len(rows) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {_FONT}>',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="18" font-size="13">{escape(title)}</text>',
    ]
    for place, column in enumerate(columns):
        x = _LEFT + _CELL * place + _CELL // 2
        parts.append(f'<text transform="translate({x},{_TOP - 8}) rotate(-45)">{escape(column)}</text>')
    for line, (name, values) in enumerate(rows):
        y = _TOP + _CELL * line
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 17}" text-anchor="end">{escape(name)}</text>')
        for place, column in enumerate(columns):
            if column in values:
                parts.append(_cell(_LEFT + _CELL * place, y, values[column], f"{name}, {column}"))
    return "\n".join([*parts, "</svg>\n"])


def _cell(x: int, y: int, value: float, what: str) -> str:
    faded = round(255 * (1 - min(max(value, 0.0), 1.0)))
    square = f'<rect x="{x}" y="{y}" width="{_CELL - 1}" height="{_CELL - 1}" fill="rgb(255,{faded},{faded})">'
    number = f'<text x="{x + 3}" y="{y + 16}" font-size="9">{value:.2f}</text>'
    return f"{square}<title>{escape(what)}: {value:.3f}</title></rect>{number}"
