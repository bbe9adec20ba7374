"""The 4-bit operators give what their reference gives, on every instruction set and with any number of threads."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelgrove_kernels import native, reference
from modelgrove_kernels.matmul import (
    linear_lut4a8,
    linear_w4a8,
    prepack,
    prepack_branch,
    unpack,
    unpack_branch,
)
from modelgrove_kernels.packing import dequantize, pack_nibbles, quantize
from modelgrove_kernels.reference import LookUp

ISAS = [name for name, number in native.ISAS.items() if number <= native.ISAS.get(native.isa(), 0)]
needs_library = pytest.mark.skipif(not ISAS, reason=f"no compiled kernels: {native.absence()}")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def four_bits(rows, columns, group, look_up, seed=0):
    if not look_up:
        return quantize(draw(rows, columns, seed=seed), 4, group)
    generator, width = torch.Generator().manual_seed(seed), group or columns + columns % 2
    groups = -(-columns // width)
    codes = torch.randint(16, (rows, groups * width), generator=generator).to(torch.uint8)
    table = torch.randint(-127, 128, (rows if seed % 2 else 1, 16), generator=generator).to(torch.int8)
    return LookUp(pack_nibbles(codes), table, torch.rand(rows, groups, generator=generator) + 0.1, columns, width)


def compute(x, weight, smooth=None, down=None, up=None, bias=None):
    operator = linear_lut4a8 if isinstance(weight, LookUp) else linear_w4a8
    branch = None if down is None else prepack_branch(down, up)
    return operator(x, prepack(weight), len(weight.scales), weight.group, smooth, branch, bias)


def assert_same(found, wanted):
    """Only float32 sums in another order: 1e-5 of the largest output of a row."""
    assert torch.equal(found.isnan(), wanted.isnan())
    largest = wanted.nan_to_num().abs().amax(-1, keepdim=True).clamp_min(1e-30)
    assert float(((found - wanted).nan_to_num().abs() / largest).max() if found.numel() else 0) < 1e-5


@needs_library
@given(
    st.sampled_from(ISAS), st.integers(0, 40), st.integers(1, 300), st.integers(1, 70),
    st.sampled_from([None, 2, 32, 64, 128]), st.booleans(), st.booleans(), st.integers(0, 20),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_any_shape_gives_what_the_reference_gives(isa, tokens, columns, rows, group, look_up, extras, seed):
    weight, x = four_bits(rows, columns, group, look_up, seed), draw(tokens, columns, seed=seed + 1)
    options = {}
    if extras:
        options = {
            "smooth": draw(columns, seed=2).abs() + 0.1, "down": draw(3, columns, seed=3) / columns**0.5,
            "up": draw(rows, 3, seed=4), "bias": draw(rows, seed=5),
        }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELGROVE_ISA", isa)
        found = compute(x, weight, **options)
    assert_same(found, reference.linear_w4a8(x, weight, **options))


VALUES = {
    "outliers": lambda x: (
        x * torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.01, 1e3, 1)
    ),
    "zero rows": lambda x: x * (torch.arange(len(x)) % 2).unsqueeze(1),
    "tiny": lambda x: x * 1e-38,
    "huge": lambda x: x * 1e36,
    "not finite": lambda x: x.index_put(
        (torch.tensor([1, 2]), torch.tensor([3, 4])), torch.tensor([torch.nan, torch.inf])
    ),
    "all equal": torch.ones_like,
}


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("look_up", [False, True])
def test_extreme_inputs_give_what_the_reference_gives(isa, values, look_up, monkeypatch):
    monkeypatch.setenv("MODELGROVE_ISA", isa)
    x, weight = VALUES[values](draw(9, 200)), four_bits(40, 200, 64, look_up, 1)
    assert_same(compute(x, weight), reference.linear_w4a8(x, weight))


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_many_columns_do_not_overflow(isa, monkeypatch):
    monkeypatch.setenv("MODELGROVE_ISA", isa)
    weight = quantize(draw(33, 40_000).abs(), 4, None)
    x = torch.ones(3, 40_000)
    assert_same(compute(x, weight), reference.linear_w4a8(x, weight))


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 37])
def test_threads_give_the_same_bits(isa, tokens, monkeypatch):
    monkeypatch.setenv("MODELGROVE_ISA", isa)
    before, x, weight = torch.get_num_threads(), draw(tokens, 320), four_bits(200, 320, 64, False)
    factors = {"down": draw(20, 320, seed=3), "up": draw(200, 20, seed=4)}
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(compute(x, weight, **factors))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("look_up", [False, True])
def test_torch_accepts_the_operators(look_up):
    weight = four_bits(20, 96, 32, look_up)
    operator = linear_lut4a8 if look_up else linear_w4a8
    branch = prepack_branch(draw(4, 96), draw(20, 4))
    for options in ((None, None, None), (draw(96).abs() + 1, branch, draw(20))):
        torch.library.opcheck(operator, (draw(2, 3, 96), prepack(weight), 20, 32, *options))


@given(st.integers(1, 70), st.integers(1, 200), st.sampled_from([None, 32, 6]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_prepacked_weight_comes_back(rows, columns, group, look_up):
    weight = four_bits(rows, columns, group, look_up)
    back = unpack(prepack(weight), rows, columns, weight.group, look_up)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales.float())


def test_a_prepacked_branch_comes_back():
    down, up = draw(20, 50), draw(70, 20)
    found = unpack_branch(prepack_branch(down, up), 70, 50)
    torch.testing.assert_close(found[1] @ found[0], up @ down)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 96).half()}, TypeError, "x is torch.float16"),
        ({"x": torch.zeros(2, 200)}, ValueError, "weight has"),
        ({"bias": torch.zeros(19)}, ValueError, "bias has 19 elements, 20"),
        ({"smooth": torch.zeros(95)}, ValueError, "smooth has 95"),
        ({"smooth": torch.zeros(96).double()}, TypeError, "smooth is torch.float64"),
        ({"branch": torch.zeros(7)}, ValueError, "branch has 7"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    arguments = {"x": torch.zeros(2, 96), "weight": prepack(four_bits(20, 96, 32, False)), "rows": 20, "group": 32}
    with pytest.raises(error, match=message):
        linear_w4a8(**{**arguments, **change})


def test_eight_bits_are_not_prepacked():
    with pytest.raises(ValueError, match="no 4-bit matrix"):
        prepack(quantize(draw(4, 8), 8))


def test_the_reference_is_the_dequantized_product():
    weight, x = quantize(draw(30, 64), 4, 32), draw(5, 64, seed=1)
    wanted = x.double() @ dequantize(weight).double().T
    found = reference.linear_w4a8(x, weight)
    # Rounding the activations to 8 bits loses about half a per cent.
    assert float((found - wanted).norm() / wanted.norm()) < 0.01


def test_without_the_library_the_reference_computes(monkeypatch):
    weight, x = four_bits(20, 96, 32, False), draw(3, 96)
    monkeypatch.setitem(os.environ, "MODELGROVE_ISA", "none")
    assert torch.equal(compute(x, weight), reference.linear_w4a8(x, unpack(prepack(weight), 20, 96, 32, False)))
