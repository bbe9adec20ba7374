"""Read a model card: README.md, or the .md beside a weight file, with its YAML front matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from modelgrove_hub.formats.texts import readable

MAX_CARD = 1 << 20
MAX_FRONT = 1 << 17
"""Characters of front matter: the parser needs a second for 50,000."""
MAX_FIELD = 200
MAX_TAGS = 100
_FENCE = "---\n"


class _PlainLoader(yaml.BaseLoader):
    """Every scalar is a text; no tags, and no aliases, which could make a small file a huge one."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """One node of the document."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        node = super().compose_node(parent, index)
        if node is not None and node.tag.removeprefix("tag:yaml.org,2002:") not in ("str", "seq", "map"):
            raise yaml.YAMLError("a tag")
        return node


@dataclass(frozen=True)
class Card:
    """What the card says: its text, and the usual fields of its front matter."""

    text: str = ""
    licence: str | None = None
    base: str | None = None
    tags: tuple[str, ...] = ()
    prompt: str | None = None
    """`instance_prompt`: what the model is asked with for what it was trained on."""


def read_card(files: Mapping[str, Path]) -> Card:
    """The card among a model's files, or an empty one. Broken front matter counts as text."""
    name = next((path for path in sorted(files) if path == "README.md" or path.endswith(".md")), None)
    if name is None:
        return Card()
    fields, body = split_card(_text_of(files[name]))
    tags = fields.get("tags")
    return Card(
        text=body.strip(),
        licence=_text(fields.get("license")),
        base=_text(fields.get("base_model")),
        tags=tuple(shown for tag in tags[:MAX_TAGS] if (shown := _text(tag))) if isinstance(tags, list) else (),
        prompt=_text(fields.get("instance_prompt")),
    )


def front_matter(card: Path) -> dict[str, Any]:
    """All fields of the front matter of the card in a file, as `split_card`.

    Raises:
        OSError: it cannot be read.
    """
    return split_card(_text_of(card))[0]


def _text_of(card: Path) -> str:
    with card.open("rb") as file:
        return file.read(MAX_CARD).decode("utf-8", "replace").replace("\0", "")


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """The fields of a card's front matter, every scalar a text, and the text below; no fields where it is broken."""
    text = text.replace("\r\n", "\n")
    if not text.startswith(_FENCE) or (end := text.find("\n" + _FENCE, 3)) < 0:
        return {}, text
    if end > MAX_FRONT:
        return {}, text
    try:
        fields = yaml.load(text[len(_FENCE) : end + 1], _PlainLoader)  # noqa: S506  (makes texts, lists and dicts only)
    except (yaml.YAMLError, RecursionError):
        return {}, text
    return (fields, text[end + 1 + len(_FENCE) :]) if isinstance(fields, dict) else ({}, text)


def _text(value: object) -> str | None:
    # Cards name one base or a list of them; the first is the parent.
    first = value[0] if isinstance(value, list) and value else value
    shown = readable(first, MAX_FIELD) if isinstance(first, str) else ""
    return shown if shown not in ("", "null", "~") else None
