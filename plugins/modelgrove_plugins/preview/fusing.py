"""Fuse an adapter into a network: W += weight · up @ down on every layer it names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modelgrove_hub.errors import DataError, UsageError
from modelgrove_kernels.modules import QuantConv2d, QuantLinear

if TYPE_CHECKING:
    from modelgrove_hub.formats.adapters import Adapter, Factors

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_QUANTIZED = (QuantLinear, QuantConv2d)
_SHOWN = 5


def fuse(
    networks: Mapping[str, nn.Module], adapter: Adapter, name: str, weight: float, undo: ExitStack | None = None
) -> dict[str, Any]:
    """Add the adapter's products to the layers they belong to; returns how much of it fitted.

    When `undo` closes, the layers are again what they were.

    To a quantized layer they are added as a branch of their rank: its codes stay as they are.

    Names are compared with "_" for ".", as kohya's files flatten them; an adapter that does not
    say which component it is for may belong to any.

    Raises:
        UsageError: no layer has a name that the adapter knows.
        DataError: a product does not have the shape of its layer.
    """
    layers = dict(_layers(networks))
    missing = []
    for key, factors in adapter.modules.items():
        layer = layers.get(_flat(f"{factors.component}.{factors.module}")) or layers.get(_flat(factors.module))
        if layer is None:
            missing.append(key)
        else:
            if undo is not None:
                _keep(layer, undo)
            _add(layer, factors, f"{name}, module {key}", weight)
    matched = len(adapter.modules) - len(missing)
    if matched == 0:
        raise UsageError(
            f"{name} fits no layer of the base: it names {', '.join(missing[:2]) or 'none'}; "
            f"the base has {next(iter(layers), 'no layers')} …"
        )
    return {
        "matched": matched,
        "modules": len(adapter.modules),
        "missing": missing[:_SHOWN],
        "tensors_not_understood": len(adapter.unmatched),
    }


def _layers(networks: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Flattened name → layer, alone and with its component in front."""
    for component, network in networks.items():
        for path, module in network.named_modules():
            if isinstance(module, (*_PLAIN, *_QUANTIZED)):
                # LoRA files have CLIP's layers under "text_model", where transformers 5 has them no more.
                inner = component.startswith("text_encoder") and not path.startswith("text_model.")
                name = f"text_model.{path}" if inner else path
                yield _flat(name), module
                yield _flat(f"{component}.{name}"), module


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _keep(layer: nn.Module, undo: ExitStack) -> None:
    if isinstance(layer, _QUANTIZED):
        branch = {name: part for name, part in vars(layer).items() if name in ("down", "up", "branch")}
        undo.callback(vars(layer).update, branch)
    else:
        values = layer.get_parameter("weight").data
        undo.callback(values.copy_, values.clone())


@torch.no_grad()
def _add(layer: nn.Module, factors: Factors, place: str, weight: float) -> None:
    if isinstance(layer, _QUANTIZED):
        _add_branch(layer, factors, place, weight)
        return
    values: Tensor = layer.get_parameter("weight")
    product = factors.up @ factors.down
    if product.shape[0] != values.shape[0] or product.numel() != values.numel():
        raise DataError(f"{place}: its product is {tuple(product.shape)}, the layer's weight {tuple(values.shape)}")
    values += weight * product.reshape(values.shape).to(values.dtype)


def _add_branch(layer: QuantLinear | QuantConv2d, factors: Factors, place: str, weight: float) -> None:
    if factors.up.shape[0] != layer.rows or factors.down[0].numel() != layer.columns:
        shape = (factors.up.shape[0], factors.down[0].numel())
        raise DataError(f"{place}: its product is {shape}, the layer's weight {(layer.rows, layer.columns)}")
    layer.add_branch(factors.down.flatten(1), weight * factors.up.flatten(1))
