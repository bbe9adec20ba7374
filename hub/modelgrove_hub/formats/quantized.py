"""The manifest of packed files: which tensors were quantized, how, and what it cost. See docs/format.md.

A packed file is a safetensors file whose metadata has the key `modelgrove.quant`. A quantized
tensor X is stored in parts, X.codes, X.scales and so on; all others as they were. Here are the
rules and checks; the arithmetic is in the kernels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from modelgrove_hub.errors import CorruptFileError, DataError
from modelgrove_hub.store.dtypes import DTYPES
from modelgrove_hub.store.header import MAX_DIMENSIONS, MAX_ELEMENTS, read_header

KEY = "modelgrove.quant"
VERSION: Literal[1] = 1
BITS = {"int8": (8,), "int4": (4,), "lut": (1, 2, 3, 4, 5, 6, 7, 8), "sparse": (1,)}
"""Layout → bits that one code may have; a sparse matrix has one bit an element, in its mask."""
MAX_VECTOR = 16
"""Columns that one code may stand for: bounds what a file can unpack to."""

_REAL = frozenset({"F16", "F32"})


class Described(Protocol):
    """A tensor as a header describes it."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102


class Part(NamedTuple):
    """What a stored part must look like."""

    dtypes: frozenset[str]
    shape: tuple[int, ...]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Activations(_Strict):
    """How a layer's inputs are quantized where the method was made for that; the weights do not depend on it.

    `token`: each row of the input, or each `width` columns of it, has a scale of its own, found when it comes
    (symmetric); a convolution's "row" is the whole picture. `static`: one range is stored for all. `timestep`: a
    range is stored for each interval of the manifest's `timesteps`. With several `groups`, each input channel
    belongs to one of them, and each has a range of its own. With `exponent` bits of an exponent values are floating
    point (4 of 8 bits: E4M3), the scale's largest value on the grid; `token` alone has that.
    """

    bits: Annotated[int, Field(ge=2, le=8)]
    exponent: Annotated[int, Field(ge=0, le=5)] = 0
    ranges: Literal["token", "static", "timestep"] = "token"
    width: Annotated[int, Field(ge=0)] = 0
    groups: Annotated[int, Field(ge=1, le=256)] = 1
    intervals: PositiveInt = 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.exponent >= self.bits:
            raise ValueError(f"{self.exponent} bits of an exponent and a sign do not fit into {self.bits} bits")
        if self.exponent and self.ranges != "token":
            raise ValueError(f"floating-point activations have no {self.ranges} ranges")
        return self


class AttentionMap(_Strict):
    """How the attention probabilities that weigh this layer's outputs are rounded: it makes a cross-attention's values.

    log2: p ≈ δ · 2^-k with k in 0 … 2^bits - 1, and δ the largest probability of the sample, found when it comes.
    """

    bits: Annotated[int, Field(ge=2, le=8)]
    kind: Literal["log2"] = "log2"
    start: bool = False
    """Whether those of the first token are left as they are, and count not for δ."""


