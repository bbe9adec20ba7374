"""The manifest survives its JSON, and nothing that contradicts the file gets past it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelgrove_hub.errors import CorruptFileError, DataError
from modelgrove_hub.formats.quantized import (
    KEY,
    PackedTensor,
    QuantManifest,
    check_parts,
    original_tensors,
    read_manifest,
)
from modelgrove_hub.store.header import TensorInfo

ENTRY = {
    "layout": "int4", "bits": 4, "group": 64, "dtype": "F16", "shape": [320, 100, 3, 3], "axes": [0, 2, 3, 1],
    "error": 0.1, "bytes": 1000,
}  # fmt: skip
MANIFEST = {
    "version": 1,
    "method": "rtn",
    "parameters": {"bits": 4},
    "parent": "0" * 64,
    "tensors": {"conv.weight": ENTRY},
}
STORED = (
    TensorInfo("conv.weight.codes", "U8", (320, 480), 0, 0),
    TensorInfo("conv.weight.scales", "F16", (320, 15), 0, 0),
    TensorInfo("conv.weight.zeros", "U8", (320, 15), 0, 0),
    TensorInfo("conv.bias", "F16", (320,), 0, 0),
)


def parse(manifest):
    return read_manifest({KEY: json.dumps(manifest)}, "file")


shapes = st.lists(st.integers(1, 50), min_size=1, max_size=4).map(tuple)


@st.composite
def entries(draw):
    shape = draw(shapes)
    bits = draw(st.sampled_from([8, 4]))
    return PackedTensor(
        layout=f"int{bits}", bits=bits, group=2 * draw(st.integers(1, 64)), dtype=draw(st.sampled_from(["F16", "F32"])),
        shape=shape, axes=tuple(draw(st.permutations(range(len(shape))))), error=draw(st.floats(0, 1)), bytes=1,
    )  # fmt: skip


@given(st.dictionaries(st.text(min_size=1, max_size=9), entries(), max_size=4))
@settings(max_examples=50, deadline=None)
def test_a_manifest_survives_its_json(tensors):
    manifest = QuantManifest(method="rtn", parameters={"bits": 4, "skip": ["*"]}, parent="ab" * 32, tensors=tensors)
    assert read_manifest(manifest.metadata(), "file") == manifest


@given(entries())
@settings(max_examples=50, deadline=None)
def test_parts_hold_every_element_of_the_original(entry):
    parts = entry.parts()
    rows, columns = entry.matrix
    (stored_rows, width), (_, groups) = parts["codes"].shape, parts["scales"].shape
    assert stored_rows == rows
    assert columns <= groups * entry.group < columns + entry.group
    assert width * 8 == groups * entry.group * entry.bits
    assert ("zeros" in parts) == (entry.bits == 4)


def test_every_part_that_a_tensor_may_have_has_a_shape():
    activations = {"bits": 4, "ranges": "timestep", "groups": 3, "intervals": 20}
    change = {"layout": "lut", "bits": 3, "vector": 2, "tables": "row", "smooth": True, "rank": 8}
    rotated = {"rotation": "stored", "block": 4}
    entry = PackedTensor(**{**ENTRY, **change, **rotated, "activations": activations})
    assert {suffix: part.shape for suffix, part in entry.parts().items()} == {
        # 15 groups of 32 codes of 3 bits
        "codes": (320, 180), "scales": (320, 15), "table": (320, 8, 2), "smooth": (100,), "permutation": (900,),
        "rotation": (225, 4, 4), "up": (320, 8), "down": (8, 900), "channels": (100,), "ranges": (20, 3, 2),
    }  # fmt: skip
    sparse = PackedTensor(**{**ENTRY, "layout": "sparse", "bits": 1, "nonzero": 5})
    assert {suffix: part.shape for suffix, part in sparse.parts().items()} == {"mask": (320, 113), "values": (5,)}


def test_a_file_without_the_key_is_not_packed():
    assert read_manifest({"format": "pt"}, "file") is None


def test_the_original_tensors_are_told_from_the_parts():
    manifest = parse(MANIFEST)
    check_parts(manifest, STORED, "file")
    assert original_tensors(manifest, STORED) == {
        "conv.weight": ("F16", (320, 100, 3, 3)),
        "conv.bias": ("F16", (320,)),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version"),
        ({"parent": "xyz"}, "parent"),
        ({"surprise": 1}, "surprise"),
        ({"tensors": {"x": {**ENTRY, "bits": 8}}}, "int4 has 4 bits"),
        ({"tensors": {"x": {**ENTRY, "layout": "int3"}}}, "layout"),
        ({"tensors": {"x": {**ENTRY, "group": 7}}}, "whole bytes"),
        ({"tensors": {"x": {**ENTRY, "group": 0}}}, "group"),
        ({"tensors": {"x": {**ENTRY, "axes": [0, 0, 1, 2]}}}, "no permutation"),
        ({"tensors": {"x": {**ENTRY, "shape": [2**40, 2**40], "axes": [0, 1]}}}, "too large"),
        ({"tensors": {"x": {**ENTRY, "shape": [], "axes": []}}}, "too large"),
        ({"tensors": {"x": {**ENTRY, "shape": [0, 1], "axes": [0, 1]}}}, "shape"),
        ({"tensors": {"x": {**ENTRY, "dtype": "I64"}}}, "no floating-point"),
        ({"tensors": {"x": {**ENTRY, "error": -1}}}, "error"),
        ({"tensors": {"x": {**ENTRY, "layout": "lut", "bits": 9}}}, "bits"),
        ({"tensors": {"x": {**ENTRY, "layout": "lut", "vector": 3}}}, "vectors of 3"),
        ({"tensors": {"x": {**ENTRY, "layout": "lut", "vector": 32}}}, "vector"),
        ({"tensors": {"x": {**ENTRY, "layout": "sparse", "bits": 1, "nonzero": 10**6}}}, "do not fit"),
        ({"tensors": {"x": {**ENTRY, "rotation": "hadamard", "block": 7}}}, "blocks of 7"),
        ({"tensors": {"x": {**ENTRY, "rotation": "hadamard", "block": 12}}}, "no power of two"),
        ({"tensors": {"x": {**ENTRY, "rotation": "stored"}}}, "blocks of 0"),
        ({"tensors": {"x": {**ENTRY, "block": 4}}}, "there is none"),
        ({"tensors": {"x": {**ENTRY, "rank": 2**60}}}, "rank"),
        ({"tensors": {"x": {**ENTRY, "activations": {"bits": 1}}}}, "activations.bits"),
        ({"tensors": {"x": {**ENTRY, "activations": {"bits": 4, "exponent": 4}}}}, "do not fit into 4 bits"),
        (
            {"tensors": {"x": {**ENTRY, "activations": {"bits": 8, "exponent": 4, "ranges": "static"}}}},
            "no static ranges",
        ),
    ],
)
def test_a_manifest_that_breaks_a_rule_is_refused(change, message):
    with pytest.raises(DataError, match=f"^file: .*{message}"):
        parse({**MANIFEST, **change})


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"version": 1e999}'])
def test_what_is_no_manifest_at_all_is_refused(text):
    with pytest.raises(DataError, match=f"^file: metadata {KEY}"):
        read_manifest({KEY: text}, "file")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (STORED[1:], "codes is missing"),
        (STORED[:2], "zeros is missing"),
        ((STORED[0]._replace(shape=(320, 479)), *STORED[1:]), r"codes is U8 \(320, 479\)"),
        ((STORED[0]._replace(dtype="I8"), *STORED[1:]), "codes is I8"),
        ((STORED[0], STORED[1]._replace(dtype="BF16"), *STORED[2:]), "implies F16 or F32"),
    ],
)
def test_a_file_that_does_not_hold_its_parts_is_corrupt(stored, message):
    with pytest.raises(CorruptFileError, match=message):
        check_parts(parse(MANIFEST), stored, "file")
