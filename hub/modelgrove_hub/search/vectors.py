"""Vectors by id, searched by inner product with FAISS: exactly while they are few, in inverted lists when many.

Inverted lists (Sivic and Zisserman, ICCV 2003) are cells around k-means centres; a search looks into the cells
nearest to the query. Vectors in cells are kept as float16: half the bytes, and search scores what it found again,
with the vectors of the database. HNSW was measured too (bench/README.md): it takes more than ten times as long to
build and twice the memory, and cannot remove.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from modelgrove_hub.errors import StorageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]
    Vectors = NDArray[np.float32]

FLAT_UP_TO = 50_000
"""Vectors up to which all are compared: some 6 ms for 384 numbers each on one thread."""
LOOKED_AT = 24_000
"""Vectors that a search in lists compares, on average: some 2.5 ms."""
SAMPLE = 40
"""Vectors a list that k-means sees: 39 is what FAISS asks for at least."""
_ROUNDS = 8
_ENOUGH = 8
"""How many times `limit` vectors it compares at least."""


def lists_for(count: int, now: int | None = None) -> int:
    """Into how many inverted lists `count` vectors belong; 0 is none, a flat index.

    About 2√n lists, a power of two. An index that has `now` lists keeps them until they are four times too few or too
    many, and one without gets lists at twice the size at which one with lists loses them: so it is not rebuilt at
    every step across a border.
    """
    if count <= (FLAT_UP_TO // 2 if now else FLAT_UP_TO):
        return 0
    wanted: int = 2 ** round(math.log2(2 * math.sqrt(count)))
    return now if now and now / 4 < wanted < now * 4 else wanted


class VectorIndex:
    """Vectors by id; not safe to change while it is searched, so change a `copy`."""

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def empty(cls, width: int, lists: int = 0, sample: Vectors | None = None) -> VectorIndex:
        """An index without vectors, for vectors of `width` numbers; `lists` are placed by `sample` (m, width)."""
        faiss = load_faiss()
        if not lists:
            return cls(faiss.IndexIDMap2(faiss.IndexFlatIP(width)))
        index = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(width), width, lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        index.cp.niter, index.cp.max_points_per_centroid, index.cp.min_points_per_centroid = _ROUNDS, SAMPLE, 1
        index.train(sample)
        return cls(index)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def lists(self) -> int:
        """Inverted lists; 0 for a flat index."""
        return int(getattr(self._index, "nlist", 0))

    @property
    def ids(self) -> Ids:
        """The ids held, (n,), ascending."""
        import numpy as np

        faiss = load_faiss()
        if not self.lists:
            return np.sort(faiss.vector_to_array(self._index.id_map))
        lists = self._index.invlists
        sizes = [lists.list_size(i) for i in range(self.lists)]
        held = [faiss.rev_swig_ptr(lists.get_ids(i), size) for i, size in enumerate(sizes) if size]
        return np.sort(np.concatenate([np.empty(0, np.int64), *held]))

    def search(self, query: Vectors, limit: int, allowed: Sequence[int] | None = None) -> list[tuple[int, float]]:
        """The `limit` best (id, inner product) for `query` (d,), best first; only `allowed` ids if given.

        From inverted lists inner products are those of float16 vectors, and one of the best may be missed, but none of
        few that are allowed: then all lists are looked into, for the allowed ones may lie in far ones.
        """
        import numpy as np

        limit = min(limit, len(self) if allowed is None else len(allowed), len(self))
        if limit <= 0:
            return []
        faiss, options = load_faiss(), {}
        if allowed is not None:
            options["sel"] = faiss.IDSelectorBitmap(_bitmap(np.asarray(allowed, np.int64)))
        if self.lists:
            share = 1 if allowed is not None else min(1, max(LOOKED_AT, _ENOUGH * limit) / len(self))
            options["nprobe"] = math.ceil(share * self.lists)
        parameters = faiss.SearchParametersIVF(**options) if self.lists else faiss.SearchParameters(**options)
        scores, ids = self._index.search(np.ascontiguousarray(query[None], np.float32), limit, params=parameters)
        return [(int(i), float(s)) for i, s in zip(ids[0], scores[0], strict=True) if i >= 0]

    def replace(self, ids: Ids, vectors: Vectors) -> None:
        """Add vectors (n, d) under `ids`; vectors that had these ids go."""
        self.remove(ids)
        self._index.add_with_ids(vectors, ids)

    def remove(self, ids: Ids) -> None:
        """Forget the vectors of `ids`; ids that are not held do not matter."""
        if len(self) and len(ids):
            self._index.remove_ids(ids)

    def copy(self) -> VectorIndex:
        """Another index with the same vectors."""
        return VectorIndex(load_faiss().clone_index(self._index))

    def write(self, write: Callable[[bytes], int]) -> None:
        """Hand FAISS's bytes to `write`, piece by piece."""
        faiss = load_faiss()
        faiss.write_index(self._index, faiss.PyCallbackIOWriter(write))

    @classmethod
    def read(cls, read: Callable[[int], bytes]) -> VectorIndex:
        """An index from FAISS's bytes; `read(n)` gives the next n.

        Raises:
            ValueError: they are no index of ours.
        """
        faiss = load_faiss()
        try:
            index = faiss.read_index(faiss.PyCallbackIOReader(read))
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        if not isinstance(index, faiss.IndexIDMap2 | faiss.IndexIVFScalarQuantizer):
            raise ValueError(f"it holds a {type(index).__name__}")
        return cls(index)


def load_faiss() -> Any:
    """The faiss module.

    Raises:
        StorageError: it is not installed; the message says how to get it.
    """
    try:
        import faiss
    except ImportError as error:
        raise StorageError(
            f"search needs FAISS ({error}): `pip install modelgrove[cpu]`, or modelgrove[gpu] on a machine with CUDA"
        ) from error
    return faiss


def _bitmap(ids: Ids) -> NDArray[np.uint8]:
    """A bit for every id up to the largest, set for `ids`."""
    import numpy as np

    marks = np.zeros(int(ids.max()) + 1, np.uint8)
    marks[ids] = 1
    return np.packbits(marks, bitorder="little")
