"""A corpus of safetensors files made to hurt a reader, and of odd ones that are legal.

Each is refused or accepted by the header alone, so `scan`, `read_header` and a whole ingest
must agree. The link is refused twice over: the walk of an ingest does not follow it out of the
folder, and what it points to is no safetensors file.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class HostileFile:
    path: Path
    refused: bool
    why: str


def corpus(folder: Path) -> list[HostileFile]:
    """Write all the files into `folder`; an outside folder for the link is made beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [
        HostileFile(_write(folder / f"{name}.safetensors", content), refused, why)
        for name, refused, why, content in _cases()
    ]
    secret = folder.with_name(f"{folder.name}-outside") / "passwd"
    secret.parent.mkdir(exist_ok=True)
    secret.write_text("root:x:0:0:root:/root:/bin/sh\n")
    link = folder / "link.safetensors"
    link.symlink_to(secret)
    return [*made, HostileFile(link, True, "a link to a file outside the folder")]


Case = tuple[str, bool, str, bytes | Callable[[Path], None]]


def _cases() -> Iterator[Case]:
    yield from _files_cut_or_swapped()
    yield from _bad_frames()
    yield from _bad_json()
    yield from _bad_entries()
    yield from _bad_layouts()
    yield from _bad_names()
    yield from _bad_metadata()
    yield from _odd_but_legal()


# ---- how a file is put together -------------------------------------------------------------


