"""Which outputs a model's weights move: a sketch by which the adapters of one base know each other, and the base.

An update X = BA (out × in) is a sum of gradients, so it moves the outputs that the base's later weights listen to:
XXᵀ is alike in all adapters of one base and unlike in those of an independently trained one. A base's own weights W
have the same directions in WWᵀ (updates amplify directions of W: Hu et al., arXiv 2106.09685, section 7.3).

Of each layer M = PᵀXXᵀP is kept, P (out, 32) being signs that depend on the layer's name, less its component along
PᵀP, which any update has, and scaled to norm one. The entries of all layers are added with signs into one vector
(feature hashing: Weinberger et al., ICML 2009, arXiv 0902.2206): ⟨sᵢ, sⱼ⟩ is about Σ_l ⟨Mᵢ, Mⱼ⟩, with a deviation of
√(layers of i · layers of j / 16,384).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from modelgrove_hub.errors import CorruptFileError
from modelgrove_hub.formats.adapter_keys import Role, flat, module_of, parse_key
from modelgrove_hub.formats.folders import chosen_weights
from modelgrove_hub.formats.naming import container_names
from modelgrove_hub.store.dtypes import DTYPES
from modelgrove_hub.store.tensors import StoredTensor, tensors_of
from modelgrove_hub.tables import NETWORKS, ModelKind

WIDTH = 2**14
FEWEST = 8
"""Layers that two models must share to be compared."""
_PROBES = 32
_SMALLEST = 1e-30
_SEED = b"modelgrove outputs 1 "
_WEIGHT = ".weight"
Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Outputs:
    """The sketch of a model: hashes of its layers' names (l,), uint32, rising, and `vector` (16384,), float32."""

    layers: NDArray[np.uint32]
    vector: Matrix

    def to_bytes(self) -> bytes:
        """The number of layers, the layers, the size of a step, and the vector in steps of one byte; little-endian."""
        step = max(float(np.abs(self.vector).max()), _SMALLEST) / 127
        steps = np.rint(self.vector / step).astype(np.int8)
        counts = np.uint32(len(self.layers)), np.float32(step)
        return b"".join([counts[0].tobytes(), self.layers.tobytes(), counts[1].tobytes(), steps.tobytes()])

    @classmethod
    def from_bytes(cls, data: bytes) -> Outputs:
        """What `to_bytes` wrote.

        Raises:
            CorruptFileError: it is no such sketch.
        """
        count = int.from_bytes(data[:4], "little")
        if len(data) != 8 + 4 * count + WIDTH:
            raise CorruptFileError(f"a sketch of {len(data)} bytes for {count} layers: run `modelgrove expert route`")
        layers, step = np.frombuffer(data, "<u4", count, 4), np.frombuffer(data, "<f4", 1, 4 + 4 * count)
        return cls(layers, np.frombuffer(data, np.int8, WIDTH, 8 + 4 * count) * step)


@dataclass(frozen=True)
class Likeness:
    """How far a model moves the outputs that others move."""

    score: float
    """Mean cosine over the layers that they share: about 0 for what has nothing in common."""
    noise: float
    """Standard deviation of what hashing adds to it."""


def compare_outputs(one: Outputs, others: Iterable[Outputs]) -> Likeness | None:
    """The likeness of `one` to `others` together; None when none of them shares eight layers with it."""
    shared, total = 0, np.zeros(WIDTH, np.float32)
    for other in others:
        common = len(np.intersect1d(one.layers, other.layers, assume_unique=True))
        if common >= FEWEST:
            shared, total = shared + common, total + other.vector
    if not shared:
        return None
    noise = float(np.linalg.norm(one.vector) * np.linalg.norm(total)) / WIDTH**0.5
    return Likeness(float(one.vector @ total) / shared, noise / shared)


def read_outputs(files: Mapping[str, Path], kind: str, family: str, parts: Mapping[str, str]) -> Outputs | None:
    """The sketch of a model by its files (path in the model → file) and what recognition found.

    None for kinds and formats that have none, and for unknown families, whose modules have no names in common.

    Raises:
        CorruptFileError, StorageError: a file cannot be read.
    """
    if family == "unknown" or kind not in (ModelKind.ADAPTER, *NETWORKS):
        return None
    weights = [path for path in chosen_weights(files) if path.endswith(".safetensors")]
    tensors = [(path, tensor) for path in weights for tensor in tensors_of(files[path])]
    if kind == ModelKind.ADAPTER:
        return outputs_of_adapter(tensor for _, tensor in tensors)
    # Text encoders and such may be everybody's: only the network that gives the model its family counts.
    own = {part for part, found in parts.items() if found == family}
    chosen = [tensor for path, tensor in tensors if container_names().place_of(path, tensor.name) in own]
    return outputs_of_base(chosen or [tensor for _, tensor in tensors])


