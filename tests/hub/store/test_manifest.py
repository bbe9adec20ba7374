from __future__ import annotations

import hashlib
import json
import os
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from modelgrove_hub.errors import CorruptFileError, DataError, NotFoundError
from modelgrove_hub.store import manifest
from modelgrove_hub.store.dtypes import DTYPES
from modelgrove_hub.store.header import Header, parse_header
from modelgrove_hub.store.manifest import (
    PIECE,
    FileScan,
    TensorRow,
    inventory_hash,
    scan,
    scan_bytes,
    values_hash,
    weights_hash,
)
from modelgrove_hub.store.sketch import positions

FLOATS = {f"torch.{dtype.torch}" for dtype in DTYPES.values() if dtype.is_float}
TYPES = [getattr(torch, dtype.torch) for dtype in DTYPES.values() if dtype.torch and dtype.bits >= 8]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(path: Path, found: FileScan) -> None:
    """Compare a scan with what the safetensors library and float64 arithmetic say."""
    content = path.read_bytes()
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert found.size == len(content)
    tensors = load_file(path)
    assert {row.name for row in found.tensors} == set(tensors)
    for row in found.tensors:
        tensor = tensors[row.name]
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[row.offset :].startswith(raw)
        assert row.shape == tuple(tensor.shape)
        assert row.sha256 == hashlib.sha256(raw).hexdigest()
        if str(tensor.dtype) not in FLOATS:
            assert (row.norm, row.samples) == (None, b"")
            continue
        values = tensor.double().reshape(-1)
        assert row.norm == pytest.approx(float(values.norm()), rel=2e-6)  # float32 sums of 2^16 squares
        np.testing.assert_array_equal(row.sketch, values[positions(values.numel())].float().numpy())


def test_a_scan_equals_an_independent_computation(tmp_path: Path):
    tensors = {str(dtype): normal(70, 9).to(dtype) for dtype in TYPES if dtype.is_floating_point}
    tensors |= {str(dtype): torch.arange(50).to(dtype) for dtype in TYPES if not dtype.is_floating_point}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3), "large": normal(PIECE // 4 + 5, 3)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"format": "pt"})

    found = scan(path)

    check(path, found)
    assert found.metadata == {"format": "pt"}


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(TYPES), st.integers(0, 300)), max_size=12),
    st.sampled_from([(PIECE, 2**16), (64, 32), (512, 512), (512, 0)]),
)
def test_any_tensors_at_any_place_in_the_pieces_are_measured_right(
    tmp_path_factory: pytest.TempPathFactory, layout: list[tuple[torch.dtype, int]], sizes: tuple[int, int]
):
    tensors = {f"t{i}": normal(count, seed=i).abs().to(dtype) for i, (dtype, count) in enumerate(layout)}
    path = tmp_path_factory.getbasetemp() / "layout.safetensors"
    save_file(tensors, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "PIECE", sizes[0])
        patch.setattr(manifest, "SMALL", sizes[1])
        found = scan(path)

    check(path, found)


def test_data_in_another_order_than_the_header_is_measured_right(tmp_path: Path):
    a, b = normal(5, seed=1), normal(7, seed=2)
    entries = {"b": ("F32", [7], [20, 48]), "a": ("F32", [5], [0, 20])}
    header = json.dumps({n: dict(zip(("dtype", "shape", "data_offsets"), e, strict=True)) for n, e in entries.items()})
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + a.numpy().tobytes() + b.numpy().tobytes())

    found = scan(path)

    check(path, found)
    assert [row.name for row in found.tensors] == ["a", "b"]


