"""Read a model card: README.md, or the .md beside a weight file, with its YAML front matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MAX_CARD = 1 << 20
_FENCE = "---\n"


@dataclass(frozen=True)
class Card:
    """What the card says: its text, and the usual fields of its front matter."""

    text: str = ""
    licence: str | None = None
    base: str | None = None
    tags: tuple[str, ...] = ()


def read_card(files: Mapping[str, Path]) -> Card:
    """The card among a model's files, or an empty one. Broken front matter counts as text."""
    name = next((path for path in sorted(files) if path == "README.md" or path.endswith(".md")), None)
    if name is None:
        return Card()
    with files[name].open("rb") as file:
        text = file.read(MAX_CARD).decode("utf-8", "replace")
    fields, body = _front_matter(text)
    tags = fields.get("tags")
    return Card(
        text=body.strip(),
        licence=_text(fields.get("license")),
        base=_text(fields.get("base_model")),
        tags=tuple(tag for tag in tags if isinstance(tag, str)) if isinstance(tags, list) else (),
    )


def _front_matter(text: str) -> tuple[dict[str, Any], str]:
    text = text.replace("\r\n", "\n")
    if not text.startswith(_FENCE) or (end := text.find("\n" + _FENCE, 3)) < 0:
        return {}, text
    try:
        fields = yaml.safe_load(text[len(_FENCE) : end + 1])
    except (yaml.YAMLError, RecursionError):
        return {}, text
    return (fields, text[end + 1 + len(_FENCE) :]) if isinstance(fields, dict) else ({}, text)


def _text(value: object) -> str | None:
    # Cards name one base or a list of them; the first is the parent.
    first = value[0] if isinstance(value, list) and value else value
    return str(first) if isinstance(first, str) and first else None
