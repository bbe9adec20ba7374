"""What an expert is fitted on: the documented models that can be read, and vectors of what is said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelgrove_analyzers.encoders.deltas import find_reference, read_model
from modelgrove_hub.contracts import Context, InputModel
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.search.cards import label_texts

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_hub.search.background import Background
    from modelgrove_kernels.lowrank import Canonical

FEWEST = 8
"""Documented models without which no expert is fitted."""


@dataclass(frozen=True)
class Documented:
    """Models of one kind with what their cards, tags and captions say they do, and why other inputs were left aside."""

    models: tuple[InputModel, ...]
    layers: tuple[Mapping[str, Canonical], ...]
    texts: tuple[tuple[str, ...], ...]
    left_aside: dict[str, str]
    reference: Mapping[str, Tensor] | None
    """What full fine-tunes are compared with, read from disk; None for adapters."""


def read_documented(context: Context, columns: int, share: float) -> Documented:
    """The inputs that are documented and readable; takes the progress from 0 to `share`.

    Raises:
        UsageError: fewer than eight of them.
        DataError: they are full fine-tunes of different networks.
    """
    aside: dict[str, str] = {}
    told = []
    for model in context.inputs:
        texts = label_texts(model.card, model.tags, model.summary.get("metadata", {}))
        if texts:
            told.append((model, texts))
        else:
            aside[model.name] = "no card, tag or caption says what it does"
    whole = [model for model, _ in told if model.adapter_type is None]
    reference = find_reference(whole, context.temp) if told and len(whole) == len(told) else None
    kept: list[tuple[InputModel, dict[str, Canonical], tuple[str, ...]]] = []
    for number, (model, texts) in enumerate(told):
        context.progress(share * number / len(told), model.name)
        try:
            kept.append((model, read_model(model, reference, columns), texts))
        except (DataError, UsageError) as error:
            aside[model.name] = str(error)
    if len(kept) < FEWEST:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(aside.items())[:3])
        raise UsageError(
            f"{len(kept)} of {len(context.inputs)} models can be read and say what they do, {FEWEST} are needed"
            + (f" ({why})" if why else "")
        )
    models, layers, labels = zip(*kept, strict=True)
    return Documented(models, layers, labels, aside, reference)


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
