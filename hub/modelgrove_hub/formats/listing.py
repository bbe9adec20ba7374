"""What recognition sees of a model: names, dtypes and shapes of its tensors, and its small texts.

`list_model` reads headers and JSON only. Weights stay on disk; pickles stay closed.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from modelgrove_hub.errors import CorruptFileError, NotFoundError
from modelgrove_hub.formats import sara
from modelgrove_hub.formats.card import Card
from modelgrove_hub.formats.content import Format, detect
from modelgrove_hub.formats.gguf import parse_gguf
from modelgrove_hub.formats.onnx import OnnxGraph, parse_onnx
from modelgrove_hub.formats.pickles import PickleReport, inspect_pickle
from modelgrove_hub.formats.quantized import check_parts, original_tensors, read_manifest
from modelgrove_hub.store.disk import open_regular, storage_errors
from modelgrove_hub.store.header import Header, TensorInfo, parse_header

MAX_SCALARS = 20_000
"""One-element tensors whose value is read (kohya keeps each module's alpha in one)."""

_SCALARS = {"F16": "<e", "F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i", "U8": "<B"}


class Role(StrEnum):
    """What a file is for in its model."""

    WEIGHTS = "weights"
    SPARE = "spare weights"
    """Other copies of the weights: another precision, another format, a single file beside the parts."""
    PICKLE = "pickle"
    INDEX = "shard index"
    CONFIG = "config"
    CARD = "card"
    CODE = "code"
    OTHER = "other"


class ListedTensor(NamedTuple):
    """A tensor as its file's header describes it; `shape` outermost first."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Contents:
    """What one weight file holds."""

    format: Format
    tensors: Mapping[str, ListedTensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    pickle: PickleReport | None = None
    stored: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the tensors that a safetensors file holds, packed parts under their own names."""
    data: tuple[str, ...] = ()
    """Other files that hold data of an ONNX graph: paths from its folder."""


@dataclass(frozen=True)
class Listing:
    """A whole model, seen from outside.

    In a folder with parts (a diffusers pipeline) tensor names are "part/name" and `parts` says
    which there are; otherwise `parts` is empty and names are as in the file.
    """

    format: str
    tensors: Mapping[str, ListedTensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Parsed JSON by path in the model."""
    files: Mapping[str, Role] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Values of the one-element tensors."""
    pickles: Mapping[str, PickleReport] = field(default_factory=dict)
    card: Card = field(default_factory=Card)
    notes: tuple[str, ...] = ()
    """What is odd about the files and yet read by every loader."""


def list_model(path: Path, within: Path | None = None) -> Listing:
    """List the model in a file or folder without loading weights.

    Links in a folder may not lead out of `within` (default: the folder itself).

    Raises:
        CorruptFileError: a header, index or config breaks its format's rules, or shards are missing.
        UnsafeFileError: a link leads out of the folder.
        DataError: there are no weights, or more files than a model has.
        NotFoundError: there is nothing at `path`.
    """
    if path.is_dir():
        from modelgrove_hub.formats.folders import list_folder  # folders are made of files, not the reverse

        return list_folder(path, within or path)
    if not path.exists():
        raise NotFoundError(f"{path}: no such file or folder")
    contents = read_contents(path)
    role = Role.PICKLE if contents.pickle else Role.WEIGHTS
    return Listing(
        format=contents.format,
        tensors=contents.tensors,
        metadata=contents.metadata,
        files={path.name: role, **dict.fromkeys(contents.data, Role.WEIGHTS)},
        scalars=contents.scalars,
        pickles={path.name: contents.pickle} if contents.pickle else {},
    )


def read_contents(path: Path) -> Contents:
    """List one weight file, of whatever format its bytes show.

    Raises:
        CorruptFileError: it is of no known format, or breaks the rules of its own.
    """
    form = detect(path)
    with open_regular(path) as file, storage_errors(path):
        size = file.seek(0, 2)
        file.seek(0)
        if form is Format.SAFETENSORS:
            header = parse_header(file, size, str(path))
            stored = {tensor.name: tensor.end - tensor.start for tensor in header.tensors}
            listed, scalars = _listed(header, str(path)), _read_scalars(file, header)
            return Contents(form, listed, header.metadata, scalars, stored=stored)
        if form is Format.GGUF:
            tensors, metadata = parse_gguf(file, size, str(path))
        elif form is Format.ONNX:
            graph = parse_onnx(file, size, str(path))
            tensors, metadata = graph.tensors, graph.metadata
        else:
            return Contents(form, pickle=inspect_pickle(file, size))
    listed = {name: ListedTensor(*entry) for name, entry in tensors.items()}
    return Contents(form, listed, metadata, data=_data_of(path, graph) if form is Format.ONNX else ())


def _data_of(path: Path, graph: OnnxGraph) -> tuple[str, ...]:
    places = sorted({PurePosixPath(place).as_posix() for place in graph.places})
    if missing := [place for place in places if not (path.parent / place).is_file()]:
        raise CorruptFileError(f"{path}: data of its initialisers are in {missing[0]!a}, which is not beside it")
    return tuple(places)


def _listed(header: Header, where: str) -> dict[str, ListedTensor]:
    """The tensors, those that modelgrove packed as they were before."""
    if sparse := sara.read_manifest(header.metadata, where):
        sara.check_parts(sparse, header.tensors, where)
    manifest = read_manifest(header.metadata, where)
    if manifest is None:
        return {tensor.name: ListedTensor(tensor.dtype, tensor.shape) for tensor in header.tensors}
    check_parts(manifest, header.tensors, where)
    return {name: ListedTensor(*entry) for name, entry in original_tensors(manifest, header.tensors).items()}


def _read_scalars(file: BinaryIO, header: Header) -> dict[str, float]:
    ones = [tensor for tensor in header.tensors if tensor.shape in ((), (1,))]
    found = ((tensor.name, _scalar(file, header.data_start, tensor)) for tensor in ones[:MAX_SCALARS])
    return {name: value for name, value in found if value is not None}


def _scalar(file: BinaryIO, data_start: int, tensor: TensorInfo) -> float | None:
    file.seek(data_start + tensor.start)
    raw = file.read(tensor.end - tensor.start)
    if tensor.dtype == "BF16" and len(raw) == 2:
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    form = _SCALARS.get(tensor.dtype)
    return float(struct.unpack(form, raw)[0]) if form and len(raw) == struct.calcsize(form) else None
