"""Recognise pickles in all the wrappings torch has used, without ever running one.

`pickletools` only splits the opcodes. What it finds is for the report: a pickle can hide what
it imports, so every pickle is quarantined, whatever this reader says.
"""

from __future__ import annotations

import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from typing import BinaryIO

MAX_PICKLE = 16 * 2**20
"""Bytes that are looked at."""
MAX_DIRECTORY = 16 * 2**20
"""Bytes of a zip's central directory."""
MAX_IMPORTS = 20
MAX_OPCODES = 1_000_000
"""Opcodes that are looked at; a checkpoint's pickle has a hundred a tensor."""

_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
_END_OF_DIRECTORY = b"PK\x05\x06"
_ZIP = (b"PK\x03\x04", _END_OF_DIRECTORY)
_END_OF_DIRECTORY_64 = b"PK\x06\x06"
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""How a member may be packed: other methods let the archive say how much memory it takes to unpack it."""
DAMAGED_ZIP = (
    zipfile.BadZipFile, zlib.error, struct.error, ValueError, ArithmeticError, LookupError, OSError, RuntimeError,
    EOFError,
)  # fmt: skip
"""What Python's reader raises on bytes that are no sound archive; OverflowError for places beyond 2^63."""
_TAR_MEMBERS = {b"sys_info", b"pickle", b"tensors", b"storages"}
_SILENT = {"PROTO", "FRAME", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_BEGINNING = 30
_NUMBERED = re.compile(
    r"EMPTY_DICT MARK (?:\w*UNICODE=threshold BINFLOAT )?BININT1=0 GLOBAL=torch\._utils _rebuild_tensor_v2 .*?"
    r"BINPERSID BININT\d?\S* BININT\d?\S* TUPLE1 "
)
"""A dict's first opcodes up to the size of its first tensor, which is one number."""
_STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}


@dataclass(frozen=True)
class PickleReport:
    """What kind of pickle a file is, and the names it would import (those it does not hide)."""

    wrapping: str
    imports: tuple[str, ...] = ()
    numbered: bool = False
    """Whether it is a dict of vectors by number, from 0, as SaRA's optimizer saves what it trained."""


def looks_like_pickle(file: BinaryIO, size: int) -> bool:
    """Whether the file is a zip or tar archive, torch's old format or a bare pickle. It is read from its start."""
    start = _read_at(file, 0, 512)
    if start.startswith((*_ZIP, _LEGACY)) or _is_tar(start):
        return True
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    # Protocols 0 and 1 have no mark: then every byte up to STOP must be an opcode's.
    return start[:1] not in (b"", b".") and _ends_well(_read_at(file, 0, min(size, MAX_PICKLE)))


def inspect_pickle(file: BinaryIO, size: int) -> PickleReport:
    """Name the wrapping and the visible imports of a file for which `looks_like_pickle` holds."""
    start = _read_at(file, 0, 512)
    if start.startswith(_ZIP):
        return _inspect_zip(file, size)
    if _is_tar(start):
        first = start[:100].rstrip(b"\0").removeprefix(b"./")
        return PickleReport("tar archive of torch's first format" if first in _TAR_MEMBERS else "tar archive")
    data = _read_at(file, 0, min(size, MAX_PICKLE))
    wrapping = "torch's legacy format" if start.startswith(_LEGACY) else "bare pickle"
    return PickleReport(wrapping, _imports(data))


def _inspect_zip(file: BinaryIO, size: int) -> PickleReport:
    if directory_size(file, size) > MAX_DIRECTORY:
        return PickleReport("zip archive with an oversized directory")
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            inside = [name for name in names if name.endswith("data.pkl")]
            if not inside:
                return PickleReport("zip archive without torch's data.pkl")
            wrapping = "TorchScript archive" if any("/code/" in name for name in names) else "torch zip archive"
            if archive.getinfo(inside[0]).compress_type not in _PACKED:
                return PickleReport(f"{wrapping}, oddly packed")
            with archive.open(inside[0]) as member:
                data = member.read(MAX_PICKLE)
            return PickleReport(wrapping, _imports(data), _is_numbered(data))
    except DAMAGED_ZIP:
        return PickleReport("damaged zip archive")


def directory_size(file: BinaryIO, size: int) -> int:
    """Bytes that a zip's last record claims for its directory; more than `MAX_DIRECTORY` when there is none."""
    tail = _read_at(file, max(0, size - 65_557), 65_557)
    at = tail.rfind(_END_OF_DIRECTORY)
    if at < 0:
        return MAX_DIRECTORY + 1
    # Readers believe the record of large archives, where there is one, whatever the usual record says.
    large = tail.rfind(_END_OF_DIRECTORY_64, 0, at)
    claims = [tail[at + 12 : at + 16], tail[large + 40 : large + 48] if large >= 0 else b""]
    return max(int.from_bytes(claim, "little") for claim in claims)


def _imports(data: bytes) -> tuple[str, ...]:
    found: dict[str, None] = {}
    strings: list[str] = []
    for name, argument in _opcodes(data):
        if name in _STRINGS and isinstance(argument, str):
            strings = [*strings[-1:], argument]
        elif name in ("GLOBAL", "INST") and isinstance(argument, str):
            found[argument.replace(" ", ".")] = None
        elif name == "STACK_GLOBAL" and len(strings) == 2:
            found[".".join(strings)] = None
        if len(found) >= MAX_IMPORTS:
            break
    return tuple(text[:120] for text in found)


def _is_numbered(data: bytes) -> bool:
    """Whether the pickle begins as a dict does whose first key, or the one after "threshold", is 0 and has a vector."""
    found = ((name, argument) for name, argument in _opcodes(data) if name not in _SILENT)
    begun = " ".join(_word(name, argument) for name, argument in islice(found, _BEGINNING))
    return _NUMBERED.match(begun) is not None


def _word(name: str, argument: object) -> str:
    return f"{name}={argument}" if argument in (0, "threshold") or name == "GLOBAL" else name


def _opcodes(data: bytes) -> Iterator[tuple[str, object]]:
    """The opcodes of one pickle after the other, up to the first byte that is none."""
    stream = BytesIO(data)
    left = MAX_OPCODES
    try:
        while stream.tell() < len(data):
            for opcode, argument, _ in islice(pickletools.genops(stream), left):
                left -= 1
                yield opcode.name, argument
            if not left:
                return
    except (ValueError, IndexError, OverflowError, KeyError):
        return  # a broken end, or torch's raw storages after the last pickle


def _ends_well(data: bytes) -> bool:
    return any(name == "STOP" for name, _ in _opcodes(data))


def _is_tar(start: bytes) -> bool:
    return start[257:262] == b"ustar"


def _read_at(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)
