"""A network with quantized layers in the place of its own: what a packed file computes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from modelgrove_hub.errors import UsageError
from modelgrove_hub.formats.quantized import manifest_of
from modelgrove_hub.store.tensors import tensors_of
from modelgrove_kernels.calls import timestep_of
from modelgrove_kernels.emulation import ActivationRule, Clock, EmulatedConv2d, EmulatedLinear
from modelgrove_kernels.layouts import layout_of
from modelgrove_plugins.compress.attention import round_attention
from modelgrove_plugins.compress.packed import Stored, unpack

if TYPE_CHECKING:
    from modelgrove_hub.formats.quantized import Activations

Make = Callable[[nn.Module, Stored, Clock], "nn.Module | None"]
"""A layer, what its weight was packed to, the network's clock → the layer in its place; None to unpack the weight."""


def packed_tensors(file: Path) -> Iterator[tuple[str, Stored | Tensor]]:
    """The tensors of a file under their original names, packed ones in their parts."""
    stored = {tensor.name: tensor for tensor in tensors_of(file)}
    manifest = manifest_of(file)
    for name, entry in manifest.tensors.items() if manifest else ():
        yield name, Stored(entry, {suffix: stored.pop(f"{name}.{suffix}").read() for suffix in entry.parts()})
    for name, tensor in stored.items():
        yield name, tensor.read()


def emulated(layer: nn.Module, stored: Stored, clock: Clock) -> nn.Module | None:
    """The layer in plain torch, with its activations on the grid that the method wants."""
    rule, layout = _rule(stored.entry.activations), layout_of(stored.entry)
    if isinstance(layer, nn.Linear):
        return EmulatedLinear(layout, stored.parts, rule, layer.bias, clock)
    if isinstance(layer, nn.Conv2d):
        return EmulatedConv2d(layout, stored.parts, rule, layer, clock)
    return None


def quantized_copy(
    network: nn.Module,
    tensors: Mapping[str, Stored | Tensor],
    timesteps: Sequence[int] = (),
    make: Make = emulated,
) -> nn.Module:
    """A copy of `network` whose tensors are `tensors` where they are named ("conv_in.weight"), its own elsewhere.

    The clock of its layers is set by the timestep of each forward pass, against the bounds `timesteps`. Attention is
    rounded as its values' entries say.

    Raises:
        UsageError: the network has no such tensor, it has another shape, or is no cross-attention's that is to be one.
    """
    copy = deepcopy(network)
    swap_layers(copy, tensors.items(), timesteps, make)
    for name, tensor in tensors.items():
        wanted = tensor.entry.attention if isinstance(tensor, Stored) else None
        if wanted is not None:
            round_attention(copy, name.removesuffix(".to_v.weight"), wanted.bits, wanted.start)
    return copy


def swap_layers(
    network: nn.Module,
    tensors: Iterable[tuple[str, Stored | Tensor]],
    timesteps: Sequence[int] = (),
    make: Make = emulated,
) -> int:
    """What `quantized_copy` does, in the network itself; returns how many layers were replaced.

    Raises:
        UsageError: the network has no such tensor, or it has another shape.
    """
    clock, swapped = Clock(), 0
    for name, tensor in tensors:
        path, _, leaf = name.rpartition(".")
        owner = _owner(network, path, leaf, name, _shape(tensor))
        layer = make(owner, tensor, clock) if isinstance(tensor, Stored) and leaf == "weight" else None
        if layer is not None:
            _replace(network, path, layer)
            swapped += 1
            continue
        values = unpack(tensor, name) if isinstance(tensor, Stored) else tensor
        getattr(owner, leaf).data = values.float() if values.is_floating_point() else values
    if timesteps:
        network.register_forward_pre_hook(_teller(clock, timesteps), with_kwargs=True)
    return swapped


def _shape(tensor: Stored | Tensor) -> tuple[int, ...]:
    return tensor.entry.shape if isinstance(tensor, Stored) else tuple(tensor.shape)


def _owner(network: nn.Module, path: str, leaf: str, name: str, shape: tuple[int, ...]) -> nn.Module:
    try:
        owner = network.get_submodule(path)
    except AttributeError:
        owner = None
    held = getattr(owner, leaf, None)
    if owner is None or not isinstance(held, Tensor) or tuple(held.shape) != shape:
        raise UsageError(f"tensor {name} {shape} is not one of this {type(network).__name__}")
    return owner


def _replace(network: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(network.get_submodule(parent), child, layer)


def _rule(activations: Activations | None) -> ActivationRule | None:
    if activations is None:
        return None
    return ActivationRule(activations.bits, activations.ranges, activations.width, activations.exponent)


def _teller(clock: Clock, timesteps: Sequence[int]) -> Callable[..., None]:
    def tell(_network: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        clock.interval = max(0, bisect_right(timesteps, timestep_of(positional, named)) - 1)

    return tell
