"""What an expert of LoRAs is fitted on: the documented ones that can be read, and vectors of what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelgrove_hub.contracts import Context
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.search.cards import label_texts

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_hub.formats.adapters import Adapter
    from modelgrove_hub.search.background import Background

FEWEST = 8
"""Documented models without which no expert is fitted."""


@dataclass(frozen=True)
class Documented:
    """LoRAs with what their cards, tags and captions say they do, and why other inputs were left aside."""

    names: tuple[str, ...]
    adapters: tuple[Adapter, ...]
    texts: tuple[tuple[str, ...], ...]
    left_aside: dict[str, str]


def read_documented(context: Context, share: float) -> Documented:
    """The inputs that are documented and readable; takes the progress from 0 to `share`.

    Raises:
        UsageError: fewer than eight of them.
    """
    from modelgrove_hub.formats.adapters import read_adapter

    kept: list[tuple[str, Adapter, tuple[str, ...]]] = []
    aside: dict[str, str] = {}
    for number, model in enumerate(context.inputs):
        context.progress(share * number / len(context.inputs), model.name)
        texts = label_texts(model.card, model.tags, model.summary.get("metadata", {}))
        if not texts:
            aside[model.name] = "no card, tag or caption says what it does"
            continue
        try:
            kept.append((model.name, read_adapter(model), texts))
        except (DataError, UsageError) as error:
            aside[model.name] = str(error)
    if len(kept) < FEWEST:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(aside.items())[:3])
        raise UsageError(
            f"{len(kept)} of {len(context.inputs)} LoRAs can be read and say what they do, {FEWEST} are needed"
            + (f" ({why})" if why else "")
        )
    names, adapters, labels = zip(*kept, strict=True)
    return Documented(names, adapters, labels, aside)


def label_vectors(texts: Sequence[Sequence[str]], background: Background) -> Tensor:
    """For each model the mean direction of its texts, less what all texts share: (n, d) of length one, float32."""
    import numpy as np
    import torch

    from modelgrove_hub.search.text import embed_texts

    counts = [len(several) for several in texts]
    vectors = background.centre(embed_texts([text for several in texts for text in several]))
    return unit(torch.from_numpy(np.add.reduceat(vectors, np.cumsum([0, *counts[:-1]]), axis=0)))


def group_alike(likeness: Tensor, threshold: float) -> list[int]:
    """A group number, from 0, for each of n things: that of the first one that it is like, by an (n, n) matrix."""
    leaders: list[int] = []
    found = []
    for thing, row in enumerate((likeness >= threshold).tolist()):
        group = next((group for group, leader in enumerate(leaders) if row[leader]), len(leaders))
        if group == len(leaders):
            leaders.append(thing)
        found.append(group)
    return found


def unit(vectors: Tensor) -> Tensor:
    """Rows of length one; rows of zeros stay."""
    scaled: Tensor = vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return scaled
