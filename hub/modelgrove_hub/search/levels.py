"""Scores of different experts on one scale.

A model's score says how far it stands above what unrelated prompts get from the same model. How high the best of
several hundred models stands for an unrelated prompt depends on the expert: one that knows its labels better is
louder, and of more models one is nearer by chance. Both are measured on the background prompts: with m the mean and s
the standard deviation, over the prompts, of the best score among the expert's models, (score − m) / s means the same
everywhere, how far something stands out from what any text gets here at best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelgrove_hub.search.background import Background

if TYPE_CHECKING:
    from modelgrove_hub.tables import Expert

_SMALLEST = 1e-3


def level_of(background: Background, vectors: Sequence[bytes]) -> dict[str, float] | None:
    """m and s of an expert's models, by their vectors as rows keep them; None for fewer than two."""
    import numpy as np

    if len(vectors) < 2:
        return None
    placed = np.stack([np.frombuffer(vector, "<f4") for vector in vectors])
    best = background.scores(placed, background.centre(background.vectors)).max(axis=0)
    return {"mean": round(float(best.mean()), 4), "spread": round(max(float(best.std()), _SMALLEST), 4)}


def levelled(score: float, expert: Expert | None) -> float:
    """A score, or a threshold, of one of the expert's models on the common scale; as it is without a level."""
    level: Mapping[str, Any] = (expert.calibration if expert else {}).get("level", {})
    return (score - float(level.get("mean", 0.0))) / float(level.get("spread", 1.0))
