"""What a weight file holds: one pass over its bytes gives hashes, norms and a sketch of every tensor.

Three hashes identify weights whatever the file around them looks like: `weights_hash` ignores
metadata, order and sharding, `values_hash` also the names (a renamed copy), `inventory_hash`
looks at names, types and shapes alone (the same architecture).
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelgrove_hub.errors import CorruptFileError
from modelgrove_hub.store.disk import open_regular, storage_errors
from modelgrove_hub.store.dtypes import DTYPES
from modelgrove_hub.store.floats import decode
from modelgrove_hub.store.header import TensorInfo, parse_header
from modelgrove_hub.store.sketch import Measured, TensorMeter, measure_run

VERSION = 1
"""Of the JSON text and of the sketch's positions."""
PIECE = 2**18
"""Bytes measured at a time: they stay in the processor's cache between two hashes and a norm."""
SCRATCH = 2**18
"""Elements of the buffer that norms are computed in: a piece of one-byte elements."""
SMALL = 2**16
"""Bytes up to which tensors are measured many at a time."""


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor of a scanned file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Of the first byte, counted from the beginning of the file."""
    sha256: str
    """Of the tensor's bytes."""
    norm: float | None
    """L2 norm (relative error about 1e-6); None if not of a float type, or not finite."""
    samples: bytes
    """The stored bytes of the values at `sketch.positions`; empty if not of a float type."""

    @property
    def sketch(self) -> NDArray[np.float32]:
        """The values at `sketch.positions(numel)`: (≤ 64,) float32, empty if not of a float type."""
        with np.errstate(over="ignore"):
            return decode(self.dtype, np.frombuffer(self.samples, np.uint8)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class FileScan:
    """A scanned file; without tensors unless it is a safetensors file. Tensors are in file order."""

    sha256: str
    size: int
    tensors: tuple[TensorRow, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """As compact JSON, one list a tensor; the same scan gives the same text."""
        rows = [
            [row.name, row.dtype, row.shape, row.offset, row.sha256, row.norm, b64encode(row.samples).decode()]
            for row in self.tensors
        ]
        content = {
            "version": VERSION, "sha256": self.sha256, "size": self.size, "metadata": self.metadata, "tensors": rows,
        }  # fmt: skip
        return json.dumps(content, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> FileScan:
        """The scan that `to_json` wrote.

        Raises:
            CorruptFileError: the text is not such a scan, or of another version.
        """
        try:
            content = json.loads(text)
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']!a}, this hub reads {VERSION}; ingest the file again")
            rows = [
                TensorRow(name, dtype, tuple(shape), offset, sha256, norm, b64decode(samples, validate=True))
                for name, dtype, shape, offset, sha256, norm, samples in content["tensors"]
            ]
            return cls(content["sha256"], content["size"], tuple(rows), content["metadata"])
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(f"manifest: {type(error).__name__}: {error}") from error


def scan(path: Path) -> FileScan:
    """Read the safetensors file at `path` once, from the first byte to the last, and measure it.

    Memory is bounded by the header and two pieces. All hashes are over the very bytes that were
    parsed, so a file changed meanwhile cannot be half of each.

    Raises:
        CorruptFileError: it breaks a rule of the format, or changed its length while being read.
        NotFoundError, DataError, StorageError: it cannot be opened or read.
    """
    with open_regular(path) as file, storage_errors(path):
        size = file.seek(0, 2)
        file.seek(0)
        reader = _HashingReader(file, str(path))
        header = parse_header(reader, size, str(path))
        piece, scratch = np.empty(PIECE, np.uint8), np.empty(SCRATCH, np.uint32)
        with np.errstate(over="ignore", invalid="ignore"):
            rows = tuple(
                TensorRow(info.name, info.dtype, info.shape, header.data_start + info.start, *measured)
                for run in _runs(header.tensors)
                for info, measured in zip(run, _measure(reader, run, piece, scratch), strict=True)
            )
        if file.read(1):
            raise CorruptFileError(f"{path}: grew while it was read")
    return FileScan(reader.sha256, size, rows, header.metadata)


def scan_bytes(path: Path) -> FileScan:
    """Hash any other file: a scan without tensors.

    Raises:
        NotFoundError, DataError, StorageError: it cannot be opened or read.
    """
    with open_regular(path) as file, storage_errors(path):
        digest = hashlib.file_digest(file, "sha256")
        return FileScan(digest.hexdigest(), file.tell())


def weights_hash(tensors: Iterable[TensorRow]) -> str | None:
    """sha256 over the sorted (name, dtype, shape, sha256) of all tensors; None if there are none."""
    return _digest([row.name, row.dtype, row.shape, row.sha256] for row in tensors)


def values_hash(tensors: Iterable[TensorRow]) -> str | None:
    """sha256 over the sorted (dtype, shape, sha256) of all tensors; None if there are none."""
    return _digest([row.dtype, row.shape, row.sha256] for row in tensors)


def inventory_hash(tensors: Iterable[TensorRow]) -> str | None:
    """sha256 over the sorted (name, dtype, shape) of all tensors; None if there are none."""
    return _digest([row.name, row.dtype, row.shape] for row in tensors)


def _digest(facts: Iterable[list[Any]]) -> str | None:
    rows = sorted(facts)
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest() if rows else None


class _HashingReader:
    """Reads a file in order and hashes what it gives."""

    def __init__(self, file: BufferedReader, name: str) -> None:
        self._file = file
        self._name = name
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._hash.update(data)
        return data

    def fill(self, piece: NDArray[np.uint8]) -> None:
        if self._file.readinto(piece) != piece.size:
            raise CorruptFileError(f"{self._name}: became shorter while it was read")
        self._hash.update(piece)


def _runs(tensors: Iterable[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Consecutive small tensors of one float type together, as many as fit in a piece; others alone."""
    run: list[TensorInfo] = []
    for info in tensors:
        if run and not (_is_small(run[0]) and _is_small(info) and info.dtype == run[0].dtype
                        and info.end - run[0].start <= PIECE):  # fmt: skip
            yield run
            run = []
        run.append(info)
    if run:
        yield run


def _is_small(info: TensorInfo) -> bool:
    return 0 < info.end - info.start <= SMALL and DTYPES[info.dtype].is_float


def _measure(
    reader: _HashingReader, run: list[TensorInfo], piece: NDArray[np.uint8], scratch: NDArray[np.uint32]
) -> Iterator[Measured]:
    if len(run) > 1:
        part = piece[: run[-1].end - run[0].start]
        reader.fill(part)
        yield from measure_run(run[0].dtype, part, [prod(info.shape) for info in run], scratch)
        return
    [info] = run
    meter = TensorMeter(info.dtype, prod(info.shape), scratch)
    for start in range(info.start, info.end, PIECE):
        part = piece[: min(PIECE, info.end - start)]
        reader.fill(part)
        meter.update(part)
    yield meter.result()
