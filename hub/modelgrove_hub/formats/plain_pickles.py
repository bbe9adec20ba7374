"""Is a pickle nothing but tensors in plain containers, as `torch.save` writes them? Decided without running it.

Where `formats.pickles` tells what a pickle looks like, this reader refuses all that it does not know: every opcode,
every name that is imported and every member of the archive must be on a list. It is the first of three gates; what
it lets through is still only loaded by `torch.load(weights_only=True)` in a process that can do nothing
(`ingest.unpickling`).
"""

from __future__ import annotations

import pickletools
import re
import stat
import struct
import zipfile
from io import BytesIO
from typing import BinaryIO

from modelgrove_hub.errors import UnsafeFileError
from modelgrove_hub.formats.pickles import DAMAGED_ZIP, MAX_DIRECTORY, MAX_PICKLE, directory_size, inspect_pickle
from modelgrove_hub.formats.texts import readable

MAX_MEMBERS = 200_000
MAX_PROTOCOL = 3
"""torch.save writes 2 unless told otherwise."""
MAX_OPCODES = 4_000_000
"""A checkpoint's pickle has a hundred a tensor."""

_LEGACY, _ZIP = "torch's legacy format", "torch zip archive"
_LEGACY_PICKLES = 5
"""Magic number, protocol, the machine, the object and the keys of its storages; then raw bytes follow."""
_HEADER = struct.Struct("<4sHHHHHIIIHH")
"""A zip member's local header: signature, version, flags, method, time, date, CRC, two sizes, two lengths."""
_END = 22
"""Bytes of the directory's last record, which ends the file."""
_UTF8 = 0x800
_MEMBER = re.compile(
    r"[^/\\]+/(data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/\d+)"
)
_OPCODES = re.compile(
    "PROTO|STOP|MARK|POP|POP_MARK|DUP|NONE|NEWTRUE|NEWFALSE|(BIN)?INT[12]?|LONG[14]?|(BIN)?FLOAT|(SHORT_)?BIN(STRING|BYTES)"
    "|STRING|(SHORT_BIN|BIN)?UNICODE|(EMPTY_)?(LIST|TUPLE|DICT)|EMPTY_SET|TUPLE[123]|APPENDS?|SETITEMS?"
    "|(LONG_)?(BIN)?(GET|PUT)|BINPERSID|GLOBAL|REDUCE|NEWOBJ|BUILD"
)
"""Those of protocols 0 to 3 but INST, OBJ, PERSID and EXT. STACK_GLOBAL, of protocol 4, could hide a name."""
_INERT = re.compile(
    r"collections\.(OrderedDict|Counter)|argparse\.Namespace|_codecs\.encode|(__builtin__|builtins)\.(set|complex)"
    r"|torch\.(cuda\.)?[A-Z]\w*Storage|torch\.storage\.(Untyped|Typed)Storage|torch\.(Size|device|Tensor)"
    r"|torch\.(float|bfloat|uint|int|complex|quint|qint|bits)[a-z0-9_]*|torch\.(bool|half|double|short|long)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter)|torch\.nn\.parameter\.Parameter"
    r"|numpy\.(dtype|ndarray)|numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)|numpy\.dtypes\.[A-Z]\w*DType"
)
"""What may be imported: makers of containers, tensors and numbers, none of which calls anything."""


def is_inert(name: str) -> bool:
    """Whether a pickle may import `name` ("torch._utils._rebuild_tensor_v2")."""
    return _INERT.fullmatch(name) is not None


def check_plain(file: BinaryIO, size: int, name: str) -> None:
    """See that the file, which has `size` bytes, is torch's zip archive or its legacy format, of plain content.

    Raises:
        UnsafeFileError: it is something else, or has a member, opcode or import that tensors do not need; the
            message has `name`.
    """
    report = inspect_pickle(file, size)
    try:
        if report.wrapping == _ZIP:
            _check_pickles(_from_zip(file, size), 1)
        elif report.wrapping == _LEGACY:
            file.seek(0)
            _check_pickles(file.read(MAX_PICKLE), _LEGACY_PICKLES)
        else:
            _refuse(f"it is a {report.wrapping}, which torch.save does not write")
    except _NotPlainError as fault:
        raise UnsafeFileError(f"{name}: {fault}") from None


