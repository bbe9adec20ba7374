"""The manifest of packed files: which tensors were quantized, how, and what it cost. See docs/format.md.

A packed file is a safetensors file whose metadata has the key `modelgrove.quant`. A quantized
tensor X is stored as X.codes, X.scales and, in asymmetric layouts, X.zeros; all others as they
were. Here are the rules and checks; the arithmetic is in the kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from modelgrove_hub.errors import CorruptFileError, DataError
from modelgrove_hub.store.dtypes import DTYPES
from modelgrove_hub.store.header import MAX_DIMENSIONS, MAX_ELEMENTS, read_header

KEY = "modelgrove.quant"
VERSION: Literal[1] = 1
BITS = {"int8": 8, "int4": 4}
"""Layout → bits of one code."""

CODES, SCALES, ZEROS = ".codes", ".scales", ".zeros"


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


class PackedTensor(_Strict):
    """One quantized tensor, seen as a matrix: rows are the first of `axes`, columns all others in that order."""

    layout: Literal["int8", "int4"]
    bits: Literal[8, 4]
    group: PositiveInt
    """Columns that share a scale; the last group of a row is padded to this width."""
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
        if BITS[self.layout] != self.bits:
            raise ValueError(f"layout {self.layout} has {BITS[self.layout]} bits, not {self.bits}")
        if self.dtype not in DTYPES or not DTYPES[self.dtype].is_float:
            raise ValueError(f"{self.dtype!r} is no floating-point dtype")
        if not 1 <= len(self.shape) <= MAX_DIMENSIONS or prod(self.shape) > MAX_ELEMENTS:
            raise ValueError(f"shape {self.shape} is too large")
        if sorted(self.axes) != list(range(len(self.shape))):
            raise ValueError(f"axes {self.axes} are no permutation of {len(self.shape)} dimensions")
        if self.layout == "int4" and self.group % 2:
            raise ValueError(f"a group of {self.group} columns does not fill whole bytes")
        return self

    @property
    def permuted(self) -> tuple[int, ...]:
        """The original's shape with its axes in packed order."""
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) without padding."""
        return self.permuted[0], prod(self.permuted[1:])

    def parts(self, name: str) -> dict[str, Part]:
        """The stored tensors of the quantized tensor called `name`."""
        rows, columns = self.matrix
        groups = -(-columns // self.group)
        width = groups * self.group * self.bits // 8
        parts = {
            name + CODES: Part(frozenset({"I8" if self.bits == 8 else "U8"}), (rows, width)),
            name + SCALES: Part(frozenset({"F16", "F32"}), (rows, groups)),
        }
        if self.layout == "int4":
            parts[name + ZEROS] = Part(frozenset({"U8"}), (rows, groups))
        return parts


class QuantManifest(_Strict):
    """What one packed file says of itself."""

    version: Literal[1] = VERSION
    method: str
    parameters: dict[str, Any] = {}
    """The method's parameters, enough to do it again."""
    parent: str = Field(pattern="^[0-9a-f]{64}$")
    """sha256 of the file that was packed."""
    tensors: dict[str, PackedTensor]

    def metadata(self) -> dict[str, str]:
        """The entry of the file's metadata."""
        return {KEY: self.model_dump_json()}


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
        for part, wanted in entry.parts(name).items():
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
    parts = {part for name, entry in manifest.tensors.items() for part in entry.parts(name)}
    kept = {tensor.name: (tensor.dtype, tuple(tensor.shape)) for tensor in tensors if tensor.name not in parts}
    return kept | {name: (entry.dtype, tuple(entry.shape)) for name, entry in manifest.tensors.items()}