def outputs_of_adapter(tensors: Iterable[StoredTensor]) -> Outputs | None:
    """The sketch of a LoRA's updates, from its factors; None when it has none that are matrices of numbers.

    Raises:
        CorruptFileError, StorageError: a file cannot be read.
    """
    pairs: dict[str, dict[Role, StoredTensor]] = defaultdict(dict)
    for tensor in tensors:
        if _is_matrix(tensor) and (key := parse_key(tensor.name)):
            pairs[flat(key.target)][key.role] = tensor

    def matrices() -> Iterator[tuple[str, int, Matrix]]:
        for layer, parts in pairs.items():
            if {Role.DOWN, Role.UP} <= parts.keys():
                down, up = _rows(parts[Role.DOWN]), _rows(parts[Role.UP])
                if down.shape[0] == up.shape[1]:
                    heard = _frame(layer, len(up)).probes.T @ up
                    yield layer, len(up), heard @ (down @ down.T) @ heard.T

    return _sketch(matrices())


def outputs_of_base(tensors: Iterable[StoredTensor]) -> Outputs | None:
    """The sketch of a network's own weights, its layers named as those of adapters are; None without matrices.

    Raises:
        CorruptFileError, StorageError: a file cannot be read.
    """

    def matrices() -> Iterator[tuple[str, int, Matrix]]:
        for tensor in tensors:
            if tensor.name.endswith(_WEIGHT) and _is_matrix(tensor):
                layer, weight = flat(module_of(tensor.name.removesuffix(_WEIGHT))), _rows(tensor)
                heard = _frame(layer, len(weight)).probes.T @ weight
                yield layer, len(weight), heard @ heard.T

    return _sketch(matrices())


def _sketch(matrices: Iterable[tuple[str, int, Matrix]]) -> Outputs | None:
    vector, layers = np.zeros(WIDTH, np.float32), set()
    for layer, out, matrix in matrices:
        frame = _frame(layer, out)
        own = matrix - (matrix * frame.isotropic).sum() * frame.isotropic
        norm = float(np.linalg.norm(own))
        if 0 < norm < np.inf and frame.name not in layers:
            layers.add(frame.name)
            np.add.at(vector, frame.places, own[_UPPER] * (frame.signs / norm))
    return Outputs(np.array(sorted(layers), np.uint32), vector) if layers else None


class _Frame(NamedTuple):
    """What depends on a layer's name and its number of outputs alone."""

    name: int
    probes: Matrix
    """P (out, 32) of ±1."""
    isotropic: Matrix
    """PᵀP, of norm one."""
    places: NDArray[np.uint16]
    signs: Matrix
    """Of the 528 entries on and above the diagonal; those above it stand for two."""


_UPPER = np.triu_indices(_PROBES)


@lru_cache(maxsize=4096)
def _frame(layer: str, out: int) -> _Frame:
    bits = np.unpackbits(np.frombuffer(_digest(layer, b"signs", out * _PROBES // 8), np.uint8))
    probes = bits.reshape(out, _PROBES).astype(np.float32) * 2 - 1
    isotropic = probes.T @ probes
    drawn = np.frombuffer(_digest(layer, b"places", 2 * len(_UPPER[0])), "<u2")
    signs = np.where(drawn & 0x8000, 1, -1) * np.where(_UPPER[0] == _UPPER[1], 1, 2**0.5)
    return _Frame(
        name=int.from_bytes(_digest(layer, b"name", 4), "little"),
        probes=probes,
        isotropic=isotropic / np.linalg.norm(isotropic),
        places=drawn % WIDTH,
        signs=signs.astype(np.float32),
    )


def _digest(layer: str, what: bytes, size: int) -> bytes:
    return hashlib.shake_128(_SEED + what + b" " + layer.encode()).digest(size)


def _is_matrix(tensor: StoredTensor) -> bool:
    kind = DTYPES[tensor.dtype]
    return kind.is_float and kind.numpy is not None and 2 <= len(tensor.shape) <= 5 and 0 not in tensor.shape


def _rows(tensor: StoredTensor) -> Matrix:
    values: NDArray[Any] = tensor.read_numpy().astype(np.float32, copy=False)
    return values.reshape(len(values), -1)
