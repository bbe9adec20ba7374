"""Vectors of texts that ship with the hub: embedded once, kept in a file between runs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from modelgrove_hub.search.text import embed_texts, text_space
from modelgrove_hub.store.disk import create_temporary, publish, storage_errors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger(__name__)


def kept_vectors(name: str, texts: Sequence[str], folder: Path | None) -> tuple[NDArray[np.float32], str]:
    """Vectors (n, d) of `texts`, and a digest of texts and space; kept in `folder`, if given, as `name`-digest.npy."""
    digest = _digest(text_space(), tuple(texts))
    if folder is None:
        return embed_texts(texts), digest
    path = folder / f"{name}-{digest}.npy"
    vectors = _kept(path, len(texts), _changed(path))
    if vectors is None:
        vectors = embed_texts(texts)
        _write(path, vectors)
    return vectors, digest


@lru_cache(maxsize=16)
def _digest(space: str, texts: tuple[str, ...]) -> str:
    return hashlib.sha256("\n".join([space, *texts]).encode()).hexdigest()[:16]


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=4)
def _kept(path: Path, count: int, _changed: int) -> NDArray[np.float32] | None:
    vectors = _read(path, count)
    if vectors is not None:
        vectors.setflags(write=False)  # everybody gets the same ones
    return vectors


def _read(path: Path, count: int) -> NDArray[np.float32] | None:
    import numpy as np

    try:
        vectors = np.load(path, allow_pickle=False)
        if vectors.ndim == 2 and len(vectors) == count and vectors.dtype == np.float32:
            return np.asarray(vectors, np.float32)
        log.warning("%s does not hold %d vectors: made again", path, count)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError) as error:
        log.warning("%s cannot be read (%s): made again", path, error)
    return None


def _write(path: Path, vectors: NDArray[np.float32]) -> None:
    import numpy as np

    with storage_errors(path):
        file, temporary = create_temporary(path.parent)
        np.save(file, vectors)
        publish(file, temporary, path)
