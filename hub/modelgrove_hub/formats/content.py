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
_TITLES = {
    Format.SAFETENSORS: "a safetensors file",
    Format.GGUF: "a GGUF file",
    Format.ONNX: "an ONNX model",
    Format.PICKLE: "a pickle (or an archive of pickles)",
}
_OTHERS = {
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\x1f\x8b": "a gzip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ\0": "an xz file",
    b"\x28\xb5\x2f\xfd": "a Zstandard file",
    b"version https://git-lfs": "a Git LFS pointer, not the file: run git lfs pull",
    b"<!doctype html": "a web page",
    b"<!DOCTYPE html": "a web page",
    b"<html": "a web page",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy file",
}
"""First bytes of files that are often met under a weight file's name."""


def detect(path: Path) -> Format:
    """The format of the file at `path`.

    A file that is none of ours by its bytes but claims by its suffix to be one is given that
    format, so that the reader can say what is wrong with it.

    Raises:
        CorruptFileError: its bytes are of another format than its name says, or of none that is known.
        NotFoundError, DataError, StorageError: it cannot be opened.
    """
    claimed = _SUFFIXES.get(path.suffix)
    found = _by_bytes(path)
    if isinstance(found, Format):
        if claimed and found is not claimed:
            raise CorruptFileError(f"{path}: is {_TITLES[found]}, not {_TITLES[claimed]}")
        return found
    if claimed and not found.startswith("is "):
        return claimed
    raise CorruptFileError(f"{path}: {found}; known weight formats are safetensors, GGUF, ONNX and pickle")


def _by_bytes(path: Path) -> Format | str:
    """The format, or what is known of a file that has none of ours."""
    with open_regular(path) as file, storage_errors(path):
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(32)
        if _starts_safetensors(start, size):
            return Format.SAFETENSORS
        if start.startswith(b"GGUF"):
            return Format.GGUF
        if looks_like_pickle(file, size):
            return Format.PICKLE
        if looks_like_onnx(file, size):
            return Format.ONNX
    if size == 0:
        return "is empty"
    what = next((what for mark, what in _OTHERS.items() if start.startswith(mark)), None)
    return f"is {what}" if what else f"starts with {start[:8].hex(' ')}"


def _starts_safetensors(start: bytes, size: int) -> bool:
    # A header of 640 bytes starts like a pickle of protocol 2, so this is asked first.
    return len(start) > 8 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] <= size - 8