class _NotPlainError(ValueError):
    """What is not plain, before the file's name is known."""


def _refuse(fault: str) -> None:
    raise _NotPlainError(fault)


def _from_zip(file: BinaryIO, size: int) -> bytes:
    """The pickle of an archive in which the directory and the members agree, and nothing is packed or left over."""
    if directory_size(file, size) > MAX_DIRECTORY:
        _refuse("the archive's directory is oversized")
    file.seek(max(0, size - _END))
    if file.read(4) != b"PK\5\6":
        _refuse("something follows the archive")
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            _check_members(members, size)
            for member in members:
                _check_local(file, member)
            if damaged := archive.testzip():
                _refuse(f"the checksum of its member {readable(damaged, 80)} is wrong")
            [inside] = [member for member in members if member.filename.endswith("/data.pkl")]
            if inside.file_size > MAX_PICKLE:
                _refuse(f"its data.pkl has {inside.file_size} bytes, more than {MAX_PICKLE}")
            return archive.read(inside)
    except _NotPlainError:
        raise
    except DAMAGED_ZIP:
        raise _NotPlainError("the archive is damaged") from None


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    if len(members) > MAX_MEMBERS:
        _refuse(f"the archive has {len(members)} members, more than {MAX_MEMBERS}")
    names = [member.filename for member in members]
    if len(set(names)) != len(names):
        _refuse("the archive has a member twice")
    if odd := [name for name in names if not _MEMBER.fullmatch(name)]:
        _refuse(f"the archive has the member {readable(odd[0], 80)!a}, which torch.save does not write")
    if len({name.partition("/")[0] for name in names}) != 1 or sum(name.endswith("/data.pkl") for name in names) != 1:
        _refuse("the archive does not have one folder with one data.pkl")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            _refuse("the archive is compressed, which torch.save does not do: what it unpacks to is not known")
        if member.flag_bits & 1 or stat.S_ISLNK(member.external_attr >> 16):
            _refuse("the archive has an encrypted member or a link")
    if sum(member.file_size for member in members) > size:
        _refuse("the archive claims more bytes than it has: its members overlap")
    if min(member.header_offset for member in members) != 0:
        _refuse("something lies before the archive")


def _check_local(file: BinaryIO, member: zipfile.ZipInfo) -> None:
    """Readers that start at a member and readers that start at the directory must see the same."""
    file.seek(member.header_offset)
    raw = file.read(_HEADER.size)
    signature, _, flags, method, _, _, _, _, _, length, _ = _HEADER.unpack(raw)
    name = file.read(length)
    written = member.orig_filename.encode("utf-8" if member.flag_bits & _UTF8 else "cp437")
    if signature != b"PK\3\4" or name != written or method != member.compress_type:
        _refuse("a member of the archive is called otherwise in the directory")
    if (flags ^ member.flag_bits) & 1:
        _refuse("a member of the archive is encrypted only in one place")


def _check_pickles(data: bytes, count: int) -> None:
    stream, left = BytesIO(data), MAX_OPCODES
    try:
        for _ in range(count):
            left -= _check_pickle(stream, left)
    except _NotPlainError:
        raise
    except (ValueError, IndexError, OverflowError, KeyError, UnicodeError) as error:
        raise _NotPlainError(f"it is no sound pickle: {readable(str(error), 120)}") from None
    if count == 1 and stream.tell() != len(data):
        _refuse("something follows the pickle")


def _check_pickle(stream: BinaryIO, left: int) -> int:
    """Check the next pickle; how many opcodes it has."""
    number = 0
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream), 1):
        name = opcode.name
        if number > left:
            _refuse(f"it has more than {MAX_OPCODES} opcodes")
        if name == "PROTO" and isinstance(argument, int) and argument > MAX_PROTOCOL:
            _refuse(f"it is of pickle's protocol {argument}; torch.load(weights_only=True) reads up to {MAX_PROTOCOL}")
        if not _OPCODES.fullmatch(name):
            _refuse(f"it has the opcode {name}, which tensors do not need")
        if name == "GLOBAL":
            _check_import(str(argument).replace(" ", "."))
    return number


def _check_import(name: str) -> None:
    if not is_inert(name):
        _refuse(f"it imports {readable(name, 120)!a}, which is no part of a tensor or of a plain container")
