"""Fuse an adapter into a network: W += weight · ΔW on every layer it names, whatever its method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modelgrove_hub.errors import DataError, UsageError
from modelgrove_kernels.modules import QuantConv2d, QuantLinear

if TYPE_CHECKING:
    from modelgrove_hub.formats.adapters import AdapterFile
    from modelgrove_hub.formats.updates import Update

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.GroupNorm, nn.LayerNorm)
_QUANTIZED = (QuantLinear, QuantConv2d)
_SHOWN = 5


def fuse(
    networks: Mapping[str, nn.Module], adapter: AdapterFile[Update], weight: float, undo: ExitStack | None = None
) -> dict[str, Any]:
    """Add the adapter's updates to the layers they belong to; returns how much of it fitted.

    When `undo` closes, the layers are again what they were.

    To a quantized layer factors are added as a branch of their rank: its codes stay as they are.

    Names are compared with "_" for ".", as kohya's files flatten them; an adapter that does not
    say which component it is for may belong to any.

    Raises:
        UsageError: no layer has a name that the adapter knows, or a quantized one would need more than factors.
        DataError: an update does not have the shape of its layer.
    """
    layers = dict(layers_of(networks))
    missing = []
    for key, update in adapter.targets.items():
        layer = layers.get(_flat(f"{update.component}.{update.module}")) or layers.get(_flat(update.module))
        if layer is None or getattr(layer, update.parameter, None) is None:
            missing.append(key)
        else:
            if undo is not None:
                _keep(layer, update.parameter, undo)
            _add(layer, update, f"{adapter.name}, module {key}", weight)
    matched = len(adapter.targets) - len(missing)
    if matched == 0:
        raise UsageError(
            f"{adapter.name} fits no layer of the base: it names {', '.join(missing[:2]) or 'none'}; "
            f"the base has {next(iter(layers), 'no layers')} …"
        )
    return {
        "matched": matched,
        "modules": len(adapter.targets),
        "missing": missing[:_SHOWN],
        "tensors_not_understood": len(adapter.unmatched),
    }


def layers_of(networks: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Flattened name → layer, alone and with its component in front: all that adapters may call it."""
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


def _keep(layer: nn.Module, parameter: str, undo: ExitStack) -> None:
    if isinstance(layer, _QUANTIZED):
        branch = {name: part for name, part in vars(layer).items() if name in ("down", "up", "branch")}
        undo.callback(vars(layer).update, branch)
    else:
        values = layer.get_parameter(parameter).data
        undo.callback(values.copy_, values.clone())


@torch.no_grad()
def _add(layer: nn.Module, update: Update, place: str, weight: float) -> None:
    if isinstance(layer, _QUANTIZED):
        _add_branch(layer, update, place, weight)
        return
    values: Tensor = layer.get_parameter(update.parameter)
    matrix = values.float().flatten(1) if values.ndim > 1 else values.float().unsqueeze(0)
    found = update.read(matrix) if update.needs_weight else update.read()
    change = found if isinstance(found, Tensor) else found.up @ found.down
    if change.shape[0] != matrix.shape[0] or change.numel() != values.numel():
        raise DataError(
            f"{place}: its update is {tuple(change.shape)}, the layer's {update.parameter} {tuple(values.shape)}"
        )
    values += weight * change.reshape(values.shape).to(values.dtype)


def _add_branch(layer: QuantLinear | QuantConv2d, update: Update, place: str, weight: float) -> None:
    factors = None if update.needs_weight or update.parameter != "weight" else update.read()
    if factors is None or isinstance(factors, Tensor):
        raise UsageError(
            f"{place}: a {update.method} adapter cannot stand beside a quantized layer; preview without --quant"
        )
    if factors.up.shape[0] != layer.rows or factors.down[0].numel() != layer.columns:
        shape = (factors.up.shape[0], factors.down[0].numel())
        raise DataError(f"{place}: its product is {shape}, the layer's weight {(layer.rows, layer.columns)}")
    layer.add_branch(factors.down.flatten(1), weight * factors.up.flatten(1))
