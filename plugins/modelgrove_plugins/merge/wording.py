"""What an adapter is asked for by, so that its base can be watched or asked with it."""

from __future__ import annotations

from modelgrove_hub.contracts import InputModel
from modelgrove_hub.formats.card import read_card


def prompts_of(model: InputModel) -> tuple[str, ...]:
    """The prompt that its card names, or pictures of its trigger words, or of what its name says."""
    if prompt := read_card(model.files()).prompt:
        return (prompt,)
    claimed = model.summary.get("metadata", {}).get("trigger_words", ())
    words = claimed or [model.name.rpartition("/")[2].replace("-", " ").replace("_", " ")]
    return tuple(f"a picture of {word}" for word in words)
