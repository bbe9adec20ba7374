"""Codes of any width survive packing, and 4 bits lie as the int4 layout has them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelgrove_kernels.bitstream import pack_bits, unpack_bits, width
from modelgrove_kernels.packing import pack_nibbles


@given(st.integers(1, 8), st.integers(0, 5), st.integers(0, 40), st.integers(0, 2**16))
@settings(max_examples=80, deadline=None)
def test_what_is_packed_comes_back(bits, rows, count, seed):
    codes = torch.randint(2**bits, (rows, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, width(count, bits))
    assert torch.equal(unpack_bits(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_order_is_numpys_little_bit_order(bits):
    codes = torch.randint(2**bits, (3, 11), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    stream = np.unpackbits(pack_bits(codes, bits).numpy(), axis=1, bitorder="little")[:, : 11 * bits]
    assert np.array_equal(stream.reshape(3, 11, bits) @ (1 << np.arange(bits)), codes.numpy())


def test_four_bits_are_nibbles():
    codes = torch.randint(16, (4, 10), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(pack_bits(codes, 4), pack_nibbles(codes))


def test_a_code_that_is_too_wide_is_refused():
    with pytest.raises(ValueError, match="9 does not fit into 3 bits"):
        pack_bits(torch.tensor([[9]], dtype=torch.uint8), 3)
