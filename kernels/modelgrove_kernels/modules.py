"""Layers that compute on quantized weights, in the place of `nn.Linear` and `nn.Conv2d`.

Activations are rounded to 8 bits as they come, whatever the file was made for: on CPUs fewer bits are no faster.
Weights are reordered once, when the layer is made, and kept in no other form.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from modelgrove_kernels import native
from modelgrove_kernels.bitstream import unpack_bits
from modelgrove_kernels.conv import conv2d
from modelgrove_kernels.conv_panels import Geometry, Panels, to_panels
from modelgrove_kernels.layouts import Layout, Parts, transform, transform_inputs
from modelgrove_kernels.matmul import linear_lut4a8, linear_w4a8, prepack, prepack_branch
from modelgrove_kernels.packing import Packed, pack_nibbles
from modelgrove_kernels.reference import LookUp

_LEVELS = 127
_TRANSFORM = ("smooth", "permutation", "rotation")


def has_linear(layout: Layout) -> bool:
    """Whether `QuantLinear` computes with this layout: up to 4 bits a code, or 8 bits with one scale a row."""
    whole = layout.name == "int8" and layout.group >= layout.columns
    table = layout.name == "lut" and layout.bits <= 4 and layout.vector == 1 and layout.group % 2 == 0
    return whole or table or layout.name == "int4"


def has_conv(layer: nn.Conv2d, layout: Layout, parts: Parts) -> bool:
    """Whether `QuantConv2d` computes this convolution.

    It has one group of channels, is padded with zeros and its inputs are not rotated; a table has equal steps.
    """
    plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    fits = layout.group >= layout.columns or layout.group % 8 == 0
    coded = layout.name in ("int8", "int4") or (layout.name == "lut" and _equal_steps(layout, parts) is not None)
    return plain and fits and layout.rotation is None and coded


class QuantLinear(nn.Module):
    """y = round(x') · Mᵀ + x' · downᵀ · upᵀ + b, for a packed matrix M (rows, columns) of `layout`.

    At 4 bits each row of x' has a scale; at 8 bits, which torch computes, all rows of a call share one, so that a row's
    result depends a little on the others.

    A table of 16 levels is itself rounded to 8 bits, which moves a weight by at most 1/254 of its row's largest level.

    Raises:
        ValueError: there are no kernels for the layout; ask `has_linear` first.
    """

    def __init__(self, layout: Layout, parts: Parts, bias: Tensor | None = None) -> None:
        super().__init__()
        if not has_linear(layout):
            raise ValueError(f"no kernel computes with layout {layout.name} of {layout.bits} bits")
        self.layout, self.rows, self.columns = layout, len(parts["scales"]), layout.columns
        self.transform = {name: parts[name].float() for name in _TRANSFORM if name in parts}
        # The 4-bit kernels divide by `smooth` themselves; where inputs are rotated as well, all is done before.
        self.ahead = layout.rotation is not None or layout.name == "int8"
        self.smooth = None if self.ahead else self.transform.get("smooth")
        self.bias = None if bias is None else bias.detach().float()
        self.down, self.up = torch.zeros(0, layout.columns), torch.zeros(self.rows, 0)
        self.branch: Tensor | None = None
        if layout.name == "int8":
            self.whole = _prepack_whole(parts["codes"][:, : layout.columns], parts["scales"], self.bias)
        else:
            weight = _four_bits(layout, parts)
            self.weight, self.looked_up = prepack(weight), isinstance(weight, LookUp)
        if "up" in parts:
            self._widen(parts["down"].float(), parts["up"].float())

    @property
    def nbytes(self) -> int:
        """Bytes that the layer holds; torch keeps its 8-bit codes beside those in its own order."""
        whole = 2 * self.rows * self.columns if self.layout.name == "int8" else 0
        return whole + sum(part.nbytes for part in vars(self).values() if isinstance(part, Tensor))

    def add_branch(self, down: Tensor, up: Tensor) -> None:
        """Add up · down, (rows, r) and (r, columns), as an adapter adds it: beside the codes, which stay."""
        self._widen(transform(down.float(), self.layout, self.transform), up.float())

    def _widen(self, down: Tensor, up: Tensor) -> None:
        self.down, self.up = torch.cat([self.down, down]), torch.cat([self.up, up], 1)
        if self.layout.name != "int8":
            self.branch = prepack_branch(self.down, self.up)

    def forward(self, inputs: Tensor) -> Tensor:
        """Float32 (…, columns) → (…, rows)."""
        inner = transform_inputs(inputs, self.layout, self.transform) if self.ahead else inputs
        if self.layout.name == "int8":
            return self._whole(inner)
        compute = linear_lut4a8 if self.looked_up else linear_w4a8
        outputs: Tensor = compute(inner, self.weight, self.rows, self.layout.group, self.smooth, self.branch, self.bias)
        return outputs

    def _whole(self, inner: Tensor) -> Tensor:
        outputs: Tensor = torch.ops.quantized.linear_dynamic(inner.contiguous(), self.whole, reduce_range=_narrow())
        if len(self.down):
            outputs = outputs + functional.linear(functional.linear(inner, self.down), self.up)
        return outputs


class QuantConv2d(nn.Module):
    """A convolution of rounded pictures with a packed kernel; see `conv.conv2d_w8a8` for what it computes.

    Raises:
        ValueError: there are no kernels for it; ask `has_conv` first.
    """

    def __init__(self, layer: nn.Conv2d, layout: Layout, parts: Parts) -> None:
        super().__init__()
        packed = _codes(layout, parts) if has_conv(layer, layout, parts) else None
        if packed is None or isinstance(layer.padding, str):
            raise ValueError(f"no kernel computes this convolution with layout {layout.name}")
        self.rows, self.columns = len(parts["scales"]), layout.columns
        self.geometry = Geometry(layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        self.weight: Panels = to_panels(packed)
        self.bias = None if layer.bias is None else layer.bias.detach().float()
        self.smooth, self.down, self.up = (
            parts[name].float() if name in parts else None for name in ("smooth", "down", "up")
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the layer holds."""
        parts = [*vars(self).values(), self.weight.codes, self.weight.scales, self.weight.zeros]
        return sum(part.nbytes for part in parts if isinstance(part, Tensor))

    def add_branch(self, down: Tensor, up: Tensor) -> None:
        """Add up · down, (rows, r) and (r, C·kh·kw) in the order of torch's weights, as an adapter adds it."""
        down = down.float().view(len(down), -1, *self.geometry.kernel)
        if self.smooth is not None:
            down = down * self.smooth.view(-1, 1, 1)
        columns = down.permute(0, 2, 3, 1).flatten(1)
        self.down = columns if self.down is None else torch.cat([self.down, columns])
        self.up = up.float() if self.up is None else torch.cat([self.up, up.float()], 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Float32 (n, C, h, w) → (n, rows, h', w')."""
        return conv2d(inputs, self.weight, self.geometry, self.bias, self.smooth, self.down, self.up)


def _codes(layout: Layout, parts: Parts) -> Packed | None:
    return _packed(layout, parts) if layout.name == "int8" else _steps(layout, parts)


def _packed(layout: Layout, parts: Parts) -> Packed:
    return Packed(parts["codes"], parts["scales"], parts.get("zeros"), layout.columns, layout.bits, layout.group)


def _four_bits(layout: Layout, parts: Parts) -> Packed | LookUp:
    """What the 4-bit kernels compute with: codes of equal steps, or else of a table with 16 levels."""
    steps = _steps(layout, parts)
    if steps is not None:
        return steps
    table = parts["table"].float().squeeze(-1)
    largest = table.abs().amax(1, keepdim=True)
    step = torch.where(largest == 0, 1.0, largest / _LEVELS)
    levels = functional.pad((table / step).round().to(torch.int8), (0, 16 - table.shape[1]))
    return LookUp(_nibbles(layout, parts), levels, parts["scales"].float() * step, layout.columns, layout.group)


def _steps(layout: Layout, parts: Parts) -> Packed | None:
    """The matrix as `int4`, exactly: it is that, or its one table holds equal steps with zero among them."""
    if layout.name == "int4":
        return _packed(layout, parts)
    found = _equal_steps(layout, parts)
    if found is None:
        return None
    step, zero = found
    scales = parts["scales"].float() * step
    zeros = torch.full(scales.shape, zero, dtype=torch.uint8)
    return Packed(_nibbles(layout, parts), scales, zeros, layout.columns, 4, layout.group)


def _equal_steps(layout: Layout, parts: Parts) -> tuple[float, int] | None:
    """(step, place of zero) of a table of up to 16 levels for all rows, if that is all it says."""
    if layout.bits > 4 or layout.vector > 1 or layout.group % 2 or len(parts["table"]) > 1:
        return None
    levels = parts["table"].float().flatten()
    step, zero = float(levels[1] - levels[0]), int((levels == 0).float().argmax())
    even = step and torch.equal((torch.arange(len(levels)) - zero) * step, levels)
    return (step, zero) if even else None


def _nibbles(layout: Layout, parts: Parts) -> Tensor:
    """Codes of up to 4 bits, two a byte."""
    if layout.bits == 4:
        return parts["codes"]
    count = parts["scales"].shape[1] * layout.group
    return pack_nibbles(unpack_bits(parts["codes"], layout.bits, count))


def _narrow() -> bool:
    """Whether activations lose a bit: without VNNI, sums of two products of 8 bits would saturate."""
    return native.isa() != "avx512vnni"


def _prepack_whole(codes: Tensor, scales: Tensor, bias: Tensor | None) -> torch.ScriptObject:
    """Weights of 8 bits as torch's own kernels read them: oneDNN's with VNNI, else FBGEMM's; neither saturates."""
    rows = len(codes)
    weight = torch._make_per_channel_quantized_tensor(
        codes.contiguous(), scales.double().flatten(), torch.zeros(rows, dtype=torch.long), 0
    )
    with _engine("fbgemm" if _narrow() else "onednn"):
        packed: torch.ScriptObject = torch.ops.quantized.linear_prepack(weight, bias)
    return packed


@contextmanager
def _engine(name: str) -> Iterator[None]:
    """torch packs for one global engine; what is packed remembers it."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before
