"""Sparse adapters: what is added to single weights of a base, and to which. See docs/format.md.

SaRA (Hu et al., ICLR 2025, arXiv 2409.06633) trains the weights of smallest magnitude alone. A file has for each tensor
X of the base `X.sara_values`, the differences in the order of their places, and the places: `X.sara_mask`, a bit for
each weight, or `X.sara_indices` where those are smaller. The metadata `modelgrove.sara` say what X was, so that another
base is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from modelgrove_hub.contracts import InputModel, LazyTensor, TensorWriter
from modelgrove_hub.errors import CorruptFileError, DataError, UsageError
from modelgrove_hub.formats.adapter_keys import Key
from modelgrove_hub.formats.adapters import FLOATS, AdapterFile, read_finite
from modelgrove_hub.formats.slots import Slot, slot_name, slots_of
from modelgrove_hub.store.header import MAX_DIMENSIONS

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from modelgrove_hub.formats.quantized import Described

KEY = "modelgrove.sara"
"""The metadata key."""
FILE = "sara.safetensors"
VALUES, MASK, INDICES = ".sara_values", ".sara_mask", ".sara_indices"
MOST_ENTRIES = 2**28
"""Of a base's tensor: what a small file may make its reader allocate. The largest layers have 2²⁶."""
_SHOWN = 3


class Origin(BaseModel):
    """A tensor of the base as it was before: by these another base is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[PositiveInt, ...]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of its values as float32, little-endian, row by row: the dtype that they are stored in does not matter."""

    @model_validator(mode="after")
    def _bounded(self) -> Origin:
        if not 1 <= len(self.shape) <= MAX_DIMENSIONS or self.size > MOST_ENTRIES:
            raise ValueError(f"shape {self.shape} is too large: at most {MOST_ENTRIES} weights are read")
        return self

    @property
    def size(self) -> int:
        """How many weights there are."""
        return prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in·kernel); a vector is (1, n)."""
        return (1, self.size) if len(self.shape) == 1 else (self.shape[0], prod(self.shape[1:]))


class SparseManifest(BaseModel):
    """What a sparse adapter says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Weights of the base that are smaller by magnitude may be changed."""
    tensors: dict[str, Origin]

    def metadata(self) -> dict[str, str]:
        """The entry of the file's metadata."""
        return {KEY: json.dumps(self.model_dump(mode="json"), separators=(",", ":"))}


def read_manifest(metadata: Mapping[str, str], where: str) -> SparseManifest | None:
    """The manifest in a file's metadata, or None if it is no sparse adapter.

    Raises:
        DataError: the manifest is broken or of another version; the message begins with `where`.
    """
    if KEY not in metadata:
        return None
    try:
        return SparseManifest.model_validate_json(metadata[KEY])
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise DataError(f"{where}: metadata {KEY}: {place or 'manifest'}: {fault['msg']}") from None


def check_parts(manifest: SparseManifest, tensors: Iterable[Described], where: str) -> None:
    """See that the parts of every tensor are in the file, with dtypes and sizes that go with the manifest.

    After it, reading allocates no more than the manifest's shapes say, which are bounded.

    Raises:
        CorruptFileError: a part is missing, there are two of them, or its dtype or shape is another.
    """
    stored = {tensor.name: tensor for tensor in tensors}
    for name, origin in manifest.tensors.items():
        values, places = stored.get(name + VALUES), [stored[name + s] for s in (MASK, INDICES) if name + s in stored]
        if values is None or len(places) != 1:
            raise CorruptFileError(f"{where}: {name} needs {VALUES}, and either {MASK} or {INDICES}")
        _check_pair(origin, values, places[0], where)


