"""GGUF headers: files of the reference writer are read, broken ones are refused before anything is allocated."""

import io
import struct
from contextlib import suppress
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelgrove_hub.errors import CorruptFileError
from modelgrove_hub.formats.gguf import BLOCKS, parse_gguf
from modelgrove_hub.formats.listing import list_model
from modelgrove_hub.formats.recognise import recognise


def parse(data):
    return parse_gguf(io.BytesIO(data), len(data), "x.gguf")


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf(pairs=(), tensors=(), data=b"", *, version=3, counts=None):
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(pairs))))
    body = b"".join(text(key) + value for key, value in pairs)
    body += b"".join(tensors)
    head += body
    return head + bytes(-len(head) % 32) + data


def tensor(name, sides, kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, offset)


GOOD = gguf([("general.architecture", struct.pack("<I", 8) + text("flux"))], [tensor("a.weight", (4, 2))], bytes(32))


def test_a_small_file_is_read_with_its_shape_outermost_first():
    tensors, metadata = parse(GOOD)
    assert tensors == {"a.weight": ("F32", (2, 4))}
    assert metadata == {"general.architecture": "flux"}


def test_a_file_of_the_reference_writer_is_read_like_the_reference_reads_it(tmp_path):
    package = pytest.importorskip("gguf", reason="pip install gguf to compare with the reference writer")
    path = tmp_path / "x.gguf"
    writer = package.GGUFWriter(path, "bert")
    writer.add_string("general.name", "kleine Maus")
    writer.add_uint32("bert.block_count", 6)
    writer.add_bool("flag", True)
    writer.add_float32("scale", 0.5)
    writer.add_array("tokens", ["a", "b", "ç"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_tensor("f32", np.zeros((3, 64), np.float32))
    writer.add_tensor("f16", np.zeros((2, 3, 32), np.float16))
    packed = package.quants.quantize(np.ones((4, 64), np.float32), package.GGMLQuantizationType.Q4_0)
    writer.add_tensor("q4", packed, raw_dtype=package.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = path.read_bytes()
    tensors, metadata = parse(data)
    assert tensors == {"f32": ("F32", (3, 64)), "f16": ("F16", (2, 3, 32)), "q4": ("Q4_0", (4, 64))}
    assert metadata["general.name"] == "kleine Maus"
    assert (metadata["flag"], metadata["scale"], metadata["tokens"]) == ("True", "0.5", "[3 × string]")
    reference = {t.name: tuple(int(side) for side in t.shape)[::-1] for t in package.GGUFReader(path).tensors}
    assert reference == {name: shape for name, (_, shape) in tensors.items()}


def test_the_block_sizes_are_the_references():
    package = pytest.importorskip("gguf", reason="pip install gguf to compare with the reference")
    known = {int(kind): (kind.name, *sizes) for kind, sizes in package.GGML_QUANT_SIZES.items()}
    assert {kind: known[kind] for kind in BLOCKS} == BLOCKS


U64 = 2**64 - 1
LONG = struct.pack("<I", 8) + struct.pack("<Q", 2**20 + 1)
BROKEN = {
    "cut in the header": (GOOD[:40], "ends inside"),
    "cut in the data": (GOOD[:-1], "truncated"),
    "another magic": (b"GGML" + GOOD[4:], "does not start"),
    "version 1": (gguf(version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
    "2^64 tensors": (gguf(counts=(U64, 0)), "tensors"),
    "2^64 pairs": (gguf(counts=(0, U64)), "pairs"),
    "more tensors than there are": (GOOD[:8] + struct.pack("<Q", 9) + GOOD[16:], "empty name"),
    "a long string": (gguf([("k", LONG)]), "bytes of a string"),
    "a string past the end": (gguf([("k", struct.pack("<IQ", 8, 1000))]), "ends inside"),
    "a key that is no text": (gguf([(b"\xff\xfe", struct.pack("<II", 4, 1))]), "UTF-8"),
    "a key twice": (gguf([("k", struct.pack("<II", 4, 1))] * 2), "twice"),
    "an unknown value type": (gguf([("k", struct.pack("<I", 77))]), "unknown type 77"),
    "an array of 2^40": (gguf([("k", struct.pack("<IIQ", 9, 0, 2**40))]), "array elements"),
    "an array past the end": (gguf([("k", struct.pack("<IIQ", 9, 10, 2**20))]), "ends inside"),
    "arrays in arrays": (gguf([("k", struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 1000)]), "nested too deeply"),
    "five dimensions": (gguf([], [tensor("a", (1, 1, 1, 1, 1))], bytes(4)), "dimensions"),
    "too many elements": (gguf([], [tensor("a", (2**40, 2**40))]), "2\\^48"),
    "an unknown tensor type": (gguf([], [tensor("a", (4,), kind=99)], bytes(16)), "unknown type 99"),
    "half a block": (gguf([], [tensor("a", (33,), kind=2)], bytes(64)), "whole blocks"),
    "an offset past the end": (gguf([], [tensor("a", (4,), offset=2**40)], bytes(16)), "truncated"),
    "a crooked offset": (gguf([], [tensor("a", (4,), offset=1)], bytes(64)), "aligned"),
    "two tensors in one place": (gguf([], [tensor("a", (4,)), tensor("b", (4,))], bytes(64)), "overlaps"),
    "an alignment in words": (gguf([("general.alignment", struct.pack("<I", 8) + text("9" * 5000))]), "alignment"),
    "one name twice": (gguf([], [tensor("a", (4,))] * 2, bytes(16)), "one name"),
    "a name with a parent folder": (gguf([], [tensor("../a", (4,))], bytes(16)), "parent folder"),
    "an alignment of zero": (gguf([("general.alignment", struct.pack("<II", 4, 0))]), "alignment"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_with_its_name_and_the_rule(case):
    data, rule = BROKEN[case]
    with pytest.raises(CorruptFileError, match=rule) as error:
        parse(data)
    assert str(error.value).startswith("x.gguf: ")


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_changed_bytes_are_read_or_refused_and_never_crash(data):
    raw = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(4, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with suppress(CorruptFileError):
        parse(bytes(raw))


def test_a_gguf_of_flux_is_recognised_in_its_original_names(tmp_path):
    import original_names as original

    tensors, end = [], 0
    for name, shape in original.flux().items():
        tensors.append(tensor(name, shape[::-1] or (1,), kind=1, offset=end))
        end += -(-2 * prod(shape) // 32) * 32
    pairs = [("general.architecture", struct.pack("<I", 8) + text("flux"))]
    path = tmp_path / "flux.gguf"
    path.write_bytes(gguf(pairs, tensors))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + end)  # 24 GB of nothing: the file is sparse
    found = recognise(list_model(path))
    assert (found.family, found.variant, found.format) == ("flux", "dev", "gguf")
    assert any("agrees: flux" in reason for reason in found.reasons)
