"""What a model's card, tags and training metadata say it does: labels for experts, text for search.

All of it was written by strangers: lengths are bounded and nothing is trusted to be well formed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

LONGEST_LABEL = 200
_LONGEST_CARD = 20_000
_LONGEST_SEARCHED = 1000
_LONGEST_JSON = 1_000_000
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
_TECHNICAL_TAGS = frozenset(
    "adapter autotrain checkpoint controlnet diffusers diffusers-training dora dreambooth flux flux-diffusers image-to-image "
    "kohya loha lokr lora lycoris migrated model modelgrove peft pytorch safetensors sd15 sdxl stable-diffusion "
    "stable-diffusion-diffusers stable-diffusion-xl stable-diffusion-xl-diffusers template:sd-lora text-to-image text2image "
    "textual_inversion transformers weights zoo".split()
)
_METADATA = ("modelspec.trigger_phrase", "modelspec.description", "modelspec.title")


def label_texts(card: str, tags: Sequence[str], metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The short texts that say what a documented model does; empty for an undocumented one.

    In this order, as far as they are there: the first telling sentence of the card, its tags, its
    trigger words, what the trainer wrote into the weight file. Names are not used: half of them lie.
    """
    trigger = _TRIGGER.search(card[:_LONGEST_CARD])
    texts = [
        first_sentence(card),
        ", ".join(content_tags(tags)),
        trigger[1] if trigger else "",
        *(metadata.get(key, "") for key in _METADATA),
        ", ".join(_frequent_tags(metadata.get("ss_tag_frequency", ""))),
    ]
    short = (" ".join(text.split())[:LONGEST_LABEL] for text in texts)
    return tuple(dict.fromkeys(text for text in short if _tells(text)))


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


def _frequent_tags(value: str) -> list[str]:
    """The three most frequent caption tags in kohya's `ss_tag_frequency`: {folder: {tag: count}} as JSON."""
    try:
        folders = json.loads(value) if 0 < len(value) <= _LONGEST_JSON else {}
    except (ValueError, RecursionError):
        return []
    counts: dict[str, float] = {}
    for folder in folders.values() if isinstance(folders, dict) else ():
        for tag, count in folder.items() if isinstance(folder, dict) else ():
            if isinstance(count, int | float):
                counts[tag] = counts.get(tag, 0) + count
    return sorted(content_tags(list(counts)), key=lambda tag: -counts[tag])[:3]


def _tells(text: str) -> bool:
    return sum(map(str.isalpha, text)) >= _FEWEST_LETTERS
