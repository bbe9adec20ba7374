"""Tell a weight file's format from its bytes; its name counts for nothing unless the bytes are mute."""

from __future__ import annotations

import struct
from enum import StrEnum
from pathlib import Path

from modelgrove_hub.errors import CorruptFileError
from modelgrove_hub.formats.onnx import looks_like_onnx
from modelgrove_hub.formats.pickles import looks_like_pickle
from modelgrove_hub.store.disk import open_regular, storage_errors


class Format(StrEnum):
    """What a weight file is."""

    SAFETENSORS = "safetensors"
    GGUF = "gguf"
    ONNX = "onnx"
    PICKLE = "pickle"


_SUFFIXES = {".safetensors": Format.SAFETENSORS, ".gguf": Format.GGUF, ".onnx": Format.ONNX}


def detect(path: Path) -> Format:
    """The format of the file at `path`.

    A file that is none of ours by its bytes but claims by its suffix to be one is given that
    format, so that the reader can say what is wrong with it.

    Raises:
        CorruptFileError: neither bytes nor name are of a known weight format.
        NotFoundError, DataError, StorageError: it cannot be opened.
    """
    with open_regular(path) as file, storage_errors(path):
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(16)
        if _starts_safetensors(start, size):
            return Format.SAFETENSORS
        if start.startswith(b"GGUF"):
            return Format.GGUF
        if looks_like_pickle(file, size):
            return Format.PICKLE
        if looks_like_onnx(file, size):
            return Format.ONNX
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix]
    what = "is empty" if size == 0 else f"starts with {start[:8].hex(' ')}"
    raise CorruptFileError(f"{path}: no known weight format ({what}); known are safetensors, GGUF, ONNX and pickle")


def _starts_safetensors(start: bytes, size: int) -> bool:
    # A header of 640 bytes starts like a pickle of protocol 2, so this is asked first.
    return len(start) > 8 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] <= size - 8
