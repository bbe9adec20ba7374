"""Paint on quantized kernels: the denoiser's layers are replaced, by a packed model's manifest or rounded now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from modelgrove_hub.errors import UsageError
from modelgrove_hub.formats.quantized import manifest_of
from modelgrove_kernels import native
from modelgrove_kernels.emulation import Clock
from modelgrove_kernels.layouts import layout_of
from modelgrove_kernels.modules import QuantConv2d, QuantLinear, has_conv, has_linear
from modelgrove_plugins.compress.packed import Stored, pack
from modelgrove_plugins.compress.swapping import packed_tensors, swap_layers
from modelgrove_plugins.compress.targets import CompressorParams
from modelgrove_plugins.preview.painter import denoiser_of

if TYPE_CHECKING:
    from modelgrove_hub.contracts import InputModel
    from modelgrove_plugins.preview.painter import Painter

GRIDS: dict[str, tuple[int, int | None]] = {"w8a8": (8, None), "w4a8": (4, 64)}
"""Bits and group of weights that are rounded for the preview."""


def quantize_painter(painter: Painter, model: InputModel, quant: str) -> dict[str, Any]:
    """Let `painter` compute its denoiser in 8-bit arithmetic; returns what the report says of it.

    `packed` computes on the weights as the model's file has them, the others round full ones to nearest now.

    Raises:
        UsageError: there is no denoiser, it is not packed, or is packed although it shall be rounded.
    """
    component = denoiser_of(painter, model.name)
    network = painter.networks[component]
    files = [file for path, file in sorted(model.files().items()) if _is_weight_of(path, component)]
    packed = [file for file in files if manifest_of(file)]
    if bool(packed) != (quant == "packed"):
        said = "is packed: preview it with --quant packed" if packed else "is not packed: choose w8a8 or w4a8"
        raise UsageError(f"{model.name} {said}")
    count = len(_layers(network))
    tensors = _read(packed) if packed else _rounded(network, component, quant)
    swapped = swap_layers(network, tensors, make=_fast)
    return {"component": component, "layers": swapped, "of": count, "isa": native.isa()}


def quantize_network(network: nn.Module, component: str, quant: str) -> int:
    """Round a denoiser, a model's `component`, to one of `GRIDS` in place; returns how many layers were replaced."""
    return swap_layers(network, _rounded(network, component, quant), make=_fast)


def _is_weight_of(path: str, component: str) -> bool:
    return path.startswith(f"{component}/") and path.endswith(".safetensors")


def _layers(network: nn.Module) -> list[tuple[str, nn.Module]]:
    return [item for item in network.named_modules() if isinstance(item[1], nn.Linear | nn.Conv2d)]


def _read(files: list[Path]) -> Iterator[tuple[str, Stored | Tensor]]:
    for file in files:
        yield from ((name, tensor) for name, tensor in packed_tensors(file) if isinstance(tensor, Stored))


def _rounded(network: nn.Module, component: str, quant: str) -> Iterator[tuple[str, Stored | Tensor]]:
    """The weights that `modelgrove compress` would take, one after the other."""
    chosen = CompressorParams()
    for path, layer in _layers(network):
        name, weight = f"{path}.weight", layer.get_parameter("weight")
        if chosen.takes_shape(f"{component}/{name}", weight.shape):
            yield name, pack(weight.detach(), *GRIDS[quant])


def _fast(layer: nn.Module, stored: Stored, _clock: Clock) -> nn.Module | None:
    layout = layout_of(stored.entry)
    if isinstance(layer, nn.Linear) and has_linear(layout):
        return QuantLinear(layout, stored.parts, layer.bias)
    if isinstance(layer, nn.Conv2d) and has_conv(layer, layout, stored.parts):
        return QuantConv2d(layer, layout, stored.parts)
    return None
