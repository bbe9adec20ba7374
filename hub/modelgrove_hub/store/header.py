"""The header of a safetensors file: a strict reader that trusts nothing.

It is stricter than the format's own library wherever two readers could see two different
files: a key given twice, padding that is not spaces, unknown fields, sizes that overflow one
library and not another. Every length is compared with its limit before memory is taken.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import starmap
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Never, Protocol

from modelgrove_hub.errors import CorruptFileError
from modelgrove_hub.store.disk import open_regular, storage_errors
from modelgrove_hub.store.dtypes import DTYPES

MAX_HEADER = 32 * 2**20
"""Bytes. A diffusers checkpoint has 0.1–0.5 MB; 10⁵ tensors with long names have 15 MB."""
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**48
"""Of one tensor, its sizes of zero left out: numpy refuses shapes like (0, 2^62) that torch accepts."""
MAX_NAME = 1024
MAX_METADATA = 8 * 2**20
"""Characters in all. Kohya's tag frequencies reach a few MB in real LoRAs."""
MAX_BRACKETS = 1_000_000
"""`{` and `[` in a header: two arrays and an object a tensor, the rest is room for text in the
metadata. Without it 32 MB of `[],[],[]` would become a GB of Python lists."""
MAX_QUOTES = 4_000_000
"""`"` in a header: ten a tensor, the rest again for text in the metadata."""

METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_UP = re.compile(r"(^|[/\\])\.\.([/\\]|$)")


class TensorInfo(NamedTuple):
    """What the header says of one tensor. `start` and `end` are bytes counted from `Header.data_start`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A header that kept all the rules. Tensors are in file order and fill the data without a gap."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    data_start: int


class Readable(Protocol):
    """Anything that gives the next bytes."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; fewer only at the end."""


class _RefusalError(ValueError):
    """A broken rule, before the file's name is known."""


def read_header(path: Path) -> Header:
    """Read the header of the file at `path`; see `parse_header`.

    Raises:
        CorruptFileError: it is no safetensors file, or a rule is broken.
        NotFoundError, DataError, StorageError: it cannot be opened or read.
    """
    with open_regular(path) as file, storage_errors(path):
        size = file.seek(0, 2)
        file.seek(0)
        return parse_header(file, size, str(path))


def parse_header(file: Readable, size: int, name: str) -> Header:
    """Read the header from `file`, which has `size` bytes and is at its start. It is left at the data.

    Raises:
        CorruptFileError: the message has `name` and the broken rule.
    """
    try:
        text, data_start = _read_text(file, size)
        entries = _parse_json(text)
        metadata = _take_metadata(entries)
        if len(entries) > MAX_TENSORS:
            _refuse(f"{len(entries)} tensors, more than {MAX_TENSORS}")
        tensors = sorted(starmap(_check_tensor, entries.items()), key=_place)
        _check_cover(tensors, size - data_start)
    except _RefusalError as refusal:
        raise CorruptFileError(f"{name}: {refusal}") from None
    return Header(tuple(tensors), metadata, data_start)


def name_fault(name: str) -> str | None:
    """Why a tensor may not have this name, or None.

    Names are never used as paths here, so `/`, spaces, brackets and letters of any script are
    fine; what could deceive a terminal, a page or a careless reader downstream is not.
    """
    if not name:
        return "an empty name"
    if len(name) > MAX_NAME:
        return f"a name of {len(name)} characters, more than {MAX_NAME}"
    if not name.isprintable():
        return "a name with control or invisible characters"
    if name == METADATA:
        return f"the name {METADATA}, which is not a tensor's"
    if ".." in name and _UP.search(name):
        return "a name with a parent folder (..) in it"
    return None


def metadata_fault(metadata: Mapping[str, str]) -> str | None:
    """Why a file may not have this metadata, or None. Both keys and values must be text."""
    total = 0
    for key, value in metadata.items():
        if type(key) is not str or type(value) is not str:
            return f"{METADATA} entry {_shown(key)} is not text"
        total += len(key) + len(value)
        # PostgreSQL stores no NUL, UTF-8 no lone surrogate.
        if "\0" in key + value or not _is_unicode(key + value):
            return f"{METADATA} entry {_shown(key)} has characters that cannot be stored"
    return f"{METADATA} of {total} characters, more than {MAX_METADATA}" if total > MAX_METADATA else None


