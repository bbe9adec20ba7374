"""Real pictures with captions, as trainers keep them: beside NAME.png stands NAME.txt."""

from __future__ import annotations

import hashlib
from pathlib import Path

from modelgrove_hub.contracts import Picture
from modelgrove_hub.errors import DataError, NotFoundError, UsageError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
_MAX_CAPTION = 1 << 16
_MAX_PIXELS = 1 << 26


def read_pictures(folder: Path, *, captioned: bool = True) -> list[Picture]:
    """All pictures of a folder by name; of files with the same bytes only the first.

    Without `captioned` a picture needs no caption, and has an empty one then.

    Raises:
        NotFoundError: there is no such folder.
        UsageError: it holds no pictures.
        DataError: a picture is broken, too large or has no caption; the message names the file.
    """
    if not folder.is_dir():
        raise NotFoundError(f"{folder}: no such folder of pictures")
    found: dict[str, Picture] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            found.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), _read(path, captioned=captioned))
    if not found:
        raise UsageError(
            f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))}), each with its caption in NAME.txt"
        )
    return list(found.values())


def _read(path: Path, *, captioned: bool) -> Picture:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise DataError(
                    f"{path} has {image.width} × {image.height} pixels, more than {_MAX_PIXELS:,}: shrink it"
                )
            pixels = ImageOps.exif_transpose(image).convert("RGB")  # cameras write how they were held
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is no picture: {error}") from error
    text = path.with_suffix(".txt")
    if not captioned and not text.exists():
        return Picture(path.name, "", pixels)
    if not text.is_file():
        raise DataError(f"{path} has no caption: write what it shows to {text.name} beside it")
    with text.open("rb") as file:
        caption = file.read(_MAX_CAPTION).decode("utf-8", "replace").strip()
    return Picture(path.name, caption, pixels)
