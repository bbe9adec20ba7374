"""What a model's own texts claim: title, trigger words, tags, licence, base. Claims, not findings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from modelgrove_hub.errors import DataError
from modelgrove_hub.formats.listing import Listing
from modelgrove_hub.formats.patterns import any_of
from modelgrove_hub.formats.shared_basis import columns_from
from modelgrove_hub.formats.signature import load_signatures
from modelgrove_hub.formats.style_tokens import museum_from
from modelgrove_hub.formats.texts import readable

TOP_TAGS = 20
_MODELSPEC = (
    "title",
    "description",
    "license",
    "architecture",
    "author",
    "date",
    "tags",
    "merged_from",
    "prediction_type",
)
_TRIGGERS = ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_words", "instance_prompt", "activation text")
_KOHYA = ("ss_output_name", "ss_sd_model_name", "ss_base_model_version", "ss_network_module", "ss_training_comment")
_BASES = ("modelspec.base_model", "base_model", "ss_base_model_version", "modelspec.architecture", "ss_sd_model_name")


def read_claims(listing: Listing) -> dict[str, Any]:
    """The texts worth showing, shortened: title, description, trigger_words, tags (most frequent first), …"""
    metadata = listing.metadata
    claims: dict[str, Any] = {
        key: text for key in _MODELSPEC if (text := _short(metadata.get(f"modelspec.{key}") or metadata.get(key)))
    }
    claims |= {key: text for key in _KOHYA if (text := _short(metadata.get(key)))}
    if triggers := [text for key in _TRIGGERS if (text := _short(metadata.get(key)))]:
        claims["trigger_words"] = triggers
    if tags := _frequent_tags(metadata.get("ss_tag_frequency", "")):
        claims["frequent_tags"] = tags
    with suppress(DataError):  # `basis check` says what is wrong with it
        if columns := columns_from(metadata, "a model"):
            claims["basis"] = asdict(columns)
    with suppress(DataError):  # a preview says what is wrong with it
        if museum := museum_from(metadata, "a model"):
            claims["style_tokens"] = [f"<{style.token}>" for style in museum.styles]
    return claims


def declared_base(listing: Listing) -> str | None:
    """The base that the card, the adapter config or the metadata names, in this order."""
    config = listing.configs.get("adapter_config.json", {})
    candidates: list[Any] = [listing.card.base, config.get("base_model_name_or_path")]
    candidates += [listing.metadata.get(key) for key in _BASES]
    return next((text for candidate in candidates if (text := _short(candidate))), None)


def declared_licence(listing: Listing) -> str | None:
    """The licence that the card or the metadata names."""
    return listing.card.licence or _short(listing.metadata.get("modelspec.license") or listing.metadata.get("license"))


def declared_families(claim: str) -> list[str]:
    """Families that trainers and cards mean by this name of a base."""
    text = claim.lower()
    return [s.name for s in load_signatures() if s.declared and any_of(s.declared).fullmatch(text)]


def _short(value: object) -> str | None:
    text = readable(value) if isinstance(value, str) else ""
    return text if text not in ("", "None", "null") else None


def _frequent_tags(raw: str) -> list[str]:
    """The most frequent tags of ss_tag_frequency: {data set: {tag: count}}."""
    try:
        parsed = json.loads(raw) if raw else {}
    except (ValueError, RecursionError):
        return []
    counts: Counter[str] = Counter()
    for tag, count in _tag_counts(parsed):
        counts[readable(tag, 100)] += count
    return [tag for tag, _ in counts.most_common(TOP_TAGS) if tag]


def _tag_counts(parsed: object) -> Iterator[tuple[str, int]]:
    if not isinstance(parsed, Mapping):
        return
    for tags in parsed.values():
        if isinstance(tags, Mapping):
            yield from ((tag, n) for tag, n in tags.items() if isinstance(tag, str) and type(n) is int)
