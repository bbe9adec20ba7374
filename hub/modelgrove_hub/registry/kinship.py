"""Whether two checkpoints grew from the same weights, told by the values that ingest sampled.

Every tensor is sampled at the same places in every model (`store.sketch`). Fine-tuning, merging and rounding move
weights little, so samples of relatives correlate; independently trained networks of one architecture start from other
random numbers, and theirs do not. What all of them share is left out: only matrices count, as norms are near one
everywhere, and each without its mean.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
from numpy.typing import NDArray
from sqlmodel import Session, col, select

from modelgrove_hub.formats.adapter_keys import module_of
from modelgrove_hub.formats.naming import container_names
from modelgrove_hub.store.blobs import BlobStore
from modelgrove_hub.store.manifest import FileScan, TensorRow
from modelgrove_hub.tables import Model, Revision, RevisionFile

RELATED = 0.5
"""Correlation from which on two checkpoints are of one tree (decision 0008)."""
UNRELATED = 0.2
"""Correlation below which they are certainly not: between the two, other members of the tree are asked."""
FEWEST = 128
"""Samples of both that decide: fewer may correlate by chance."""
_TELLING = 8
"""Distinct samples without which a matrix says nothing (a constant, a mask)."""

Samples = Mapping[tuple[str, int], NDArray[np.float32]]
"""Samples of a checkpoint's matrices, centred, of length one, by canonical name and number of elements."""


@dataclass(frozen=True)
class Weights:
    """What ingest sampled of a checkpoint."""

    samples: Samples

    def correlation(self, other: Weights) -> float | None:
        """The mean correlation of the matrices that both have, by their numbers of elements; None for too few.

        Where names say nothing (each file has its own), matrices of one size are paired by their samples: of
        independent networks with dozens of them, the best pairs correlate at 0.3 by chance.
        """
        pairs = [(mine, other.samples[key], key[1]) for key, mine in self.samples.items() if key in other.samples]
        if 2 * len(pairs) < min(len(self.samples), len(other.samples)):
            pairs = _nearest(self.samples, other.samples)
        if sum(len(samples) for samples, *_ in pairs) < FEWEST:
            return None
        total = sum(size for *_, size in pairs)
        return float(sum(float(a @ b) * size for a, b, size in pairs) / total)


def read_weights(session: Session, store: BlobStore, model: Model, revision: Revision) -> Weights:
    """The samples of the network that gives the model its family: text encoders and such may be everybody's.

    Raises:
        NotFoundError, CorruptFileError, StorageError: a manifest cannot be read.
    """
    query = select(RevisionFile.path, RevisionFile.manifest).where(
        RevisionFile.revision_id == revision.id, col(RevisionFile.manifest).is_not(None)
    )
    files = tuple(sorted((path, str(manifest)) for path, manifest in session.exec(query)))
    parts = revision.summary.get("parts", {})
    own = tuple(sorted(part for part, family in parts.items() if family == model.family))
    return _read(store, files, own)


@lru_cache(maxsize=64)
def _read(store: BlobStore, files: tuple[tuple[str, str], ...], parts: tuple[str, ...]) -> Weights:
    rows = [
        (path, row) for path, manifest in files for row in FileScan.from_json(store.path(manifest).read_bytes()).tensors
    ]
    own = [(path, row) for path, row in rows if container_names().place_of(path, row.name) in parts] or rows
    return weights_of(row for _, row in own)


def weights_of(rows: Iterable[TensorRow]) -> Weights:
    """The samples of the matrices among the tensors of a network."""
    found: dict[tuple[str, int], NDArray[np.float32]] = {}
    for row in rows:
        samples = _samples(row)
        if samples is not None:
            found.setdefault((module_of(row.name), prod(row.shape)), samples)
    return Weights(found)


def _samples(row: TensorRow) -> NDArray[np.float32] | None:
    if len(row.shape) < 2 or not row.samples:
        return None
    values = np.nan_to_num(row.sketch, posinf=0, neginf=0)
    centred = values - values.mean()
    length = float(np.linalg.norm(centred))
    return centred / np.float32(length) if len(np.unique(values)) >= _TELLING and length > 0 else None


def _nearest(mine: Samples, theirs: Samples) -> list[tuple[NDArray[np.float32], NDArray[np.float32], int]]:
    """Pairs of matrices of one size, the most alike first; each is used once."""
    pairs = []
    ours, others = _by_size(mine), _by_size(theirs)
    for size in ours.keys() & others.keys():
        left, right = np.stack(ours[size]), np.stack(others[size])
        alike = left @ right.T
        for _ in range(min(alike.shape)):
            row, column = np.unravel_index(int(alike.argmax()), alike.shape)
            pairs.append((left[row], right[column], size))
            alike[row, :] = alike[:, column] = -2
    return pairs


def _by_size(samples: Samples) -> dict[int, list[NDArray[np.float32]]]:
    sizes: dict[int, list[NDArray[np.float32]]] = defaultdict(list)
    for (_, size), values in samples.items():
        sizes[size].append(values)
    return sizes
