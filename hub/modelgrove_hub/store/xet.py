"""Xet objects, as Hugging Face's clients send large files: xorbs of compressed chunks, shards that say what they make.

Format: "Xet Protocol Specification" 1.1 (huggingface.co/docs/xet), sections Xorb and Shard. Clients name chunks by
BLAKE3 trees; here only the SHA-256 of whole files counts, which a shard states.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from modelgrove_hub.errors import CorruptFileError

LARGEST_XORB = 80 << 20
"""Bytes; the specification allows 64 MiB, and clients add a footer."""
LARGEST_SHARD = 128 << 20
_LARGEST_CHUNK = 1 << 20
"""Bytes of a chunk when unpacked; clients make 128 KiB at most."""
_TAG = b"HFRepoMetaData\0"
_HEADER = struct.Struct("<32sQQ")
_ROW = 48
_FILE = struct.Struct("<32sIIQ")
_SEGMENT = struct.Struct("<32sIIII")
_BOOKEND = b"\xff" * 32
_WITH_VERIFICATION, _WITH_SHA256 = 1 << 31, 1 << 30
_CHUNK = struct.Struct("<B3sB3s")
_PLAIN, _LZ4, _GROUPED_LZ4 = range(3)
_FOOTER = b"XETBLOB"


class Segment(NamedTuple):
    """A part of a file: chunks [first, last) of a xorb, `size` bytes when unpacked."""

    xorb: str
    first: int
    last: int
    size: int


@dataclass(frozen=True)
class ShardFile:
    """A file that a shard describes."""

    sha256: str
    segments: tuple[Segment, ...]


class Chunk(NamedTuple):
    """A chunk where it lies in a xorb."""

    offset: int
    """Of its packed bytes."""
    packed: int
    scheme: int
    size: int
    """When unpacked."""


def read_shard(data: bytes) -> list[ShardFile]:
    """The files that a shard describes.

    Raises:
        CorruptFileError: it is no shard, or a file in it has no SHA-256.
    """
    if len(data) < _HEADER.size + _ROW or not data.startswith(_TAG):
        raise CorruptFileError("this is no shard")
    files: list[ShardFile] = []
    place = _HEADER.size
    while True:
        name, flags, count, _ = _FILE.unpack(_row(data, place))
        place += _ROW
        if name == _BOOKEND:
            return files
        rows = count * (2 if flags & _WITH_VERIFICATION else 1) + bool(flags & _WITH_SHA256)
        if place + rows * _ROW > len(data):
            raise CorruptFileError("the shard ends inside a file")
        if not flags & _WITH_SHA256:
            raise CorruptFileError(f"the shard does not say the SHA-256 of file {hash_text(name)}")
        segments = (_SEGMENT.unpack(_row(data, place + number * _ROW)) for number in range(count))
        last = _row(data, place + (rows - 1) * _ROW)
        files.append(
            ShardFile(
                # Hashes are four little-endian integers, and so is this one.
                hash_text(last[:32]),
                tuple(Segment(hash_text(xorb), first, stop, size) for xorb, _, size, first, stop in segments),
            )
        )
        place += rows * _ROW


def list_chunks(xorb: BinaryIO, size: int) -> list[Chunk]:
    """The chunks of a xorb, from their headers.

    Raises:
        CorruptFileError: it is none, or a chunk is larger than any client makes.
    """
    chunks: list[Chunk] = []
    place = 0
    while place < size:
        xorb.seek(place)
        header = xorb.read(_CHUNK.size)
        if header.startswith(_FOOTER):
            break
        if len(header) < _CHUNK.size:
            raise CorruptFileError("the xorb ends inside a chunk's header")
        version, packed, scheme, unpacked = _CHUNK.unpack(header)
        chunk = Chunk(place + _CHUNK.size, _uint24(packed), scheme, _uint24(unpacked))
        if version != 0 or scheme > _GROUPED_LZ4 or chunk.size > _LARGEST_CHUNK:
            raise CorruptFileError(f"chunk {len(chunks)} of the xorb: version {version}, scheme {scheme}")
        place = chunk.offset + chunk.packed
        if place > size:
            raise CorruptFileError(f"the xorb ends inside chunk {len(chunks)}")
        chunks.append(chunk)
    return chunks


def unpack(xorb: BinaryIO, chunk: Chunk) -> bytes:
    """A chunk's bytes.

    Raises:
        CorruptFileError: they are not as many as it says, or cannot be unpacked.
    """
    xorb.seek(chunk.offset)
    packed = xorb.read(chunk.packed)
    data = packed if chunk.scheme == _PLAIN else _decompress(packed, chunk.size)
    if len(data) != chunk.size:
        raise CorruptFileError(f"a chunk of the xorb has {len(data)} bytes, not {chunk.size}")
    return _ungrouped(data) if chunk.scheme == _GROUPED_LZ4 else data


def hash_text(digest: bytes) -> str:
    """A hash as Xet writes it: four little-endian integers of 64 bits in hexadecimal digits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


def _row(data: bytes, place: int) -> bytes:
    row = data[place : place + _ROW]
    if len(row) < _ROW:
        raise CorruptFileError("the shard ends inside a row")
    return row


def _uint24(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _decompress(data: bytes, most: int) -> bytes:
    from lz4.frame import LZ4FrameDecompressor

    try:
        # One byte more than it may have shows a bomb without unpacking it.
        return bytes(LZ4FrameDecompressor().decompress(data, max_length=most + 1))
    except (RuntimeError, EOFError) as error:
        raise CorruptFileError(f"a chunk of the xorb cannot be unpacked: {error}") from None


def _ungrouped(data: bytes) -> bytes:
    """Undo the grouping of bytes by their place in words of four."""
    size, made, start = len(data), bytearray(len(data)), 0
    for place in range(4):
        count = len(range(place, size, 4))
        made[place::4] = data[start : start + count]
        start += count
    return bytes(made)
