from __future__ import annotations

import io
import json
import struct
import tracemalloc
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from modelgrove_hub.errors import CorruptFileError
from modelgrove_hub.store.dtypes import DTYPES
from modelgrove_hub.store.header import MAX_HEADER, MAX_TENSORS, Header, name_fault, parse_header, read_header
from modelgrove_hub.store.manifest import scan


def parse(content: bytes) -> Header:
    return parse_header(io.BytesIO(content), len(content), "file.safetensors")


def refusal(content: bytes) -> str:
    """Why the file is refused; empty if it is not. Any other exception is a failure."""
    try:
        parse(content)
    except CorruptFileError as error:
        return str(error)
    return ""


def pack(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_each_hostile_file_is_refused_and_each_odd_one_accepted(hostile: ModuleType, tmp_path: Path):
    for file in hostile.corpus(tmp_path / "corpus"):
        for read in (read_header, scan):
            try:
                read(file.path)
                refused = False
            except CorruptFileError as error:
                refused = True
                message = str(error)
                assert message.startswith(f"{file.path}: ")
                assert message.isprintable()
                assert len(message) < len(str(file.path)) + 500

            assert refused == file.refused, f"{read.__name__} of {file.path.name}: {file.why}"


def test_what_the_header_says_is_found(tmp_path: Path):
    content = pack(
        {
            "__metadata__": {"format": "pt"},
            "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [4, 28]},
            "a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]},
        },
        bytes(28),
    )

    header = parse(content)

    assert header.metadata == {"format": "pt"}
    assert header.data_start == len(content) - 28
    assert header.tensors == (("a", "F16", (2,), 0, 4), ("b", "F32", (2, 3), 4, 28))


def test_a_claim_of_a_large_header_takes_no_memory():
    tracemalloc.start()
    for length in (MAX_HEADER, MAX_HEADER + 1, 2**40, 2**64 - 1):
        with pytest.raises(CorruptFileError, match="claims"):
            parse(struct.pack("<Q", length) + b"{}")

    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_more_tensors_than_the_limit_are_refused():
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}

    with pytest.raises(CorruptFileError, match=f"{MAX_TENSORS + 1} tensors"):
        parse(pack({str(number): entry for number in range(MAX_TENSORS + 1)}))


@pytest.mark.parametrize(
    "name",
    [
        "unet.down_blocks.0/attn (1) [x]: to_q",
        "onnx::MatMul_1",
        "/model/w",
        "weights..scale",
        "...",
        "層.重み",
        "emb_params",
        "*",
        "a" * 1024,
    ],
)
def test_names_that_real_models_may_have_are_fine(name: str):
    assert name_fault(name) is None


def test_reserved_and_deceiving_names_are_not():
    for name in ("", "__metadata__", "a\x7f", "..", "a/..", "..\\a", "a\u2028b", "\ufeffa", "a" * 1025):
        assert name_fault(name)


DTYPE_NAMES = st.sampled_from(sorted(DTYPES))
NAMES = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=20).filter(
    lambda n: not name_fault(n)
)


@st.composite
def files(draw: st.DrawFn) -> tuple[bytes, dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """A legal file, its tensors and its metadata."""
    tensors, position, header = {}, 0, {}
    for name in draw(st.lists(NAMES, max_size=6, unique=True)):
        dtype = draw(DTYPE_NAMES)
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
        if prod(shape) * DTYPES[dtype].bits % 8:
            shape = (*shape, 8)
        end = position + prod(shape) * DTYPES[dtype].bits // 8
        tensors[name] = (dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    entries = draw(st.permutations(list(header.items())))
    metadata = draw(st.dictionaries(NAMES, NAMES, max_size=3))
    if metadata or draw(st.booleans()):
        entries.insert(draw(st.integers(0, len(entries))), ("__metadata__", metadata))
    text = json.dumps(dict(entries), ensure_ascii=draw(st.booleans())).encode() + b" " * draw(st.integers(0, 9))
    return pack(text, bytes(position)), tensors, metadata


def library_accepts(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    try:
        with safe_open(path, "np"):
            return True
    except SafetensorError:
        return False


@settings(deadline=None)
@given(files())
def test_every_legal_file_is_read_as_it_was_meant(drawn: tuple[bytes, dict[str, Any], dict[str, str]]):
    content, tensors, metadata = drawn

    header = parse(content)

    assert {info.name: (info.dtype, info.shape) for info in header.tensors} == tensors
    assert header.metadata == metadata
    assert [info.start for info in header.tensors] == sorted(info.start for info in header.tensors)


@settings(deadline=None)
@given(files(), st.data())
def test_a_changed_file_is_refused_cleanly_or_accepted_by_the_library_too(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[bytes, Any, Any], data: st.DataObject
):
    content = bytearray(drawn[0])
    start = data.draw(st.integers(0, len(content) - 1))
    content[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))

    try:
        header = parse(bytes(content))
    except CorruptFileError:
        return

    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    assert library_accepts(path, bytes(content))
    with safe_open(path, "np") as file:
        assert set(file.keys()) == {info.name for info in header.tensors}
        assert (file.metadata() or {}) == header.metadata


REAL = sorted((Path(__file__).parents[3] / "analyzers/modelgrove_analyzers/zoo/data/sample").glob("untitled-*"))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_flipped_bytes_of_a_real_header_are_refused_cleanly_or_read_as_the_library_reads_them(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    path = next(path for path in REAL if path.is_file())
    content = bytearray(path.read_bytes())
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for place in data.draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=3)):
        content[place] = data.draw(st.integers(0, 255) | st.sampled_from(b'"[]{},:\\0129 '))

    if reason := refusal(bytes(content)):
        assert reason.isprintable()
        return

    header = parse(bytes(content))
    changed = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    assert library_accepts(changed, bytes(content))
    with safe_open(changed, "np") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == {  # noqa: SIM118
            info.name: info.shape for info in header.tensors
        }


@settings(deadline=None)
@given(st.binary(max_size=200))
@example(b"")
@example(struct.pack("<Q", 2) + b"{}")
def test_any_bytes_are_refused_cleanly_or_read(content: bytes):
    for candidate in (content, pack(content), pack(b"{" + content + b"}")):
        assert refusal(candidate).startswith("file.safetensors: ") or parse(candidate)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
ENTRIES = JSON | st.fixed_dictionaries({"dtype": DTYPE_NAMES | JSON, "shape": JSON, "data_offsets": JSON})


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), ENTRIES, max_size=4))
def test_any_json_is_refused_cleanly_or_read(header: dict[str, Any]):
    content = pack(header, bytes(8))

    assert refusal(content).isprintable() or parse(content)
