"""Small grey pictures of letters and digits: letters are drawn in a font, digits are real scans.

Letters are Pillow's built-in font (Aileron) in several sizes and weights, turned, sheared, stretched and moved at
random, then shrunk to 8×8. Digits are the 1,797 scans of handwriting that scikit-learn carries (E. Alpaydin & C.
Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998): 8×8 as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from torch import Tensor

SIDE = 8
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghijmnqrt"
"""Small letters that look like large ones are left out."""
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_CANVAS = 64
_SIZES = range(30, 46, 3)
_STROKES = 4


@dataclass(frozen=True)
class Glyphs:
    """Pictures `pixels` (n, 64) in [0, 1], float32, and what they show, `classes` (n,) from 0."""

    pixels: Tensor
    classes: Tensor


def draw_letters(count: int, seed: int) -> Glyphs:
    """`count` letters drawn at random."""
    dice = np.random.default_rng(seed)
    fonts = [ImageFont.load_default(size) for size in _SIZES]
    classes = dice.integers(len(LETTERS), size=count)
    drawn = [_draw(LETTERS[letter], fonts[dice.integers(len(fonts))], dice) for letter in classes]
    return Glyphs(torch.from_numpy(np.stack(drawn)), torch.from_numpy(classes))


def scanned_digits() -> Glyphs:
    """The 1,797 scans of digits."""
    found = load_digits()
    return Glyphs(torch.from_numpy(found.data.astype(np.float32) / 16), torch.from_numpy(found.target.astype(np.int64)))


def _draw(letter: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, dice: np.random.Generator) -> np.ndarray:
    middle = np.full(2, _CANVAS / 2)
    image = Image.new("L", (_CANVAS, _CANVAS))
    ImageDraw.Draw(image).text(tuple(middle), letter, 255, font, anchor="mm", stroke_width=int(dice.integers(_STROKES)))
    angle, shear = dice.normal(0, (0.15, 0.2))
    turned = np.array([[np.cos(angle), -np.sin(angle) + shear], [np.sin(angle), np.cos(angle)]])
    matrix = np.diag(np.exp(dice.normal(0, 0.12, 2))) @ turned
    offset = middle - matrix @ (middle + dice.normal(0, 2.5, 2))
    data = (*matrix[0], offset[0], *matrix[1], offset[1])
    moved = image.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    small = moved.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.float32).ravel() / 255
