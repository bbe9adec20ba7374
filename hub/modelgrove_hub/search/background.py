"""What a score is compared with: a few hundred generic prompts, shipped as text.

Some vectors are close to every text (hubs), and every text encoder has directions that all texts
share. Scores are therefore counted in standard deviations over these prompts, for each model:
z(model, query) = (⟨v, q⟩ − mean_b ⟨v, b⟩) / std_b ⟨v, b⟩. That is one inner product with a
centred query and a scaled vector, so an index can rank by it.

An expert answers more loudly to words it was fitted on. To say which of several texts fits a model
best, the mean of a text's ten highest scores over the tree's training models is taken off: what it
gets from its neighbours anyway (CSLS; Conneau et al., ICLR 2018, arXiv 1710.04087, eq. 6). That does
not change the order of models for one text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from modelgrove_hub.search.kept import kept_vectors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SMALLEST = 1e-6
_NEIGHBOURS = 10


@dataclass(frozen=True)
class Background:
    """Vectors (n, d) float32 of the background prompts in one text space."""

    vectors: NDArray[np.float32]
    digest: str

    @property
    def mean(self) -> NDArray[np.float32]:
        """What all texts share, (d,)."""
        mean: NDArray[np.float32] = self.vectors.mean(axis=0)
        return mean

    def centre(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """Text vectors (…, d) without what all texts share."""
        return queries - self.mean

    def scale(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Model vectors (n, d), each divided by the spread of its scores over the prompts.

        The inner product of a scaled vector with a centred query is the z-score.
        """
        spread = (vectors @ self.centre(self.vectors).T).std(axis=1, keepdims=True)
        scaled: NDArray[np.float32] = vectors / spread.clip(_SMALLEST)
        return scaled

    def scores(self, vectors: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """z-scores (m, q) of model vectors (m, d) for centred queries (q, d)."""
        return self.scale(vectors) @ queries.T

    def margins(
        self, vectors: NDArray[np.float32], queries: NDArray[np.float32], others: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Scores less what each query gets from its ten nearest of `others` (n, d): compares queries for one model."""
        import numpy as np

        highest = np.sort(self.scores(others, queries), axis=0)[-_NEIGHBOURS:]
        found: NDArray[np.float32] = self.scores(vectors, queries) - highest.mean(axis=0)
        return found


def prompts() -> list[str]:
    """The background prompts, one a line in `background.txt`."""
    return (files("modelgrove_hub.search") / "background.txt").read_text("utf-8").splitlines()


@cache
def load_background(folder: Path | None = None) -> Background:
    """The background of the default text space; its vectors are kept in `folder`, if given, between runs."""
    return Background(*kept_vectors("background", prompts(), folder))
