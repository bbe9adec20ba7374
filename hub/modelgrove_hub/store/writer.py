"""Write a safetensors file tensor by tensor, without holding it in memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from modelgrove_hub.errors import UsageError
from modelgrove_hub.store.disk import create_temporary, publish, storage_errors
from modelgrove_hub.store.dtypes import DTYPES, NAMES
from modelgrove_hub.store.header import (
    MAX_DIMENSIONS,
    MAX_HEADER,
    MAX_TENSORS,
    METADATA,
    metadata_fault,
    name_fault,
)

if TYPE_CHECKING:
    from torch import Tensor

BUFFER = 32 * 2**20
"""Bytes of tensors kept in memory. Smaller files are laid out exactly, larger ones are streamed."""
ROOM = 2**20
"""Bytes kept free for the header of a streamed file: about 8,000 tensors. More make one extra copy at the end."""


class _Entry(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class SafetensorsWriter:
    """Writes `path`, which appears whole at `close` or not at all.

    Used as a context manager it closes at the end and aborts on an exception. Files up to
    `BUFFER` bytes have their tensors sorted by element size, so that each is aligned; larger
    ones keep the order of `add`, after a header padded to `ROOM` bytes with spaces, which the
    format allows.

    Raises:
        UsageError: the metadata cannot be written.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        self._path = path
        self._metadata = dict(metadata or {})
        if fault := metadata_fault(self._metadata):
            raise UsageError(f"{path}: {fault}")
        self._entries: dict[str, _Entry] = {}
        self._buffer: dict[str, bytes] = {}
        self._buffered = 0
        self._stream: tuple[BinaryIO, Path] | None = None
        self._open = True

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor (moved to the CPU, made contiguous). A name may be used once.

        Raises:
            UsageError: the name or the tensor cannot be stored, or the writer is closed.
            StorageError: the disk refuses; the writer is aborted.
        """
        self._check_open()
        entry = self._entry(name, tensor)
        data = bytes_of(tensor)
        try:
            with storage_errors(self._path):
                self._store(entry, data)
        except BaseException:
            self.abort()
            raise
        self._entries[name] = entry

    def describe(self, key: str, value: str) -> None:
        """Add an entry to the metadata at any time before the end; said again, it is replaced.

        Raises:
            UsageError: the entry cannot be written, or the writer is closed.
        """
        self._check_open()
        if fault := metadata_fault({key: value}):
            raise UsageError(f"{self._path}: {fault}")
        self._metadata[key] = value

    def close(self) -> None:
        """Finish the file: write the header, flush to disk, give it its name.

        Raises:
            UsageError: the writer was closed before, or metadata or header would be too large.
            StorageError: the disk refuses.
        """
        self._check_open()
        try:
            with storage_errors(self._path):
                if self._stream is None:
                    self._write_at_once()
                else:
                    self._finish_stream(*self._stream)
        finally:
            self.abort()

    def abort(self) -> None:
        """Forget everything and leave nothing behind. Does no harm after `close`."""
        self._open = False
        self._buffer.clear()
        if self._stream:
            file, temporary = self._stream
            file.close()
            temporary.unlink(missing_ok=True)
        self._stream = None

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind:
            self.abort()
        elif self._open:
            self.close()

    def _check_open(self) -> None:
        if not self._open:
            raise UsageError(f"{self._path}: this file is closed already")

    def _entry(self, name: str, tensor: Tensor) -> _Entry:
        if fault := name_fault(name):
            raise UsageError(f"{self._path}: a tensor has {fault}: {name[:80]!a}")
        if name in self._entries:
            raise UsageError(f"{self._path}: there is a tensor {name!r} already")
        if len(self._entries) == MAX_TENSORS:
            raise UsageError(f"{self._path}: more than {MAX_TENSORS} tensors")
        dtype, shape = NAMES.get(str(tensor.dtype)), tuple(tensor.shape)
        if dtype is None:
            raise UsageError(f"tensor {name!r} is {tensor.dtype}; safetensors knows {', '.join(DTYPES)}")
        if tensor.is_meta or str(tensor.layout) != "torch.strided":
            raise UsageError(f"tensor {name!r} is {tensor.layout} on {tensor.device}; make it dense on a real device")
        if len(shape) > MAX_DIMENSIONS or (dtype == "F4" and not shape):
            raise UsageError(f"tensor {name!r} has {len(shape)} dimensions, 0 to {MAX_DIMENSIONS} can be stored")
        nbytes = tensor.numel() * tensor.element_size()
        return _Entry(name, dtype, (*shape[:-1], shape[-1] * 2) if dtype == "F4" else shape, nbytes)

    def _store(self, entry: _Entry, data: memoryview) -> None:
        if self._stream is None and self._buffered + entry.nbytes <= BUFFER:
            self._buffer[entry.name] = bytes(data)  # a copy: the caller may change the tensor later
            self._buffered += entry.nbytes
        else:
            file, _ = self._stream or self._start_stream()
            file.write(data)

    def _start_stream(self) -> tuple[BinaryIO, Path]:
        self._stream = create_temporary(self._path.parent)
        file, _ = self._stream
        file.seek(8 + ROOM)
        for name in list(self._buffer):
            file.write(self._buffer.pop(name))
        return self._stream

    def _write_at_once(self) -> None:
        entries = sorted(self._entries.values(), key=lambda entry: -DTYPES[entry.dtype].bits)
        header = self._header(entries, 0)
        self._stream = file, temporary = create_temporary(self._path.parent)
        file.write(header)
        file.writelines(self._buffer[entry.name] for entry in entries)
        publish(file, temporary, self._path)

    def _finish_stream(self, file: BinaryIO, temporary: Path) -> None:
        header = self._header(self._entries.values(), ROOM)
        if len(header) > 8 + ROOM:
            file, temporary = self._move_data(header, file, temporary)
        else:
            file.seek(0)
            file.write(header)
        publish(file, temporary, self._path)

    def _move_data(self, header: bytes, source: BinaryIO, old: Path) -> tuple[BinaryIO, Path]:
        """The header outgrew its room: copy the data behind it into a second file."""
        with source:
            old.unlink()  # an open file keeps its bytes until it is closed
            self._stream = file, _ = create_temporary(self._path.parent)
            file.write(header)
            source.seek(8 + ROOM)
            while block := source.read(2**20):
                file.write(block)
        return self._stream

    def _header(self, entries: Iterable[_Entry], room: int) -> bytes:
        """Length and JSON, padded with spaces to `room` bytes and to a multiple of eight."""
        if fault := metadata_fault(self._metadata):
            raise UsageError(f"{self._path}: {fault}")
        table: dict[str, Any] = {METADATA: dict(sorted(self._metadata.items()))} if self._metadata else {}
        position = 0
        for name, dtype, shape, nbytes in entries:
            table[name] = {"dtype": dtype, "shape": shape, "data_offsets": (position, position + nbytes)}
            position += nbytes
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(max(room, -(-len(text) // 8) * 8))
        if len(text) > MAX_HEADER:
            raise UsageError(f"{self._path}: a header of {len(text)} bytes, more than {MAX_HEADER}")
        return struct.pack("<Q", len(text)) + text


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's values as they are stored, in row-major order."""
    import torch

    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # as_strided: a tensor of one element counts as contiguous whatever its stride, but cannot be viewed.
    return memoryview(plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy())
