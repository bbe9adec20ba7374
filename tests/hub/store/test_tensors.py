from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from modelgrove_hub.contracts import LazyTensor
from modelgrove_hub.errors import CorruptFileError, DataError, NotFoundError
from modelgrove_hub.store.dtypes import DTYPES
from modelgrove_hub.store.tensors import StoredTensor, all_finite, tensors_of

READABLE = [name for name, dtype in DTYPES.items() if dtype.torch and dtype.bits >= 8]


def write(path: Path, dtype: str, shape: list[int], data: bytes) -> StoredTensor:
    header = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return tensors_of(path)[0]


@pytest.mark.parametrize("dtype", READABLE)
def test_every_dtype_is_read_as_the_library_reads_it(dtype: str, tmp_path: Path):
    raw = np.random.default_rng(0).integers(0, 2 if dtype == "BOOL" else 256, 48, dtype=np.uint8)
    stored = write(tmp_path / "x.safetensors", dtype, [48 * 8 // DTYPES[dtype].bits // 2, 2], raw.tobytes())

    with safe_open(stored.path, "pt") as file:
        expected = file.get_tensor("x")
    tensor, array = stored.read(), stored.read_numpy()

    assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
    assert tensor.view(torch.uint8).equal(expected.view(torch.uint8))
    wide = expected.float() if DTYPES[dtype].is_float and DTYPES[dtype].bits < 32 else expected
    wide = expected.float() if dtype == "F8_E8M0" else wide
    assert array.dtype == wide.numpy().dtype
    np.testing.assert_array_equal(array, wide.numpy())


def test_scalars_and_tensors_of_no_elements_are_read(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_file({"scalar": torch.tensor(3.5), "none": torch.zeros(3, 0, 2, dtype=torch.bfloat16)}, path)

    found: dict[str, LazyTensor] = {tensor.name: tensor for tensor in tensors_of(path)}

    assert found["scalar"].read().item() == 3.5
    assert found["scalar"].shape == ()
    assert found["none"].read().shape == (3, 0, 2)
    assert found["none"].read().dtype == torch.bfloat16


def test_only_the_tensor_that_is_asked_for_is_read(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_file({name: torch.full((4,), float(value)) for value, name in enumerate("abc")}, path)

    tensors = tensors_of(path)
    with path.open("r+b") as file:  # a and c are destroyed after the header was read
        file.seek(tensors[0].offset)
        file.write(b"\xff" * 16)
        file.truncate(tensors[1].offset + 16)

    assert tensors[1].read().tolist() == [1.0] * 4


def test_a_file_cut_after_its_header_was_read_is_an_error_not_a_crash(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_file({"weight": torch.zeros(2**20)}, path)
    [tensor] = tensors_of(path)
    os.truncate(path, 2**20)

    with pytest.raises(CorruptFileError, match="tensor 'weight': the file ends inside it"):
        tensor.read()


def test_packed_f4_is_read_as_torch_packs_it(tmp_path: Path):
    stored = write(tmp_path / "x.safetensors", "F4", [2, 4], bytes([0x21, 0x43, 0x65, 0x07]))

    tensor = stored.read()

    assert stored.shape == (2, 4)
    assert tensor.shape == (2, 2)
    assert tensor.dtype == torch.float4_e2m1fn_x2
    assert tensor.view(torch.uint8).tolist() == [[0x21, 0x43], [0x65, 0x07]]
    with pytest.raises(DataError, match="F4"):
        stored.read_numpy()


@pytest.mark.parametrize(("dtype", "shape", "size"), [("F6_E2M3", [4], 3), ("F6_E3M2", [4], 3), ("F4", [2, 1], 1)])
def test_what_torch_cannot_hold_is_listed_but_not_read(dtype: str, shape: list[int], size: int, tmp_path: Path):
    stored = write(tmp_path / "x.safetensors", dtype, shape, bytes(size))

    assert stored.nbytes == size
    with pytest.raises(DataError, match=f"tensor 'x': torch cannot hold {dtype}"):
        stored.read()


def test_a_boolean_of_two_is_refused(tmp_path: Path):
    stored = write(tmp_path / "x.safetensors", "BOOL", [3], b"\0\1\2")

    for read in (stored.read, stored.read_numpy):
        with pytest.raises(CorruptFileError, match="BOOL"):
            read()


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(NotFoundError, match=r"missing\.safetensors"):
        tensors_of(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_one_value_that_is_not_finite_is_seen_wherever_it_stands(dtype: torch.dtype, bad: float):
    assert all_finite(torch.empty(0, 3).to(dtype))
    for size in (1, 7, 100):  # shorter than a vector of the processor, and with a tail behind vectors
        assert all_finite(torch.full((size,), torch.finfo(dtype).max, dtype=dtype))
        for place in (0, size // 2, size - 1):
            values = torch.ones(size)
            values[place] = bad
            assert not all_finite(values.to(dtype))
