"""Codes of any width from 1 to 8 bits, side by side in a row of bytes.

Code i of a row occupies the bits [i · bits, (i + 1) · bits), counted from the lowest bit of the
row's first byte. At 4 bits this is the order of `packing.pack_nibbles`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelgrove_kernels.packing import chunks


def width(codes: int, bits: int) -> int:
    """Bytes that a row of `codes` codes takes; the last one is padded with zero bits."""
    return -(-codes * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 (rows, n), values below 2^bits → uint8 (rows, ⌈n · bits / 8⌉).

    Raises:
        ValueError: a code has more bits.
    """
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit into {bits} bits")
    rows, count = codes.shape
    packed = torch.empty((rows, width(count, bits)), dtype=torch.uint8)
    places, weights = torch.arange(bits), 1 << torch.arange(8)
    for part in chunks(rows, count * bits):
        stream = (codes[part].unsqueeze(-1) >> places & 1).flatten(1)
        stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8)).view(len(stream), packed.shape[1], 8)
        packed[part] = (stream * weights).sum(-1).to(torch.uint8)
    return packed


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 (rows, bytes) → uint8 (rows, count)."""
    codes = torch.empty((packed.shape[0], count), dtype=torch.uint8)
    places, weights = torch.arange(8), 1 << torch.arange(bits)
    for part in chunks(packed.shape[0], count * bits):
        stream = (packed[part].unsqueeze(-1) >> places & 1).flatten(1)[:, : count * bits]
        codes[part] = (stream.view(len(stream), count, bits) * weights).sum(-1).to(torch.uint8)
    return codes