def _read_text(file: Readable, size: int) -> tuple[str, int]:
    if size < 10:
        _refuse(f"{size} bytes, too short for a safetensors file")
    (length,) = struct.unpack("<Q", _read_exactly(file, 8))
    if length > MAX_HEADER:
        _refuse(f"the header claims {length} bytes, more than {MAX_HEADER}")
    if length > size - 8:
        _refuse(f"the header claims {length} bytes, the file has {size}")
    raw = _read_exactly(file, length)
    if not raw.startswith(b"{"):
        _refuse("the header does not start with '{'")
    if not raw.rstrip(b" ").endswith(b"}"):
        _refuse("the header does not end with '}' and spaces")
    if raw.count(b"{") + raw.count(b"[") > MAX_BRACKETS:
        _refuse(f"the header has more than {MAX_BRACKETS} brackets")
    if raw.count(b'"') > MAX_QUOTES:
        _refuse(f"the header has more than {MAX_QUOTES} quotation marks")
    try:
        return raw.decode("utf-8"), 8 + length
    except UnicodeDecodeError as error:
        _refuse(f"the header is not UTF-8 (byte {error.start})")


def _read_exactly(file: Readable, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        _refuse("the file ends inside the header")
    return data


def _parse_json(text: str) -> dict[str, Any]:
    try:
        entries = json.loads(
            text, object_pairs_hook=_close_object, parse_float=_refuse_number, parse_constant=_refuse_number
        )
    except _RefusalError:
        raise
    except json.JSONDecodeError as error:
        _refuse(f"the header is not JSON: {error.msg} at character {error.pos}")
    except ValueError:  # Python's own limit on the digits of an integer
        _refuse("the header has a number of thousands of digits")
    except RecursionError:
        _refuse("the header is nested too deeply")
    if type(entries) is not dict:
        _refuse("the header is not a JSON object")
    return entries


def _close_object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | tuple[Any, ...]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        [(again, _)] = Counter(key for key, _ in pairs).most_common(1)
        _refuse(f"the header gives the key {_shown(again)} twice")
    if entries.keys() != _FIELDS:
        return entries
    dtype, shape, offsets = entries["dtype"], entries["shape"], entries["data_offsets"]
    if type(shape) is not list or type(offsets) is not list or len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        return entries
    # A tensor. As tuples 10⁵ of them are parsed in half the time: the garbage collector skips them.
    return dtype, tuple(shape), tuple(offsets)


def _refuse_number(text: str) -> Never:
    _refuse(f"the header has the number {_shown(text)}, only integers are allowed")


def _take_metadata(entries: dict[str, Any]) -> dict[str, str]:
    metadata = entries.pop(METADATA, {})
    if type(metadata) is not dict:
        _refuse(f"{METADATA} is not an object")
    if fault := metadata_fault(metadata):
        _refuse(fault)
    return metadata


def _check_tensor(name: str, entry: Any) -> TensorInfo:
    if fault := name_fault(name):
        _refuse(f"a tensor has {fault}: {_shown(name)}")
    if type(entry) is not tuple:
        rule = f"exactly a dtype, a shape (a list of at most {MAX_DIMENSIONS} sizes) and two data_offsets"
        _refuse(f"tensor {_shown(name)} needs {rule}")
    dtype, shape, offsets = entry
    if type(dtype) is not str or dtype not in DTYPES:
        _refuse(f"tensor {_shown(name)} has the unknown dtype {_shown(dtype)}; known are {', '.join(DTYPES)}")
    if not _are_sizes(shape):
        _refuse(f"tensor {_shown(name)}: the shape has something else than sizes ≥ 0")
    if not _are_sizes(offsets) or offsets[0] > offsets[1]:
        _refuse(f"tensor {_shown(name)}: data_offsets are not two positions in rising order")
    if prod(filter(None, shape)) > MAX_ELEMENTS:
        _refuse(f"tensor {_shown(name)} has sizes beyond 2^48 elements")
    start, end = offsets
    if prod(shape) * DTYPES[dtype].bits != (end - start) * 8:
        _refuse(f"tensor {_shown(name)}: {end - start} bytes do not hold {dtype} of shape {_shown(shape)}")
    return TensorInfo(name, dtype, shape, start, end)


def _are_sizes(values: tuple[Any, ...]) -> bool:
    for value in values:  # noqa: SIM110  (a generator here costs a quarter of the parser's time)
        if type(value) is not int or value < 0:
            return False
    return True


def _place(tensor: TensorInfo) -> tuple[int, int]:
    return tensor.start, tensor.end


def _check_cover(tensors: list[TensorInfo], room: int) -> None:
    position = 0
    for tensor in tensors:
        if tensor.start != position:
            fault = "overlaps the one before" if tensor.start < position else "leaves a hole before it"
            _refuse(f"tensor {_shown(tensor.name)} {fault}")
        position = tensor.end
    if position > room:
        _refuse(f"truncated: the tensors need {position} bytes, there are {room}")
    if position < room:
        _refuse(f"{room - position} bytes after the last tensor belong to none")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    """A hostile value made short and printable for a message."""
    text = ascii(value if not isinstance(value, str) else value[:80])
    return text if len(text) <= 80 else f"{text[:77]}…"


def _refuse(rule: str) -> Never:
    raise _RefusalError(rule)
