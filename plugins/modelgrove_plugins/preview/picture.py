"""Grids of pictures, and PNG files that carry the recipe they were made by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from modelgrove_hub.errors import DataError

RECIPE = "modelgrove"
"""Keyword of the PNG text chunk."""
_GAP = 4
_WANTED_SIDE = 128


def enlarge(picture: Image.Image, scale: int) -> Image.Image:
    """Each pixel becomes scale × scale; 0 brings a small picture to about 128 pixels."""
    scale = scale or max(1, round(_WANTED_SIDE / max(picture.size)))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def arrange(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """One picture of all, in rows, with a narrow white gap between."""
    width, height = rows[0][0].size
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, len(rows) * (height + _GAP) - _GAP), "white")
    for line, row in enumerate(rows):
        for column, picture in enumerate(row):
            sheet.paste(picture, (column * (width + _GAP), line * (height + _GAP)))
    return sheet


def save(picture: Image.Image, path: Path, recipe: Mapping[str, Any]) -> None:
    """Write a PNG with its recipe as JSON in a text chunk; the same input gives the same bytes."""
    info = PngInfo()
    info.add_itxt(RECIPE, json.dumps(recipe, sort_keys=True, ensure_ascii=False))
    picture.save(path, "PNG", pnginfo=info)


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe of a PNG that `save` wrote.

    Raises:
        DataError: the picture has none.
    """
    with Image.open(path, formats=("PNG",)) as picture:
        picture.load()
        text = getattr(picture, "text", {}).get(RECIPE)
    if text is None:
        raise DataError(f"{path.name}: no modelgrove recipe in this PNG")
    recipe: dict[str, Any] = json.loads(text)
    return recipe
