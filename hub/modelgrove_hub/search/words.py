"""Words for what models show: things, places, people, shapes, colours and styles, shipped as text."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from modelgrove_hub.search.kept import kept_vectors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from modelgrove_hub.search.background import Background

SHOWN = 3


@cache
def words() -> tuple[str, ...]:
    """The words, one a line in `words.txt`, each once."""
    return tuple((files("modelgrove_hub.search") / "words.txt").read_text("utf-8").splitlines())


def describe(background: Background, vectors: NDArray[np.float32], folder: Path | None = None) -> list[list[str]]:
    """The three words that fit each of `vectors` (n, d) best, the best first; their vectors are kept in `folder`."""
    import numpy as np

    known, _ = kept_vectors("words", words(), folder)
    scores = background.scores(vectors, background.centre(known))
    return [[words()[i] for i in row] for row in np.argsort(-scores, axis=1, kind="stable")[:, :SHOWN].tolist()]
