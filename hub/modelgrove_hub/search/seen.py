"""Labels that an expert was fitted on are too loud: how search makes up for it.

A model of a known label lies almost exactly on it and so near every related text; a model of something new
lies somewhere between known labels. A search for the new thing then finds its known relatives first. As
calibrated stacking does for classes (Chao et al., ECCV 2016, arXiv 1605.04253, eq. 4), models that come near
the best score are put in a new order, by their score less a share of what their own best known label gets:
those that are known to be something else go behind those that nothing known explains. A search that says what
a known label says is left as it is.

The constants were chosen on folds of the known concepts of the sample shipped with 0.1.0 (decision 0006).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from modelgrove_hub.search.background import Background

LABELS = "labels"
"""The tensor (l, d) of an expert's file with the labels that it was fitted on, centred."""
NEAR = 0.7
"""Share of the best score from which on models are put in a new order."""
SHARE = 0.5
"""Of the score with its best known label, what a model loses there."""
SAME = 0.6
"""Cosine with a known label from which on a search asks for what is known."""


def ranking_keys(
    background: Background, vectors: NDArray[np.float32], queries: NDArray[np.float32], labels: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Numbers (m, q) that order models (m, d) for one centred query, the highest first; `labels` (l, d) are known."""
    import numpy as np

    scores = background.scores(vectors, queries)
    known = (_directions(queries) @ _directions(labels).T).max(axis=1) >= SAME
    best = background.scores(vectors, labels).max(axis=1, keepdims=True)
    # Less than others lose is more: so all that are near stay before all that are not.
    near = (scores >= NEAR * scores.max(axis=0)) & ~known
    keys: NDArray[np.float32] = np.where(near, scores + SHARE * (best.max() - best), scores)
    return keys


def _directions(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    import numpy as np

    found: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
    return found
