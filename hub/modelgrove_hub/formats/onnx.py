"""The parameters of an ONNX graph, read from the protobuf wire format without its schema.

Field numbers after onnx.proto: ModelProto.graph = 7, metadata_props = 14; GraphProto.node = 1,
initializer = 5; TensorProto.dims = 1, data_type = 2, name = 8, external_data = 13. The data are passed over. A graph
is opaque here: its nodes are counted, never run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import BinaryIO, Never

from modelgrove_hub.errors import CorruptFileError
from modelgrove_hub.formats.walking import MAX_FILES
from modelgrove_hub.store.disk import open_regular, storage_errors
from modelgrove_hub.store.header import MAX_ELEMENTS, name_fault

MAX_INITIALISERS = 100_000
MAX_SIDES = 8
MAX_TEXT = 64 * 1024
MAX_PROPERTIES = 1000
MAX_PLACE = 1024
MAX_FIELDS = 1_000_000
"""Fields that are looked at in one file; the largest exports have tens of thousands of nodes."""
MAX_TOP_FIELDS = 20_000
"""Of the model itself, by which an ONNX file is told from others: a graph, opsets, properties, functions."""

_DTYPES = {
    1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 8: "STRING", 9: "BOOL", 10: "F16",
    11: "F64", 12: "U32", 13: "U64", 14: "C64", 15: "C128", 16: "BF16", 17: "F8_E4M3", 18: "F8_E4M3FNUZ",
    19: "F8_E5M2", 20: "F8_E5M2FNUZ", 21: "U4", 22: "I4", 23: "F4",
}  # fmt: skip
_UP = re.compile(r"(^|[/\\])\.\.([/\\]|$)")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class _BrokenError(ValueError):
    """The bytes are no protobuf, or break a limit."""


class _Wire:
    """The file, how many more fields of it will be looked at, and the elements of the tensors so far."""

    def __init__(self, file: BinaryIO, left: int) -> None:
        self.file, self.left, self.elements = file, left, 0


@dataclass
class OnnxGraph:
    """A graph's parameters and what the exporter wrote about it."""

    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    nodes: int = 0
    places: set[str] = field(default_factory=set)
    """Files with data of the initialisers: paths from the model's own folder, never out of it."""


def looks_like_onnx(file: BinaryIO, size: int) -> bool:
    """Whether the whole file is one protobuf message with an IR version first and a graph."""
    try:
        fields = [(number, kind) for number, kind, _ in _fields(_Wire(file, MAX_TOP_FIELDS), 0, size)]
    except _BrokenError:
        return False
    return bool(fields) and fields[0] == (1, _VARINT) and (7, _BYTES) in fields


def parse_onnx(file: BinaryIO, size: int, name: str) -> OnnxGraph:
    """List the initialisers (name → dtype, shape) and properties of the model.

    Raises:
        CorruptFileError: the bytes are no ONNX model, or a limit is broken; the message has `name`.
    """
    graph, graphs, wire = OnnxGraph(), 0, _Wire(file, MAX_FIELDS)
    try:
        for number, kind, value in _fields(wire, 0, size):
            if kind == _BYTES and number == 7:
                _read_graph(wire, value, graph)
                graphs += 1
            elif kind == _BYTES and number == 14:
                _read_property(wire, value, graph)
            elif kind == _BYTES and number == 2:
                graph.metadata["producer"] = _text(wire, value)
        if graphs != 1:
            _refuse("no graph" if graphs == 0 else f"{graphs} graphs")
    except _BrokenError as error:
        raise CorruptFileError(f"{name}: not a sound ONNX model: {error}") from None
    return graph


def data_files(path: Path) -> set[Path]:
    """The files, there or not, in which the ONNX model at `path` keeps data of its initialisers.

    Raises:
        CorruptFileError: see `parse_onnx`.
        NotFoundError, DataError, StorageError: it cannot be opened or read.
    """
    with open_regular(path) as file, storage_errors(path):
        size = file.seek(0, 2)
        return {path.parent / place for place in parse_onnx(file, size, str(path)).places}


def _read_graph(wire: _Wire, span: tuple[int, int], graph: OnnxGraph) -> None:
    for number, kind, value in _fields(wire, *span):
        if kind != _BYTES:
            continue
        if number == 1:
            graph.nodes += 1
        elif number == 5:
            _read_initialiser(wire, value, graph)