def _check_pair(origin: Origin, values: Described, places: Described, where: str) -> None:
    if values.dtype not in FLOATS or len(values.shape) != 1 or not 1 <= values.shape[0] <= origin.size:
        raise CorruptFileError(
            f"{where}: {values.name} is {values.dtype} {tuple(values.shape)}, no changes of {origin.size} weights"
        )
    masked = places.name.endswith(MASK)
    wanted = ("U8", (-(-origin.size // 8),)) if masked else ("I32", tuple(values.shape))
    if (places.dtype, tuple(places.shape)) != wanted:
        raise CorruptFileError(
            f"{where}: tensor {places.name} is {places.dtype} {tuple(places.shape)}, not {wanted[0]} {wanted[1]}"
        )


def pack_places(places: NDArray[np.int64], size: int) -> tuple[str, NDArray[np.uint8] | NDArray[np.int32]]:
    """Rising places below `size` → the suffix and the values of the smaller form: size / 8 bytes, or 4 each."""
    if size > 32 * len(places):
        return INDICES, places.astype(np.int32)
    bits = np.zeros(size, np.bool_)
    bits[places] = True
    return MASK, np.packbits(bits, bitorder="little")


def unpack_places(
    suffix: str, stored: NDArray[np.uint8] | NDArray[np.int32], size: int, count: int
) -> NDArray[np.int64]:
    """The inverse of `pack_places`: `count` places, rising, below `size`.

    Raises:
        ValueError: there are more or fewer, one is not below `size`, or they do not rise.
    """
    bits = np.unpackbits(stored.astype(np.uint8, copy=False), bitorder="little") if suffix == MASK else None
    marked = len(stored) if bits is None else np.count_nonzero(bits)
    if marked != count:  # told before a list of them is made, which is eight times as large as the bits
        raise ValueError(f"marks {marked} places for {count} values")
    places = stored.astype(np.int64) if bits is None else np.flatnonzero(bits)
    if count and (places[0] < 0 or places[-1] >= size or bool((np.diff(places) <= 0).any())):
        raise ValueError(f"does not hold places that rise from 0 to {size - 1}")
    return places


@dataclass(frozen=True)
class SparseChange:
    """An `updates.Update` of some weights of a parameter."""

    module: str
    component: str
    parameter: str
    restored: bool
    kernel: tuple[int, ...]
    origin: Origin
    values: LazyTensor
    places: LazyTensor
    threshold: float
    """As the manifest has it."""
    method: str = "sara"
    needs_weight: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in·kernel); (1, n) of a vector."""
        return self.origin.matrix

    def entries(self) -> tuple[Tensor, Tensor]:
        """Places (k,), int64, rising, and what is added there (k,), float32.

        Raises:
            CorruptFileError: the places are none of this tensor.
            DataError: a value is not finite.
        """
        import torch

        values = read_finite(self.values)
        suffix = MASK if self.places.key.endswith(MASK) else INDICES
        try:
            found = unpack_places(suffix, self.places.read().numpy(), self.origin.size, len(values))
        except ValueError as error:
            raise CorruptFileError(f"tensor {self.places.name} {error}") from None
        return torch.from_numpy(found), values

    def read(self, weight: Tensor | None = None) -> Tensor:  # noqa: ARG002  (an `updates.Update`)
        """All differences, zero where there is none, float32, of `shape`."""
        import torch

        places, values = self.entries()
        whole = torch.zeros(self.origin.size)
        whole[places] = values
        return whole.view(self.shape)


def read_sparse(key: Key, parts: Mapping[str, LazyTensor], manifest: SparseManifest | None) -> Iterator[SparseChange]:
    """The updates of a module's weight and bias; `parts` are by suffix, as in "…weight.sara_values".

    Raises:
        DataError: the manifest is missing or does not know the tensor.
        CorruptFileError: a part is missing or does not fit.
    """
    for parameter in ("weight", "bias"):
        values = parts.get(f".{parameter}{VALUES}")
        if values is None:
            continue
        name = values.key.removesuffix(VALUES)
        origin = manifest.tensors.get(name) if manifest else None
        if manifest is None or origin is None:
            raise DataError(f"tensor {values.name} is a sparse adapter's, but the metadata {KEY} do not tell its shape")
        places = [parts[f".{parameter}{s}"] for s in (MASK, INDICES) if f".{parameter}{s}" in parts]
        if len(places) != 1:
            raise CorruptFileError(f"tensor {values.name} needs either {name}{MASK} or {name}{INDICES} beside it")
        _check_pair(origin, values, places[0], f"module {key.module}")
        kernel = tuple(origin.shape[2:])
        yield SparseChange(
            key.module, key.component, parameter, key.restored, kernel, origin, values, places[0], manifest.threshold
        )


def origin_of(weight: Tensor) -> Origin:
    """What is told of a tensor of the base."""
    return Origin(shape=tuple(weight.shape), sha256=_digest(weight))


def _digest(weight: Tensor) -> str:
    values = weight.float().contiguous().numpy().astype("<f4", copy=False)
    return hashlib.sha256(values.data).hexdigest()


def check_base(file: AdapterFile[object], base: InputModel) -> None:
    """See that sparse updates go to the weights that they were made for; other updates are not looked at.

    The base may have other names, files and dtypes if its values are the same.

    Raises:
        UsageError: it lacks tensors, or has other values in them; the first of them are named.
    """
    sparse = {name: update for name, update in file.targets.items() if isinstance(update, SparseChange)}
    slots = slots_of(base) if sparse else {}
    other = [name for name, update in sparse.items() if not _is_origin(slots.get(slot_name(name)), update.origin)]
    if other:
        raise UsageError(
            f"{file.name} changes single weights of another base than {base.name}: {len(other)} of {len(sparse)} "
            f"tensors are not there or have other values, such as {', '.join(other[:_SHOWN])}. "
            "Use the base that it was made from"
        )


def _is_origin(slot: Slot | None, origin: Origin) -> bool:
    if slot is None or slot.shape != origin.matrix:
        return False
    return _digest(slot.part_of(slot.tensor.read())) == origin.sha256


class SparseWriter:
    """Writes one sparse adapter, tensor by tensor."""

    def __init__(self, writer: TensorWriter, threshold: float) -> None:
        self._writer, self._threshold, self._origins = writer, threshold, dict[str, Origin]()

    def add(self, name: str, places: Tensor, values: Tensor, origin: Origin) -> int:
        """Write values (k,) for rising places (k,), int64, of the tensor `name`; returns the bytes that it took."""
        import torch

        suffix, packed = pack_places(places.numpy(), origin.size)
        self._writer.add(name + suffix, torch.from_numpy(packed))
        self._writer.add(name + VALUES, values)
        self._origins[name] = origin
        return packed.nbytes + values.numel() * values.element_size()

    def close(self) -> None:
        """Write the manifest."""
        for key, text in SparseManifest(threshold=self._threshold, tensors=self._origins).metadata().items():
            self._writer.describe(key, text)