def pack(header: bytes | dict[str, Any], data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file of a header (a dict becomes JSON) and data; `length` is what it claims, if not the truth."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int] | Any, start: int, end: int, dtype: Any = "F32") -> dict[str, Any]:
    """A tensor's entry in the header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


ONE = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
GOOD = pack({"a": entry([2, 3], 0, 24), "b": entry([4], 24, 32, "F16")}, bytes(32))


def _write(path: Path, content: bytes | Callable[[Path], None]) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    return path


def _files_cut_or_swapped() -> Iterator[Case]:
    yield "empty", True, "no bytes at all", b""
    yield "short", True, "shorter than the length field", GOOD[:5]
    yield "cut-header", True, "cut inside the header", GOOD[:40]
    yield "cut-data", True, "the last byte is missing", GOOD[:-1]
    yield "no-data", True, "all data is missing", GOOD[:-32]
    yield "trailing", True, "a byte after the data", GOOD + b"\0"
    yield "appended-zip", True, "a zip archive after the data", GOOD + _zip()
    yield "zip", True, "a zip archive under the name", _zip()
    yield "pickle", True, "a pickle under the name", pickle.dumps({"a": [1, 2, 3]})
    yield "gguf", True, "a GGUF file under the name", b"GGUF" + struct.pack("<IQQ", 3, 0, 0)
    yield "html", True, "an error page under the name", b"<!doctype html><title>404</title>" * 8
    yield "lfs", True, "a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64
    yield "zeros", True, "nothing but zeros", bytes(4096)


def _zip() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps([1]))
    return target.getvalue()


def _bad_frames() -> Iterator[Case]:
    yield "length-max", True, "claims a header of 2^64 - 1 bytes", pack(b"{}", length=2**64 - 1)
    yield "length-sign", True, "claims a header of 2^63 bytes", pack(b"{}", length=2**63)
    yield "length-beyond", True, "the header ends after the file", pack(b"{}", length=100)
    yield "length-zero", True, "an empty header", pack(b"", bytes(8))
    yield "huge-header", True, "a header of 100 MB, all there (a sparse file)", _huge_header
    yield "bom", True, "a byte order mark", pack(b'\xef\xbb\xbf{"a":' + ONE + b"}", bytes(4))
    yield "utf16", True, "UTF-16", pack('{"a":1}'.encode("utf-16-le"))
    yield "latin1", True, "a byte that is no UTF-8", pack(b'{"a\xff":' + ONE + b"}", bytes(4))
    yield "leading-space", True, "does not start with {", pack(b' {"a":' + ONE + b"}", bytes(4))
    for name, padding in (("nul", b"\0\0"), ("newline", b"\n"), ("tab", b" \t "), ("text", b"  x ")):
        yield f"padding-{name}", True, f"padded with {padding!r}", pack(b'{"a":' + ONE + b"}" + padding, bytes(4))


def _huge_header(path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100 * 2**20) + b"{")
        file.truncate(8 + 100 * 2**20)


def _bad_json() -> Iterator[Case]:
    yield "array", True, "an array instead of an object", pack(b"[" + ONE + b"]", bytes(4))
    yield "cut-json", True, "JSON without an end", pack(b'{"a":' + ONE, bytes(4))
    yield "two-objects", True, "a second object", pack(b'{"a":' + ONE + b"}{}", bytes(4))
    yield "comment", True, "a comment", pack(b'{"a":' + ONE + b"/**/}", bytes(4))
    yield "comma", True, "a trailing comma", pack(b'{"a":' + ONE + b",}", bytes(4))
    yield "deep", True, "100,000 arrays in each other", pack(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    yield "brackets", True, "millions of empty arrays", pack(b'{"a":[' + b"[]," * 2_000_000 + b"[]]}")
    yield "quotes", True, "millions of empty texts", pack(b'{"a":[' + b'"",' * 2_500_000 + b'""]}')
    yield "nan", True, "NaN as an offset", pack(ONE.replace(b"[0,4]", b"[NaN,4]").join((b'{"a":', b"}")), bytes(4))
    yield "infinity", True, "Infinity as a size", pack(b'{"a":' + ONE.replace(b"[1]", b"[Infinity]") + b"}", bytes(4))
    yield (
        "digits",
        True,
        "an integer of 10,000 digits",
        pack(b'{"a":' + ONE.replace(b"[1]", b"[1" + b"0" * 10_000 + b"]") + b"}", bytes(4)),
    )
    yield "twice-tensor", True, "a tensor given twice", pack(b'{"a":' + ONE + b',"a":' + ONE + b"}", bytes(4))
    yield (
        "twice-escaped",
        True,
        "given twice, once escaped",
        pack(b'{"a":' + ONE + b',"\\u0061":' + ONE.replace(b"F32", b"I32") + b"}", bytes(4)),
    )
    yield (
        "twice-field",
        True,
        "a field given twice",
        pack(b'{"a":' + ONE.replace(b'"shape"', b'"dtype":"I32","shape"') + b"}", bytes(4)),
    )
    yield (
        "twice-metadata",
        True,
        "__metadata__ given twice",
        pack(b'{"__metadata__":{},"a":' + ONE + b',"__metadata__":{}}', bytes(4)),
    )
    yield (
        "twice-licence",
        True,
        "a key of the metadata given twice",
        pack(b'{"__metadata__":{"licence":"MIT","licence":"none"},"a":' + ONE + b"}", bytes(4)),
    )


def _bad_entries() -> Iterator[Case]:
    entries: dict[str, Any] = {
        "null": None,
        "number": 4,
        "no-dtype": {"shape": [1], "data_offsets": [0, 4]},
        "no-shape": {"dtype": "F32", "data_offsets": [0, 4]},
        "no-offsets": {"dtype": "F32", "shape": [1]},
        "more-fields": {**entry([1], 0, 4), "note": "unknown field"},
        "dtype-unknown": entry([1], 0, 4, "F33"),
        "dtype-lower": entry([1], 0, 4, "f32"),
        "dtype-list": entry([1], 0, 4, ["F32"]),
        "dtype-wrong": entry([1], 0, 4, "F64"),
        "shape-number": entry(1, 0, 4),
        "shape-negative": entry([-1, -1], 0, 4),
        "shape-float": entry([1.0], 0, 4),
        "shape-text": entry(["1"], 0, 4),
        "shape-true": entry([True], 0, 4),
        "shape-nested": entry([[1]], 0, 4),
        "shape-too-large": entry([2], 0, 4),
        "shape-overflow": entry([2**32, 2**32], 0, 0),
        "shape-overflow-to-size": entry([2**62 + 1, 4], 0, 4, "U8"),
        "shape-empty-overflow": entry([0, 2**62], 0, 0),
        "dimensions-9": entry([1] * 9, 0, 4),
        "dimensions-100000": entry([1] * 100_000, 0, 4),
        "offsets-negative": entry([1], -4, 0),
        "offsets-reversed": entry([1], 4, 0),
        "offsets-float": {**entry([1], 0, 4), "data_offsets": [0.0, 4.0]},
        "offsets-text": {**entry([1], 0, 4), "data_offsets": ["0", "4"]},
        "offsets-three": {**entry([1], 0, 4), "data_offsets": [0, 4, 4]},
        "offsets-one": {**entry([1], 0, 4), "data_offsets": [4]},
        "offsets-beyond-u64": entry([1], 2**64, 2**64 + 4),
        "f4-half-byte": entry([3], 0, 1, "F4"),
    }
    for name, value in entries.items():
        yield name, True, f"a tensor with {name.replace('-', ' ')}", pack({"a": value}, bytes(4))


def _bad_layouts() -> Iterator[Case]:
    yield "overlap", True, "two tensors share bytes", pack({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12))
    yield "same-span", True, "two tensors in one place", pack({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4))
    yield "inside", True, "one tensor inside another", pack({"a": entry([4], 0, 16), "b": entry([1], 4, 8)}, bytes(16))
    yield "hole", True, "bytes between two tensors", pack({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12))
    yield "hole-first", True, "bytes before the first tensor", pack({"a": entry([1], 4, 8)}, bytes(8))
    yield (
        "empty-in-hole",
        True,
        "a tensor of no bytes in another",
        pack({"a": entry([2], 0, 8), "b": entry([0], 4, 4)}, bytes(8)),
    )
    yield "no-tensors-data", True, "data without a tensor", pack({}, bytes(16))


def _bad_names() -> Iterator[Case]:
    names = {
        "empty": "",
        "nul": "a\0b",
        "newline": "a\nb",
        "escape": "a\x1b[2Jb",
        "override": "a\u202egpj.b",
        "zero-width": "a\u200bb",
        "parents": "../../../etc/passwd",
        "parent-inside": "model/../weight",
        "backslashes": "..\\..\\weight",
        "megabyte": "a" * 2**20,
    }
    for name, value in names.items():
        yield f"name-{name}", True, f"a name with {name}", pack({value: entry([1], 0, 4)}, bytes(4))
    yield "name-surrogate", True, "half a character as name", pack(b'{"\\ud800":' + ONE + b"}", bytes(4))


def _bad_metadata() -> Iterator[Case]:
    values: dict[str, Any] = {
        "null": None,
        "list": [],
        "text": "x",
        "number": {"steps": 100},
        "nested": {"a": {"b": "c"}},
        "entry-null": {"a": None},
        "nul": {"a": "b\0c"},
        "too-big": {"tags": "x" * (9 * 2**20)},
        "like-a-tensor": entry([1], 0, 4),
    }
    for name, value in values.items():
        content = pack({"__metadata__": value, "a": entry([1], 0, 4)}, bytes(4))
        yield f"metadata-{name}", True, f"metadata: {name.replace('-', ' ')}", content
    surrogate = b'{"__metadata__":{"a":"\\udfff"},"a":' + ONE + b"}"
    yield "metadata-surrogate", True, "half a character in the metadata", pack(surrogate, bytes(4))


def _odd_but_legal() -> Iterator[Case]:
    yield "good", False, "two plain tensors", GOOD
    yield "nothing", False, "no tensors, no data", pack(b"{}")
    yield "padded", False, "padded with spaces", pack(b'{"a":' + ONE + b"}" + b" " * 77, bytes(4))
    yield (
        "spaced",
        False,
        "white space between JSON's parts",
        pack(json.dumps(json.loads(b'{"a":' + ONE + b"}"), indent=2).encode(), bytes(4)),
    )
    yield "scalar", False, "a tensor without dimensions", pack({"a": entry([], 0, 4)}, bytes(4))
    yield (
        "zero-size",
        False,
        "tensors of no bytes, also between others",
        pack(
            {"a": entry([0], 0, 0), "b": entry([1], 0, 4), "c": entry([3, 0, 2], 4, 4), "d": entry([1], 4, 8)}, bytes(8)
        ),
    )
    yield (
        "out-of-order",
        False,
        "the header's order is not the data's",
        pack({"b": entry([1], 4, 8), "a": entry([1], 0, 4)}, bytes(8)),
    )
    yield (
        "unaligned",
        False,
        "floats at an odd place",
        pack({"a": entry([3], 0, 3, "U8"), "b": entry([2], 3, 11)}, bytes(11)),
    )
    yield (
        "names",
        False,
        "brackets, colons, spaces and letters of many scripts",
        pack(
            {
                "lora unet: (down)[0]/attn": entry([1], 0, 4),
                "onnx::MatMul_12": entry([1], 4, 8),
                "/model/layers.0/w": entry([1], 8, 12),
                "層.0.重み": entry([1], 12, 16),
                "слой..вес": entry([1], 16, 20),
                "<script>alert(1)</script>": entry([1], 20, 24),
                "'; DROP TABLE model; --": entry([1], 24, 28),
            },
            bytes(28),
        ),
    )
    yield (
        "fields-as-names",
        False,
        "tensors called dtype, shape and data_offsets",
        pack(
            {name: entry([1], 4 * i, 4 * i + 4) for i, name in enumerate(("dtype", "shape", "data_offsets"))}, bytes(12)
        ),
    )
    yield (
        "metadata",
        False,
        "kohya's JSON inside text, a new line, an emoji",
        pack(
            {
                "__metadata__": {"ss_tag_frequency": '{"a": {"cat": [1]}}', "note": "line\nline", "🐈": ""},
                "a": entry([1], 0, 4),
            },
            bytes(4),
        ),
    )
    yield (
        "not-finite",
        False,
        "NaN and infinite values",
        pack({"a": entry([3], 0, 12)}, struct.pack("<3f", float("nan"), float("inf"), -1.0)),
    )
    yield "every-dtype", False, "each dtype of safetensors 0.8", _every_dtype()
    yield "tensors-100000", False, "100,000 tensors", _many_tensors(100_000)


def _every_dtype() -> bytes:
    bits = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16}
    bits |= {"I16": 16, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
    bits |= {"I8": 8, "U8": 8, "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
    header, position = {}, 0
    for dtype, width in bits.items():
        header[dtype.lower()] = entry([2, 4], position, position + width, dtype)  # 8 elements: `width` bytes
        position += width
    return pack(header, bytes(position))


def _many_tensors(count: int) -> bytes:
    names = (f"model.layers.{i // 8}.mlp.experts.{i % 8}.gate_proj.weight" for i in range(count))
    return pack({name: entry([2], 4 * i, 4 * i + 4, "F16") for i, name in enumerate(names)}, bytes(4 * count))