class PackedTensor(_Strict):
    """One quantized tensor, seen as a matrix: rows are the first of `axes`, columns all others in that order."""

    layout: Literal["int8", "int4", "lut", "sparse"]
    bits: Annotated[int, Field(ge=1, le=8)]
    group: PositiveInt
    """Columns that share a scale; the last group of a row is padded to this width."""
    vector: Annotated[int, Field(ge=1, le=MAX_VECTOR)] = 1
    """lut: neighbouring columns that one code stands for."""
    tables: Literal["tensor", "row"] = "tensor"
    """lut: whether the table is one for all rows."""
    nonzero: Annotated[int, Field(ge=0)] = 0
    """sparse: elements that are stored."""
    smooth: bool = False
    """The inputs are divided by X.smooth, channel by channel."""
    rotation: Literal["hadamard", "stored"] | None = None
    """The inputs are permuted (stored only), then multiplied by orthogonal blocks of `block` columns."""
    block: Annotated[int, Field(ge=0)] = 0
    rank: Annotated[int, Field(ge=0)] = 0
    """Of a branch in full precision, X.up · X.down, beside the codes."""
    activations: Activations | None = None
    attention: AttentionMap | None = None
    dtype: str
    """Of the original, as safetensors writes it."""
    shape: tuple[PositiveInt, ...]
    """Of the original."""
    axes: tuple[int, ...]
    """The permutation applied to the original before it was flattened; a convolution's is (0, 2, 3, 1)."""
    error: float = Field(ge=0, allow_inf_nan=False)
    """‖W - Ŵ‖ / ‖W‖."""
    bytes: int = Field(ge=0)
    """Size of the parts, padding included."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.bits not in BITS[self.layout]:
            raise ValueError(
                f"layout {self.layout} has {' or '.join(map(str, BITS[self.layout]))} bits, not {self.bits}"
            )
        if self.dtype not in DTYPES or not DTYPES[self.dtype].is_float:
            raise ValueError(f"{self.dtype!r} is no floating-point dtype")
        if not 1 <= len(self.shape) <= MAX_DIMENSIONS or prod(self.shape) > MAX_ELEMENTS:
            raise ValueError(f"shape {self.shape} is too large")
        if sorted(self.axes) != list(range(len(self.shape))):
            raise ValueError(f"axes {self.axes} are no permutation of {len(self.shape)} dimensions")
        if self.layout == "int4" and self.group % 2:
            raise ValueError(f"a group of {self.group} columns does not fill whole bytes")
        if self.layout == "lut" and self.group % self.vector:
            raise ValueError(f"a group of {self.group} columns is not made of vectors of {self.vector}")
        return self._check_transform()

    def _check_transform(self) -> Self:
        if self.rotation is None:
            if self.block:
                raise ValueError("block belongs to a rotation, and there is none")
        elif not self.block or self.matrix[1] % self.block:
            raise ValueError(f"{self.matrix[1]} columns are not made of rotated blocks of {self.block}")
        elif self.rotation == "hadamard" and self.block & (self.block - 1):
            raise ValueError(f"a Hadamard block of {self.block} is no power of two")
        if self.layout == "sparse" and self.nonzero > prod(self.shape):
            raise ValueError(f"{self.nonzero} values do not fit into {prod(self.shape)} places")
        if self.rank > MAX_ELEMENTS // (sum(self.matrix)):
            raise ValueError(f"rank {self.rank} is too large")
        return self

    @property
    def permuted(self) -> tuple[int, ...]:
        """The original's shape with its axes in packed order."""
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) without padding."""
        return self.permuted[0], prod(self.permuted[1:])

    @property
    def form(self) -> str:
        """As people write it: int8, int4, lut3, sparse."""
        return f"lut{self.bits}" if self.layout == "lut" else self.layout

    @property
    def channels(self) -> int:
        """Input channels: the innermost columns."""
        return self.permuted[-1] if len(self.shape) > 1 else 1

    def parts(self) -> dict[str, Part]:
        """Suffix → stored part."""
        return {**self._codes(), **self._transform(), **self._ranges()}

    def _codes(self) -> dict[str, Part]:
        rows, columns = self.matrix
        if self.layout == "sparse":
            mask = Part(frozenset({"U8"}), (rows, -(-columns // 8)))
            return {"mask": mask, "values": Part(frozenset({self.dtype}), (self.nonzero,))}
        groups = -(-columns // self.group)
        width = -(-groups * self.group // self.vector * self.bits // 8)
        parts = {
            "codes": Part(frozenset({"I8" if self.layout == "int8" else "U8"}), (rows, width)),
            "scales": Part(_REAL, (rows, groups)),
        }
        if self.layout == "int4":
            parts["zeros"] = Part(frozenset({"U8"}), (rows, groups))
        if self.layout == "lut":
            shape = (rows if self.tables == "row" else 1, 2**self.bits, self.vector)
            parts["table"] = Part(_REAL, shape)
        return parts

    def _transform(self) -> dict[str, Part]:
        (rows, columns), parts = self.matrix, {}
        if self.smooth:
            parts["smooth"] = Part(_REAL, (self.channels,))
        if self.rotation == "stored":
            parts["permutation"] = Part(frozenset({"I32"}), (columns,))
            parts["rotation"] = Part(_REAL, (columns // self.block, self.block, self.block))
        if self.rank:
            parts["up"], parts["down"] = Part(_REAL, (rows, self.rank)), Part(_REAL, (self.rank, columns))
        return parts

    def _ranges(self) -> dict[str, Part]:
        found, parts = self.activations, {}
        if found and found.groups > 1:
            parts["channels"] = Part(frozenset({"U8"}), (self.channels,))
        if found and found.ranges != "token":
            parts["ranges"] = Part(frozenset({"F32"}), (found.intervals, found.groups, 2))
        return parts


class QuantManifest(_Strict):
    """What one packed file says of itself."""

    version: Literal[1] = VERSION
    method: str
    parameters: dict[str, Any] = {}
    """The method's parameters, enough to do it again."""
    parent: str = Field(pattern="^[0-9a-f]{64}$")
    """sha256 of the file that was packed."""
    timesteps: tuple[int, ...] = ()
    """Where the intervals of stored activation ranges begin, ascending; the last one has no end."""
    tensors: dict[str, PackedTensor]

    def metadata(self) -> dict[str, str]:
        """The entry of the file's metadata."""
        said = self.model_dump(mode="json", exclude_defaults=True)
        return {KEY: json.dumps({"version": self.version, **said}, separators=(",", ":"))}


