"""What other programs wrote beside a weight file: read as text, where the card says nothing; never followed or fetched.

Civitai Helper writes `.civitai.info`, StabilityMatrix `.cm-info.json`, Lora Manager `.metadata.json`, A1111 `.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

from modelgrove_hub.formats.card import MAX_FIELD, MAX_TAGS, Card
from modelgrove_hub.formats.texts import readable

ENDINGS = (".civitai.info", ".metadata.json", ".cm-info.json", ".json")
"""The one that says most first."""
_NOT_OURS = ("config.json", "index.json")
_MAX_BYTES = 1 << 20
_MAX_TEXT = 1 << 16
_TAGS = (("tags",), ("model", "tags"), ("Tags",), ("civitai", "model", "tags"))
_WORDS = (("trainedWords",), ("civitai", "trainedWords"), ("TrainedWords",), ("activation text",))
_TEXTS = (("description",), ("model", "description"), ("modelDescription",), ("ModelDescription",), ("notes",))
_LICENCES = (("license",), ("model", "license"))
_MARKUP = re.compile(r"<[^<>]{0,2000}>")


def add_sidecars(card: Card, files: Mapping[str, Path]) -> tuple[Card, dict[str, str]]:
    """The card with what it lacks taken from the side-cars, and which file each such fact is from."""
    origin: dict[str, str] = {}
    for name, content in _read(files):
        said: dict[str, Any] = {
            "text": _text(content, _TEXTS), "tags": _list(content, _TAGS), "prompt": _prompt(content),
            "licence": _line(_first(content, _LICENCES)),
        }  # fmt: skip
        for field, value in said.items():
            if value and not getattr(card, field):
                card = replace(card, **{field: value})
                origin[field] = name
    return card, origin


def _read(files: Mapping[str, Path]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for ending in ENDINGS:
        for name in sorted(files):
            longer = any(name.endswith(other) for other in ENDINGS if len(other) > len(ending))
            if not name.endswith(ending) or longer or "/" in name or name.endswith(_NOT_OURS):
                continue
            try:
                with files[name].open("rb") as file:
                    raw = file.read(_MAX_BYTES + 1)
                content = json.loads(raw) if len(raw) <= _MAX_BYTES else None
            except (OSError, ValueError, RecursionError):
                continue
            if isinstance(content, dict):
                yield name, content


def _first(content: Mapping[str, Any], places: Sequence[tuple[str, ...]]) -> Any:
    for place in places:
        value: Any = content
        for step in place:
            value = value.get(step) if isinstance(value, dict) else None
        if value:
            return value
    return None


def _line(value: Any) -> str | None:
    return (readable(value, MAX_FIELD) or None) if isinstance(value, str) else None


def _list(content: Mapping[str, Any], places: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    value = _first(content, places)
    return tuple(tag for one in value[:MAX_TAGS] if (tag := _line(one))) if isinstance(value, list) else ()


def _prompt(content: Mapping[str, Any]) -> str | None:
    value = _first(content, _WORDS)
    words = value[:MAX_TAGS] if isinstance(value, list) else [value]
    return _line(", ".join(word for word in words if isinstance(word, str)))


def _text(content: Mapping[str, Any], places: Sequence[tuple[str, ...]]) -> str:
    value = _first(content, places)
    if not isinstance(value, str):
        return ""
    return unescape(_MARKUP.sub(" ", value[:_MAX_TEXT])).replace("\0", "").strip()
