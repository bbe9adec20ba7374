"""Every layout means what its formula says, and every transform is undone exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelgrove_kernels.bitstream import pack_bits
from modelgrove_kernels.layouts import Layout, decode, hadamard, restore, sparse_parts, transform, transform_inputs
from modelgrove_kernels.packing import quantize


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("tables", "vector", "bits"), [(1, 1, 4), (3, 1, 3), (1, 2, 8), (3, 4, 5)])
def test_a_looked_up_weight_is_its_entry_times_its_scale(tables, vector, bits):
    rows, columns, group = 3, 22, 8
    codes = torch.randint(2**bits, (rows, 24 // vector), generator=generator()).to(torch.uint8)
    table = torch.randn(tables, 2**bits, vector, generator=generator(1))
    scales = torch.rand(rows, 3, generator=generator(2))
    found = decode(
        Layout("lut", columns, bits, group, vector),
        {"codes": pack_bits(codes, bits), "table": table, "scales": scales},
    )
    for row in range(rows):
        for column in range(columns):
            entry = table[row if tables > 1 else 0, int(codes[row, column // vector]), column % vector]
            assert found[row, column] == entry * scales[row, column // group]


@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_sparse_matrix_comes_back(rows, columns, seed):
    matrix = torch.randn(rows, columns, generator=generator(seed)).relu().half().float()
    parts = sparse_parts(matrix, torch.float16)
    assert torch.equal(decode(Layout("sparse", columns, 1, columns), parts), matrix)


def test_a_mask_that_contradicts_its_values_is_refused():
    parts = sparse_parts(torch.eye(4), torch.float32)
    with pytest.raises(ValueError, match="keeps 4 elements, but 3 are stored"):
        decode(Layout("sparse", 4, 1, 4), {**parts, "values": parts["values"][:3]})


def transforms(columns):
    blocks = torch.linalg.qr(torch.randn(columns // 4, 4, 4, generator=generator(3))).Q
    stored = {"rotation": blocks, "permutation": torch.randperm(columns, generator=generator(4)).int()}
    smooth = {"smooth": torch.rand(columns // 2, generator=generator(5)) + 0.5}
    return {
        "smooth": (Layout("int8", columns, 8, columns), smooth),
        "hadamard": (Layout("int8", columns, 8, columns, 1, "hadamard", 8), {}),
        "stored": (Layout("int8", columns, 8, columns, 1, "stored", 4), stored),
        "all": (Layout("int8", columns, 8, columns, 1, "stored", 4), {**smooth, **stored}),
    }


@pytest.mark.parametrize("kind", ["smooth", "hadamard", "stored", "all"])
def test_a_transformed_layer_gives_the_same_outputs(kind):
    layout, parts = transforms(24)[kind]
    weight, inputs = torch.randn(7, 24, generator=generator()), torch.randn(5, 24, generator=generator(1))
    inner = transform(weight, layout, parts)
    # Orthogonal blocks and divisions in float32: a few units in the last place.
    torch.testing.assert_close(
        transform_inputs(inputs, layout, parts) @ inner.T, inputs @ weight.T, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["smooth", "hadamard", "stored", "all"])
def test_restoring_undoes_the_transform_and_adds_the_branch(kind):
    layout, parts = transforms(24)[kind]
    weight = torch.randn(7, 24, generator=generator())
    inner = transform(weight, layout, parts)
    up, down = torch.randn(7, 2, generator=generator(6)), torch.randn(2, 24, generator=generator(7))
    packed = quantize(inner - up @ down, 8)
    found = restore(layout, {"codes": packed.codes, "scales": packed.scales, "up": up, "down": down, **parts})
    # Only the rounding of 8 bits is left: a step is max|residual| / 127, about 3 % of its deviation.
    assert float((found - weight).norm() / weight.norm()) < 0.05


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_a_hadamard_matrix_is_orthogonal_and_flat(size):
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size))
    torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5))


def test_a_hadamard_matrix_of_another_size_is_refused():
    with pytest.raises(ValueError, match="12 rows"):
        hadamard(12)
