"""Scores of different experts on one scale.

A model's score says how far it stands above what unrelated prompts get from the same model. How high the best of
several hundred models stands for an unrelated prompt depends on the expert: one that knows its labels better is
louder, and of more models one is nearer by chance. Both are measured on the background prompts: with m the mean and s
the standard deviation, over the prompts, of the best score among the expert's models, (score − m) / s means the same
everywhere, how far something stands out from what any text gets here at best.

The vectors of one expert also lean one way together, which makes its models look alike: where models are compared with
models, the mean of the expert's vectors is taken off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelgrove_hub.search.background import Background

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from modelgrove_hub.tables import Expert

    Vector = NDArray[np.float32]

_SMALLEST = 1e-3
_FEWEST = 16
"""Vectors whose mean says more about the expert than about them."""


def level_of(background: Background, vectors: Sequence[bytes]) -> dict[str, Any]:
    """m and s of an expert's models, by their vectors as rows keep them, and the mean of many; {} for one."""
    import numpy as np

    if len(vectors) < 2:
        return {}
    placed = np.stack([np.frombuffer(vector, "<f4") for vector in vectors])
    best = background.scores(placed, background.centre(background.vectors)).max(axis=0)
    level = {"mean": round(float(best.mean()), 4), "spread": round(max(float(best.std()), _SMALLEST), 4)}
    if len(vectors) < _FEWEST:
        return {"level": level}
    return {"level": level, "centre": [round(number, 4) for number in placed.mean(axis=0).tolist()]}


def centred(vector: Vector, expert: Expert | None) -> Vector:
    """One of the expert's vectors less what all have in common, of length one; as it is where that is not known."""
    import numpy as np

    centre = (expert.calibration if expert else {}).get("centre", ())
    if len(centre) != len(vector):
        return vector
    own: Vector = vector - np.array(centre, np.float32)
    return own / np.float32(max(float(np.linalg.norm(own)), 1e-12))


def levelled(score: float, expert: Expert | None) -> float:
    """A score, or a threshold, of one of the expert's models on the common scale; as it is without a level."""
    level: Mapping[str, Any] = (expert.calibration if expert else {}).get("level", {})
    return (score - float(level.get("mean", 0.0))) / float(level.get("spread", 1.0))
