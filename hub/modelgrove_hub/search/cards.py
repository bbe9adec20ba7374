"""What a model's card, tags and training metadata say it does: labels for experts, text for search.

All of it was written by strangers: lengths are bounded and nothing is trusted to be well formed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

LONGEST_LABEL = 200
_LONGEST_CARD = 20_000
_LONGEST_SEARCHED = 1000
_FEWEST_LETTERS = 3
_MOST_TAGS = 12

_BLOCKS = re.compile(
    r"```.*?(?:```|\Z)"  # code
    r"|^[ \t]*(?:#{1,6}|\||[-=*_]{3,})[^\n]*$",  # headings, tables, rules
    re.DOTALL | re.MULTILINE,
)
_INLINE = re.compile(r"<!--.*?(?:-->|\Z)|<[^<>\n]{1,500}>|!\[[^\]\n]{0,500}\](?:\([^)\n]{0,1000}\))?", re.DOTALL)
_LINK = re.compile(r"\[([^\]\n]{1,500})\]\([^)\n]{0,1000}\)")
_DECORATION = re.compile(r"[*_`>#]+|^\s*[-+]\s+", re.MULTILINE)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
_TRIGGER = re.compile(r"\byou should use (.{1,200}?) to trigger\b", re.IGNORECASE)
# What training scripts write into every card, whatever the model does.
_BOILERPLATE = re.compile(
    r"\b(?:weights for|weights were|fine-?tuned (?:on|from|using)|adapt(?:at)?ion weights|this repository|model card"
    r"|you can find|was trained (?:on|with|using)|was enabled|special vae|trigger the image|more information needed"
    r"|automatically generated|base model)\b",
    re.IGNORECASE,
)
_TECHNICAL_TAGS = frozenset((files("modelgrove_hub.search") / "technical_tags.txt").read_text("utf-8").split())


def label_texts(card: str, tags: Sequence[str], claims: Mapping[str, Any]) -> tuple[str, ...]:
    """The short texts that say what a documented model does; empty for an undocumented one.

    The first telling sentence of the card, its tags, and the captions that the trainer counted;
    only where these are missing, trigger words and titles, which are often made-up words. `claims`
    is what recognition read from the weight file's metadata. Names are not used: too many lie.
    """
    told = (first_sentence(card), ", ".join(content_tags(tags)), ", ".join(_list(claims, "frequent_tags")[:3]))
    trigger = _TRIGGER.search(card[:_LONGEST_CARD])
    words = [trigger[1]] if trigger else []
    said = (*words, _text(claims, "description"), *_list(claims, "trigger_words"), _text(claims, "title"))
    return _shortened(told) or _shortened(said)[:1]


def search_text(card: str, tags: Sequence[str]) -> str:
    """What card search reads: the card's prose and its tags; empty for an undocumented model."""
    prose = " ".join(_prose(card).split())[:_LONGEST_SEARCHED]
    return ". ".join(text for text in (prose, ", ".join(content_tags(tags))) if _tells(text))


def first_sentence(card: str) -> str:
    """The first sentence of the card's prose that no training script wrote, or nothing."""
    sentences = (" ".join(part.split()) for part in _SENTENCE.split(_prose(card)))
    return next((part for part in sentences if _tells(part) and not _BOILERPLATE.search(part)), "")


def content_tags(tags: Sequence[str]) -> list[str]:
    """The tags that say what a model shows, not how it is made ("lora", "license:mit" …)."""
    plain = (tag.strip() for tag in tags)
    return [tag for tag in plain if ":" not in tag and _tells(tag) and tag.lower() not in _TECHNICAL_TAGS][:_MOST_TAGS]


def _prose(card: str) -> str:
    text = _INLINE.sub(" ", _BLOCKS.sub("\n\n", card[:_LONGEST_CARD]))
    return _DECORATION.sub("", _LINK.sub(r"\1", text))


def _shortened(texts: Sequence[str]) -> tuple[str, ...]:
    short = (" ".join(text.split())[:LONGEST_LABEL].strip() for text in texts)
    return tuple(dict.fromkeys(text for text in short if _tells(text)))


def _text(claims: Mapping[str, Any], name: str) -> str:
    value = claims.get(name)
    return value if isinstance(value, str) else ""


def _list(claims: Mapping[str, Any], name: str) -> list[str]:
    values = claims.get(name)
    return content_tags([value for value in values if isinstance(value, str)]) if isinstance(values, list) else []


def _tells(text: str) -> bool:
    return sum(map(str.isalpha, text)) >= _FEWEST_LETTERS