def _read_initialiser(wire: _Wire, span: tuple[int, int], graph: OnnxGraph) -> None:
    name, code, shape = "", 0, []
    for number, kind, value in _fields(wire, *span):
        if number == 1:
            shape += [value[0]] if kind == _VARINT else list(_varints(wire, value))
        elif number == 2 and kind == _VARINT:
            code = value[0]
        elif number == 8 and kind == _BYTES:
            name = _text(wire, value)
        elif number == 13 and kind == _BYTES:
            _read_place(wire, value, graph)
        if len(shape) > MAX_SIDES:
            _refuse(f"an initialiser has more than {MAX_SIDES} dimensions")
    if fault := name_fault(name):
        _refuse(f"an initialiser has {fault}")
    if name in graph.tensors:
        _refuse(f"two initialisers are called {name!r}")
    if code not in _DTYPES:
        _refuse(f"initialiser {name!r} has the unknown type {code}")
    wire.elements += prod(shape)
    if any(side >= MAX_ELEMENTS for side in shape) or wire.elements > MAX_ELEMENTS:
        _refuse(f"initialiser {name!r} has an impossible size")
    if len(graph.tensors) >= MAX_INITIALISERS:
        _refuse(f"more than {MAX_INITIALISERS} initialisers")
    graph.tensors[name] = (_DTYPES[code], tuple(shape))


def _read_place(wire: _Wire, span: tuple[int, int], graph: OnnxGraph) -> None:
    """Data in another file must lie in the model's own folder."""
    key, place = _entry(wire, span)
    if key != "location":
        return
    if not place or place[0] in "/\\" or place[1:2] == ":" or _UP.search(place) or "\0" in place:
        _refuse(f"data of an initialiser are outside the model's folder: {place[:80]!a}")
    graph.places.add(place)
    if len(place) > MAX_PLACE or len(graph.places) > MAX_FILES:
        _refuse(f"data in more than {MAX_FILES} files, or in one with a path of more than {MAX_PLACE} characters")


def _entry(wire: _Wire, span: tuple[int, int]) -> tuple[str, str]:
    texts = {number: _text(wire, value) for number, kind, value in _fields(wire, *span) if kind == _BYTES}
    return texts.get(1, ""), texts.get(2, "")


def _read_property(wire: _Wire, span: tuple[int, int], graph: OnnxGraph) -> None:
    key, value = _entry(wire, span)
    if len(graph.metadata) < MAX_PROPERTIES and key:
        graph.metadata[key] = value


def _fields(wire: _Wire, start: int, end: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Number, wire type and value of the fields in [start, end): a varint as (value, 0), else the value's span."""
    at = start
    while at != end:
        wire.left -= 1
        if wire.left < 0:
            _refuse("too many fields")
        wire.file.seek(at)
        tag = _varint(wire.file)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            _refuse("a field has the number 0")
        if kind == _VARINT:
            value = (_varint(wire.file), 0)
            at = wire.file.tell()
        else:
            value = _span(wire, kind)
            at = value[1]
        if at > end:
            _refuse("a field ends after the message it is in")
        yield number, kind, value


def _span(wire: _Wire, kind: int) -> tuple[int, int]:
    if kind == _BYTES:
        length = _varint(wire.file)
    elif kind in (_FIXED64, _FIXED32):
        length = 8 if kind == _FIXED64 else 4
    else:
        _refuse(f"the wire type {kind}")
    start = wire.file.tell()
    return start, start + length


def _varints(wire: _Wire, span: tuple[int, int]) -> Iterator[int]:
    wire.file.seek(span[0])
    for _ in range(MAX_SIDES + 1):
        if wire.file.tell() >= span[1]:
            return
        yield _varint(wire.file)


def _varint(file: BinaryIO) -> int:
    value, place = 0, 0
    while place < 64:
        octet = file.read(1)
        if not octet:
            _refuse("the file ends inside a field")
        value |= (octet[0] & 0x7F) << place
        if octet[0] < 0x80:
            return value
        place += 7
    return _refuse("a number is longer than 64 bits")


def _text(wire: _Wire, span: tuple[int, int]) -> str:
    if span[1] - span[0] > MAX_TEXT:
        _refuse(f"a text of {span[1] - span[0]} bytes, at most {MAX_TEXT} are allowed")
    wire.file.seek(span[0])
    try:
        return wire.file.read(span[1] - span[0]).decode("utf-8")
    except UnicodeDecodeError:
        _refuse("a text is not UTF-8")


def _refuse(rule: str) -> Never:
    raise _BrokenError(rule)
