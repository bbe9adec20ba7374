"""What is known of a model's tensors without loading it: hashes, norms and sketches made at ingest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from modelgrove_analyzers.heritage.unpacking import unpacked
from modelgrove_hub.contracts import InputModel
from modelgrove_hub.formats.quantized import manifest_of
from modelgrove_hub.store.manifest import FileScan, TensorRow, scan, values_hash, weights_hash
from modelgrove_hub.store.tensors import StoredTensor, tensors_of
from modelgrove_hub.store.writer import SafetensorsWriter

WEIGHTS = ".safetensors"
_TELLING = 8
"""Distinct values in a sketch; with fewer (all ones, all zeros) a tensor says nothing about where it came from."""


@runtime_checkable
class Scanned(Protocol):
    """A registered model that brings what ingest measured of its weight files."""

    def scans(self) -> Mapping[str, FileScan]:
        """Path in the model → scan, for every safetensors file."""


@dataclass(frozen=True)
class Facts:
    """A model by its tensors; `packed` when they were dequantized to be measured.

    A tensor's key is its name, with the folder of its file in front: "unet/conv_in.weight".
    """

    number: int
    """The model's place among those compared."""
    revision_id: int
    files: frozenset[str]
    tensors: Mapping[str, TensorRow]
    packed: bool = False

    @cached_property
    def weights_hash(self) -> str | None:
        """See `store.manifest.weights_hash`."""
        return weights_hash(self.tensors.values())

    @cached_property
    def values_hash(self) -> str | None:
        """See `store.manifest.values_hash`."""
        return values_hash(self.tensors.values())

    @cached_property
    def sketches(self) -> dict[str, NDArray[np.float32]]:
        """The sketches of the tensors that tell something, largest tensor first."""
        order = sorted(self.tensors, key=lambda key: (-numel(self.tensors[key]), key))
        return {key: values for key in order if len(np.unique(values := self.tensors[key].sketch)) >= _TELLING}

    @cached_property
    def telling_hashes(self) -> frozenset[str]:
        """The hashes of those tensors."""
        return frozenset(self.tensors[key].sha256 for key in self.sketches)


def numel(row: TensorRow) -> int:
    """The number of elements of a tensor."""
    return int(np.prod(row.shape, dtype=np.int64))


def facts_of(model: InputModel, temp: Path, number: int = 0) -> Facts:
    """Measure a model; a registered one brings its measurements, packed tensors are dequantized into `temp`.

    Raises:
        DataError: a weight file breaks its format's rules.
    """
    stored, plain = weight_files(model), plain_files(model, temp)
    packed = plain != stored
    known = model.scans() if isinstance(model, Scanned) and not packed else {}
    scans = {path: known[path] if path in known else scan(file) for path, file in plain.items()}
    tensors = {key(path, row.name): row for path, file in scans.items() for row in file.tensors}
    return Facts(number, model.revision_id, frozenset(file.sha256 for file in scans.values()), tensors, packed)


def key(path: str, name: str) -> str:
    """The key of tensor `name` in the file at `path` in a model."""
    folder, _, _ = path.rpartition("/")
    return f"{folder}/{name}" if folder else name


def weight_files(model: InputModel) -> dict[str, Path]:
    """The model's safetensors files, by path."""
    return {path: file for path, file in sorted(model.files().items()) if path.endswith(WEIGHTS)}


def plain_files(model: InputModel, temp: Path) -> dict[str, Path]:
    """The same files, with those in the packed format replaced by dequantized copies in `temp`."""
    stored = weight_files(model)
    return {
        path: _unpack(file, temp / f"{sha256(str(file).encode()).hexdigest()}{WEIGHTS}") if manifest_of(file) else file
        for path, file in stored.items()
    }


def lazy_tensors(files: Mapping[str, Path]) -> dict[str, StoredTensor]:
    """All tensors of `files` (path in the model → file) by key; nothing but headers is read."""
    return {key(path, tensor.name): tensor for path, file in files.items() for tensor in tensors_of(file)}


def _unpack(file: Path, target: Path) -> Path:
    if not target.exists():
        with SafetensorsWriter(target) as writer:
            for name, tensor in unpacked(file):
                writer.add(name, tensor)
    return target
