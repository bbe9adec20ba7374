"""Real captioned pictures for the zoo: emoji drawn by three artists, from npm packages.

The npm packages carry SVG drawings (`@iconify-json/fluent-emoji-flat`, MIT;
`@iconify-json/noto`, Apache-2.0; `@iconify-json/twemoji`, CC-BY 4.0) and
`emojibase-data` (MIT) their captions and tags. `render` draws them once; the result is
small enough to ship, so growing the zoo needs neither npm nor a renderer.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ARTISTS = {
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
}
CAPTIONS = "emojibase-data@17.0.0"
GROUPS = ("smileys", "people", "component", "animals", "food", "travel", "activities", "objects", "symbols", "flags")
SIDE = 32
_OVERSAMPLE = 4
_SHEET_COLUMNS = 64


@dataclass(frozen=True)
class Picture:
    """One drawing: what it shows, who drew it, where its pixels are in the sheet."""

    label: str
    tags: tuple[str, ...]
    group: str
    artist: str

    @property
    def caption(self) -> str:
        """The training caption: artist and label, as in "noto red apple"."""
        return f"{self.artist} {self.label}"


@dataclass(frozen=True)
class PictureSet:
    """Drawings and their pixels: `pixels` is (n, 32, 32, 3) uint8, RGB on white."""

    pictures: tuple[Picture, ...]
    pixels: NDArray[np.uint8]

    @classmethod
    def load(cls, folder: Path) -> PictureSet:
        """Read `pictures.json` and `pictures.png` (a sheet of 64 columns) from `folder`."""
        rows = json.loads((folder / "pictures.json").read_text("utf-8"))
        pictures = tuple(Picture(r["label"], tuple(r["tags"]), r["group"], r["artist"]) for r in rows)
        with Image.open(folder / "pictures.png") as image:
            sheet = np.asarray(image.convert("RGB"))
        lines = sheet.shape[0] // SIDE
        tiles = sheet.reshape(lines, SIDE, _SHEET_COLUMNS, SIDE, 3).transpose(0, 2, 1, 3, 4)
        return cls(pictures, tiles.reshape(-1, SIDE, SIDE, 3)[: len(pictures)].copy())

    def __add__(self, other: PictureSet) -> PictureSet:
        return PictureSet(self.pictures + other.pictures, np.concatenate([self.pixels, other.pixels]))

    def save(self, folder: Path) -> None:
        """Write the set as one PNG sheet and one JSON list."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = -(-len(self.pictures) // _SHEET_COLUMNS)
        tiles = np.full((lines * _SHEET_COLUMNS, SIDE, SIDE, 3), 255, np.uint8)
        tiles[: len(self.pictures)] = self.pixels
        sheet = tiles.reshape(lines, _SHEET_COLUMNS, SIDE, SIDE, 3).transpose(0, 2, 1, 3, 4)
        Image.fromarray(sheet.reshape(lines * SIDE, _SHEET_COLUMNS * SIDE, 3)).save(
            folder / "pictures.png", optimize=True
        )
        rows = [{"label": p.label, "tags": p.tags, "group": p.group, "artist": p.artist} for p in self.pictures]
        (folder / "pictures.json").write_text(json.dumps(rows, ensure_ascii=False, separators=(",", ":")), "utf-8")


def render(packages: dict[str, Path], captions: Path) -> PictureSet:
    """Draw every captioned emoji of every artist at 32×32.

    `packages` maps an artist to its unpacked npm package, `captions` is the unpacked
    `emojibase-data`. Skin tones, hair styles and keycaps are left out.
    """
    import resvg_py  # only here: the shipped sheet needs no renderer

    records = json.loads((captions / "en/data.json").read_text("utf-8"))
    pictures: list[Picture] = []
    pixels: list[NDArray[np.uint8]] = []
    for artist, package in packages.items():
        icons = json.loads((package / "icons.json").read_text("utf-8"))
        for record in records:
            icon = icons["icons"].get(_slug(record["label"]))
            if icon is None or record.get("group") in (None, 2):
                continue
            png = resvg_py.svg_to_bytes(svg_string=_svg(icon, icons))
            pictures.append(Picture(record["label"], tuple(record.get("tags", ())), GROUPS[record["group"]], artist))
            pixels.append(_shrink(bytes(png)))
    return PictureSet(tuple(pictures), np.stack(pixels))


def fetch(folder: Path) -> tuple[dict[str, Path], Path]:
    """Unpack the npm packages into `folder` (needs the `npm` command); returns `render`'s arguments."""
    return {artist: _unpack(name, folder) for artist, name in ARTISTS.items()}, _unpack(CAPTIONS, folder)


def _unpack(package: str, folder: Path) -> Path:
    target = folder / re.sub(r"[^a-z0-9.]+", "-", package.lower()).strip("-")
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            subprocess.run(["npm", "pack", "--silent", package], cwd=work, check=True, stdout=subprocess.DEVNULL)
            with tarfile.open(next(Path(work).glob("*.tgz"))) as archive:
                archive.extractall(Path(work) / "out", filter="data")
            (Path(work) / "out/package").rename(target)
    return target


def _slug(label: str) -> str:
    text = label.lower().replace("’", "").replace("'", "").replace("“", "").replace("”", "").replace("&", "and")
    for accented, plain in zip("éãçôíåñ", "eacoian", strict=True):
        text = text.replace(accented, plain)
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def _svg(icon: dict[str, Any], icons: dict[str, Any]) -> str:
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    left, top = icon.get("left", 0), icon.get("top", 0)
    size = SIDE * _OVERSAMPLE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def _shrink(png: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(png)) as image:
        drawing = image.convert("RGBA")
    canvas = Image.new("RGBA", drawing.size, "white")
    canvas.alpha_composite(drawing)
    return np.asarray(canvas.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX))
