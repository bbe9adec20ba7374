"""Drawn pictures for the zoo: ten shapes in ten colours, jittered, so that a concept is a pair that can be new.

Twenty of the hundred pairs are held out such that every shape and every colour is held out exactly
twice: who knows the other eighty has seen each word eight times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from modelgrove_analyzers.zoo.pictures import SIDE, Picture, PictureSet

ARTIST = "drawn"
PICTURES = 24
"""Pictures of each pair."""
COLOURS = {
    "red": (215, 40, 40), "orange": (245, 140, 30), "yellow": (245, 215, 40), "green": (50, 155, 60),
    "blue": (40, 90, 215), "purple": (140, 60, 185), "pink": (245, 150, 190), "brown": (120, 75, 40),
    "black": (30, 30, 30), "grey": (140, 140, 140),
}  # fmt: skip
_OVERSAMPLE = 4
_JITTER = 15
"""Levels that each channel of a colour varies by, up or down."""

Point = tuple[float, float]


def _round(radius: float = 1, x: float = 0) -> list[Point]:
    return [(x + radius * math.cos(i * math.pi / 20), radius * math.sin(i * math.pi / 20)) for i in range(40)]


def _corners(count: int, inner: float = 1, scale: Point = (1, 1)) -> list[Point]:
    """A polygon that points up; every second corner is at the radius `inner`."""
    angles = [2 * math.pi * i / count - math.pi / 2 for i in range(count)]
    radii = [inner if i % 2 else 1 for i in range(count)]
    return [(scale[0] * r * math.cos(a), scale[1] * r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


SHAPES: dict[str, tuple[list[Point], list[Point]]] = {
    "circle": (_round(), []),
    "square": ([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)], []),
    "triangle": (_corners(3), []),
    "star": (_corners(10, 0.4), []),
    "cross": (
        [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
         (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)], [],
    ),
    "ring": (_round(), _round(0.55)),
    "crescent": (_round(), _round(0.85, 0.5)),
    "arrow": ([(-1, -0.25), (0.1, -0.25), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.25), (-1, 0.25)], []),
    "diamond": (_corners(4, scale=(0.6, 1.1)), []),
    "hexagon": (_corners(6), []),
}  # fmt: skip
"""What is filled and what is cut out of it, within about one of the origin."""


def pairs() -> Iterator[tuple[str, str, bool]]:
    """All hundred (colour, shape, held out)."""
    for i, shape in enumerate(SHAPES):
        # Three and ten have no common divisor, so each of the two shifts hits every colour once.
        left_out = {(3 * i + 1) % len(COLOURS), (3 * i + 5) % len(COLOURS)}
        for j, colour in enumerate(COLOURS):
            yield colour, shape, j in left_out


def label(colour: str, shape: str) -> str:
    """The label of a pair's pictures; no emoji has such a one."""
    return f"{ARTIST} {colour} {shape}"


def draw_shapes() -> PictureSet:
    """All pictures of all pairs, always the same ones."""
    pictures, pixels = [], []
    for colour, shape, _ in pairs():
        dice = Random(f"{colour} {shape}")  # noqa: S311  (a reproducible draw, no secret)
        for _ in range(PICTURES):
            pictures.append(Picture(label(colour, shape), (colour, shape), "shapes", ARTIST))
            pixels.append(_draw(shape, colour, dice))
    return PictureSet(tuple(pictures), np.stack(pixels))


def _draw(shape: str, colour: str, dice: Random) -> NDArray[np.uint8]:
    """(32, 32, 3): the size, place, angle and shade of the shape vary, and so does the light ground."""
    size, angle = dice.uniform(8, 13), math.radians(dice.uniform(-25, 25))
    x, y = (SIDE / 2 + dice.uniform(-1, 1) * (SIDE / 2 - size) for _ in range(2))

    def placed(points: list[Point]) -> list[Point]:
        turned = [
            (p * math.cos(angle) - q * math.sin(angle), p * math.sin(angle) + q * math.cos(angle)) for p, q in points
        ]
        return [((x + size * p) * _OVERSAMPLE, (y + size * q) * _OVERSAMPLE) for p, q in turned]

    filled, cut = SHAPES[shape]
    mask = Image.new("L", (SIDE * _OVERSAMPLE, SIDE * _OVERSAMPLE))
    pen = ImageDraw.Draw(mask)
    pen.polygon(placed(filled), fill=255)
    if cut:
        pen.polygon(placed(cut), fill=0)
    ground = tuple(dice.randint(225, 255) for _ in range(3))
    shade = tuple(min(255, max(0, level + dice.randint(-_JITTER, _JITTER))) for level in COLOURS[colour])
    drawing = Image.composite(Image.new("RGB", mask.size, shade), Image.new("RGB", mask.size, ground), mask)
    return np.asarray(drawing.resize((SIDE, SIDE), Image.Resampling.BOX))