def read_manifest(metadata: Mapping[str, str], where: str) -> QuantManifest | None:
    """The manifest in a file's metadata, or None if the file is not packed.

    Raises:
        DataError: the manifest is broken or of another version; the message begins with `where`.
    """
    text = metadata.get(KEY)
    if text is None:
        return None
    try:
        return QuantManifest.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise DataError(f"{where}: metadata {KEY}: {place or 'manifest'}: {fault['msg']}") from None


def manifest_of(file: Path) -> QuantManifest | None:
    """The manifest of a packed file, checked against its tensors; None for any other safetensors file.

    Raises:
        DataError: the manifest is broken, or the file does not hold what it says.
    """
    header = read_header(file)
    manifest = read_manifest(header.metadata, str(file))
    if manifest is not None:
        check_parts(manifest, header.tensors, str(file))
    return manifest


def check_parts(manifest: QuantManifest, tensors: Iterable[Described], where: str) -> None:
    """See that every part is in the file with the dtype and shape that the manifest implies.

    After it, unpacking allocates no more than a small multiple of the file's size.

    Raises:
        CorruptFileError: a part is missing or different.
    """
    stored = {tensor.name: tensor for tensor in tensors}
    for name, entry in manifest.tensors.items():
        for suffix, wanted in entry.parts().items():
            part = f"{name}.{suffix}"
            found = stored.get(part)
            if found is None:
                raise CorruptFileError(f"{where}: tensor {part} is missing, but {KEY} lists {name}")
            if found.dtype not in wanted.dtypes or tuple(found.shape) != wanted.shape:
                raise CorruptFileError(
                    f"{where}: tensor {part} is {found.dtype} {tuple(found.shape)}, "
                    f"but {KEY} implies {' or '.join(sorted(wanted.dtypes))} {wanted.shape}"
                )


def original_tensors(manifest: QuantManifest, tensors: Iterable[Described]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype, shape) of the tensors before packing: what recognition should look at."""
    parts = {f"{name}.{suffix}" for name, entry in manifest.tensors.items() for suffix in entry.parts()}
    kept = {tensor.name: (tensor.dtype, tuple(tensor.shape)) for tensor in tensors if tensor.name not in parts}
    return kept | {name: (entry.dtype, tuple(entry.shape)) for name, entry in manifest.tensors.items()}
