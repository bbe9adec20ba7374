"""Layers that are given tensors joined side by side: a UNet's shortcuts, hidden states beside skipped ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary


@contextmanager
def concatenated(network: nn.Module) -> Iterator[Mapping[str, tuple[int, ...]]]:
    """Linear layers and convolutions whose input is a `torch.cat` along its channels → the channels of each part.

    Filled while the context lasts. A layer is found where it is given the joined tensor itself; what comes through a
    norm is in one range again.
    """
    found: dict[str, tuple[int, ...]] = {}
    with ExitStack() as hooks:
        joins = hooks.enter_context(_Joins())
        for path, layer in network.named_modules():
            axis = 1 if isinstance(layer, nn.Conv2d) else -1 if isinstance(layer, nn.Linear) else None
            if axis is None:
                continue

            def look(_layer: nn.Module, inputs: tuple[Any, ...], path: str = path, axis: int = axis) -> None:
                sizes = joins.sizes(inputs[0], axis)
                if sizes:
                    found[path] = sizes

            hooks.callback(layer.register_forward_pre_hook(look).remove)
        yield found


class _Joins(TorchFunctionMode):
    """Remembers what was joined."""

    def __init__(self) -> None:
        super().__init__()
        self._made: Any = WeakTensorKeyDictionary()  # it has no types

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = func(*args, **kwargs)
        if func in (torch.cat, torch.concat, torch.concatenate):
            parts = args[0] if args else kwargs["tensors"]
            axis = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
            self._made[answer] = axis % answer.ndim, tuple(part.shape[axis] for part in parts)
        return answer

    def sizes(self, tensor: Tensor, axis: int) -> tuple[int, ...]:
        """The parts of a joined tensor along `axis`; () if it was not joined so."""
        made, sizes = self._made.get(tensor, (None, ()))
        return tuple(size for size in sizes if size) if made == axis % tensor.ndim and len(sizes) > 1 else ()
