"""The header of a GGUF file (versions 2 and 3, little-endian), read with every size bounded.

Layout after the GGUF specification of the ggml project: magic, version, counts, key/value
pairs, tensor records, padding, data.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, Never

from modelgrove_hub.errors import CorruptFileError
from modelgrove_hub.store.disk import open_regular, storage_errors
from modelgrove_hub.store.header import name_fault

MAX_PAIRS = 10_000
MAX_TENSORS = 100_000
MAX_STRING = 2**20
MAX_KEY = 1024
MAX_VALUES = 4_000_000
"""Strings and arrays in all arrays together: without it a large file could keep the reader busy for hours."""
MAX_ARRAY = 16 * 2**20
MAX_TEXTS = 2 * 2**20
"""Strings in one array; the largest vocabularies have a quarter of a million."""
MAX_DEPTH = 4
MAX_SIDES = 4
MAX_KEPT = 8 * 2**20
"""Characters of metadata that are kept."""

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_UINT32, _STRING, _ARRAY = 4, 8, 9

BLOCKS: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
"""ggml type → name, elements in a block, bytes of a block."""

GgufHeader = tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]


def parse_gguf(file: BinaryIO, size: int, name: str) -> GgufHeader:
    """Read the header: tensor name → (dtype, shape outermost first), and the metadata as text.

    Arrays in the metadata are only counted ("[32000 × string]").

    Raises:
        CorruptFileError: a rule of the format or a limit is broken; the message has `name`.
    """
    places, metadata = _parse(file, size, name)
    return {place.name: (place.dtype, place.shape) for place in places}, metadata


@dataclass(frozen=True)
class Place:
    """A tensor of a GGUF file: where its bytes are. Blocks lie row by row, rows outermost first."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def places_of(path: Path) -> tuple[Place, ...]:
    """All tensors of the file at `path`; every one lies within it and overlaps no other.

    Raises:
        CorruptFileError: a rule of the format or a limit is broken.
        NotFoundError, DataError, StorageError: the file cannot be opened or read.
    """
    with open_regular(path) as file, storage_errors(path):
        return _parse(file, os.fstat(file.fileno()).st_size, str(path))[0]


def _parse(file: BinaryIO, size: int, name: str) -> tuple[tuple[Place, ...], dict[str, str]]:
    file.seek(0)
    return _Reader(file, size, name).header()


class _Reader:
    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self.file, self.size, self.name, self.kept, self.values, self.alignment = file, size, name, 0, 0, 32

    def header(self) -> tuple[tuple[Place, ...], dict[str, str]]:
        if self.take(4) != b"GGUF":
            self.refuse("it does not start with GGUF")
        version = self.number("<I")
        if version not in (2, 3):
            self.refuse(f"GGUF version {version}; versions 2 and 3, little-endian, are read")
        tensors = self.count("<Q", MAX_TENSORS, "tensors")
        pairs = self.count("<Q", MAX_PAIRS, "key/value pairs")
        metadata = self.metadata(pairs)
        records = [self.record() for _ in range(tensors)]
        if len({record[0] for record in records}) != len(records):
            self.refuse("two tensors have one name")
        return self.places(records), metadata

    def metadata(self, pairs: int) -> dict[str, str]:
        out: dict[str, str] = {}
        for _ in range(pairs):
            key = self.text(MAX_KEY)
            if key in out:
                self.refuse(f"the key {key[:60]!a} is there twice")
            kind = self.number("<I")
            out[key] = self.value(kind, 0)
            if key == "general.alignment":
                self.set_alignment(kind, out[key])
        return out

    def value(self, kind: int, depth: int) -> str:
        if kind in _SCALARS:
            return str(self.number(_SCALARS[kind]))
        if kind == _STRING:
            return self.keep(self.text())
        if kind != _ARRAY:
            self.refuse(f"a value has the unknown type {kind}")
        return self.array(depth)

    def array(self, depth: int) -> str:
        if depth >= MAX_DEPTH:
            self.refuse("arrays are nested too deeply")
        kind = self.number("<I")
        fixed = kind in _SCALARS
        length = self.count("<Q", MAX_ARRAY if fixed else MAX_TEXTS, "array elements")
        if fixed:
            self.skip(length * struct.calcsize(_SCALARS[kind]))
        else:
            self.values += length
            if self.values > MAX_VALUES:
                self.refuse(f"more than {MAX_VALUES} strings and arrays in its metadata")
            for _ in range(length):
                self.value(kind, depth + 1)
        return f"[{length} × {'string' if kind == _STRING else 'array' if kind == _ARRAY else 'number'}]"

    def record(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self.text()
        if fault := name_fault(name):
            self.refuse(f"a tensor has {fault}")
        sides = self.count("<I", MAX_SIDES, "dimensions")
        shape = tuple(self.number("<Q") for _ in range(sides))[::-1]
        kind = self.number("<I")
        if kind not in BLOCKS:
            self.refuse(f"tensor {name!r} has the unknown type {kind}")
        if any(side > 2**48 for side in shape) or prod(shape) > 2**48:
            self.refuse(f"tensor {name!r} claims more than 2^48 elements")
        if shape and shape[-1] % BLOCKS[kind][1]:
            self.refuse(f"tensor {name!r}: rows of {shape[-1]} are no whole blocks of {BLOCKS[kind][0]}")
        return name, kind, shape, self.number("<Q")

    def set_alignment(self, kind: int, value: str) -> None:
        if kind != _UINT32 or not 0 < int(value) <= 2**20:
            self.refuse(f"an alignment of {value[:20]!a}")
        self.alignment = int(value)

    def places(self, records: list[tuple[str, int, tuple[int, ...], int]]) -> tuple[Place, ...]:
        step = self.alignment
        start = -(-self.file.tell() // step) * step
        position, found = 0, []
        for name, kind, shape, offset in sorted(records, key=itemgetter(3)):
            dtype, elements, octets = BLOCKS[kind]
            if offset % step:
                self.refuse(f"tensor {name!r} is not aligned to {step} bytes")
            if offset < position:
                self.refuse(f"tensor {name!r} overlaps the one before")
            position = offset + prod(shape) // elements * octets
            if start + position > self.size:
                self.refuse(f"truncated: tensor {name!r} ends after the file's {self.size} bytes")
            found.append(Place(name, dtype, shape, start + offset, position - offset))
        return tuple(found)

    def text(self, most: int = MAX_STRING) -> str:
        length = self.count("<Q", most, "bytes of a string")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            self.refuse("a string is not UTF-8")

    def keep(self, text: str) -> str:
        self.kept += len(text)
        return text if self.kept <= MAX_KEPT else f"[{len(text)} characters]"

    def count(self, form: str, most: int, what: str) -> int:
        value = self.number(form)
        if value > most:
            self.refuse(f"it claims {value} {what}, at most {most} are allowed")
        return value

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return value  # type: ignore[no-any-return]  # struct cannot tell; callers that need whole numbers pass such forms

    def take(self, length: int) -> bytes:
        if length > self.size - self.file.tell():
            self.refuse("the file ends inside the header")
        data = self.file.read(length)
        if len(data) != length:
            self.refuse("the file ends inside the header")
        return data

    def skip(self, length: int) -> None:
        if length > self.size - self.file.tell():
            self.refuse("the file ends inside the header")
        self.file.seek(length, 1)

    def refuse(self, rule: str) -> Never:
        raise CorruptFileError(f"{self.name}: {rule}")