def test_memory_stays_small_whatever_the_file(tmp_path: Path):
    size = 64 * 2**20
    header = json.dumps({"x": {"dtype": "F16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    tracemalloc.start()

    found = scan(path)

    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()
    assert found.tensors[0].norm == 0.0


def test_a_tensor_with_a_value_that_is_not_finite_has_no_norm_but_a_sketch(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_file({"bad": torch.tensor([1.0, float("nan"), float("inf")]), "good": torch.tensor([3.0, 4.0])}, path)

    rows = {row.name: row for row in scan(path).tensors}

    assert rows["bad"].norm is None
    np.testing.assert_array_equal(rows["bad"].sketch, np.array([1, np.nan, np.inf], np.float32))
    assert rows["good"].norm == 5.0


def test_the_same_weight_has_the_same_sketch_under_any_name_and_shape(tmp_path: Path):
    weight = normal(320, 320)
    save_file({"proj.weight": weight, "other": normal(3)}, tmp_path / "a.safetensors")
    save_file({"x.conv.weight": weight.reshape(320, 320, 1, 1)}, tmp_path / "b.safetensors")

    first = next(row for row in scan(tmp_path / "a.safetensors").tensors if row.name == "proj.weight")
    [second] = scan(tmp_path / "b.safetensors").tensors

    assert len(first.sketch) == 64
    assert first.samples == second.samples


def test_other_files_are_hashed_alone(tmp_path: Path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"\x80\x02}q\x00.")

    found = scan_bytes(path)

    assert found == FileScan(hashlib.sha256(path.read_bytes()).hexdigest(), 6)
    with pytest.raises(CorruptFileError, match=r"model\.ckpt"):
        scan(path)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for read in (scan, scan_bytes):
        with pytest.raises(DataError, match="not a regular file"):
            read(tmp_path / "pipe.safetensors")
        with pytest.raises(NotFoundError):
            read(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(("change", "rule"), [(-4, "became shorter"), (4, "grew")])
def test_a_file_that_changes_its_length_while_it_is_read_is_refused(
    change: int, rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "x.safetensors"
    save_file({"x": normal(PIECE)}, path)

    def parse_and_change(*arguments: Any) -> Header:
        header = parse_header(*arguments)
        os.truncate(path, path.stat().st_size + change)
        return header

    monkeypatch.setattr(manifest, "parse_header", parse_and_change)

    with pytest.raises(CorruptFileError, match=rule):
        scan(path)


def rows_of(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> tuple[TensorRow, ...]:
    save_file(tensors, tmp_path / "rows.safetensors", metadata)
    return scan(tmp_path / "rows.safetensors").tensors


def test_the_three_hashes_see_what_they_should(tmp_path: Path):
    a, b = normal(4, 4, seed=1), normal(4, 4, seed=2)
    rows = rows_of(tmp_path, {"a": a, "b": b})
    variants = {
        "metadata": rows_of(tmp_path, {"a": a, "b": b}, {"author": "me"}),
        "order": tuple(reversed(rows)),
        "shards": rows_of(tmp_path, {"b": b}) + rows_of(tmp_path, {"a": a}),
        "renamed": rows_of(tmp_path, {"x.a": a, "x.b": b}),
        "retrained": rows_of(tmp_path, {"a": a + 1, "b": b}),
        "swapped": rows_of(tmp_path, {"a": b, "b": a}),
        "reshaped": rows_of(tmp_path, {"a": a.reshape(2, 8), "b": b}),
        "bits": rows_of(tmp_path, {"a": a.view(torch.int32), "b": b}),
    }

    same = {
        name: "".join(
            letter if digest(rows) == digest(other) else "-"
            for letter, digest in (("w", weights_hash), ("v", values_hash), ("i", inventory_hash))
        )
        for name, other in variants.items()
    }

    assert same == {
        "metadata": "wvi",
        "order": "wvi",
        "shards": "wvi",
        "renamed": "-v-",
        "retrained": "--i",
        "swapped": "-vi",
        "reshaped": "---",
        "bits": "---",
    }


def test_files_without_tensors_have_no_hashes_to_be_alike_by():
    assert weights_hash(()) is values_hash(()) is inventory_hash(()) is None


def test_a_scan_survives_json(tmp_path: Path):
    tensors = {
        "層.0": normal(9, 8, dtype=torch.bfloat16),
        "bad": torch.tensor([float("nan")]),
        "ids": torch.arange(4),
        "none": torch.zeros(0),
        "scalar": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"note": "Grüße\n🐈"})
    found = scan(tmp_path / "x.safetensors")

    text = found.to_json()

    assert FileScan.from_json(text) == FileScan.from_json(text.encode()) == found
    assert FileScan.from_json(text).to_json() == text
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert FileScan.from_json(replace(found, tensors=()).to_json()).tensors == ()


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"version":1}', '{"version":1,"tensors":[[1]]}', b"\xff"])
def test_a_text_that_is_no_manifest_is_refused(text: str | bytes):
    with pytest.raises(CorruptFileError, match="manifest"):
        FileScan.from_json(text)


def test_a_manifest_of_another_version_says_so():
    with pytest.raises(CorruptFileError, match="version 2, this hub reads 1"):
        FileScan.from_json('{"version":2,"rows":[]}')
