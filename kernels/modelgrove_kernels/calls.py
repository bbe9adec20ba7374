"""Calls of a network, kept: what it was given, and what it answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """One forward pass: its arguments, its first output, and the timestep that the whole network was in."""

    timestep: float
    positional: tuple[Any, ...]
    named: Mapping[str, Any]
    output: Tensor


def timestep_of(positional: Sequence[Any], named: Mapping[str, Any]) -> float:
    """The timestep that a diffusers denoiser was called with: named so, or its second argument; 0 if there is none."""
    time = named["timestep"] if "timestep" in named else positional[1] if len(positional) > 1 else 0.0
    return float(torch.as_tensor(time).flatten()[0])


def output_of(answer: Any) -> Tensor:
    """The first output of a network or block: of a tuple, of diffusers' output classes, or itself."""
    found: Tensor = answer[0] if isinstance(answer, tuple) else getattr(answer, "sample", answer)
    return found


@contextmanager
def recorded(network: nn.Module) -> Iterator[list[Call]]:
    """The calls of a denoiser while the context lasts."""
    calls: list[Call] = []

    def keep(_network: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], answer: Any) -> None:
        calls.append(Call(timestep_of(positional, named), positional, dict(named), output_of(answer).clone()))

    handle = network.register_forward_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def told(network: nn.Module, tell: Callable[[float], None]) -> Iterator[None]:
    """Before each call of a denoiser `tell` hears its timestep, while the context lasts."""

    def hear(_network: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        tell(timestep_of(positional, named))

    handle = network.register_forward_pre_hook(hear, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def picked(calls: Sequence[Call], size: int, generator: torch.Generator) -> Call:
    """A batch of `size` samples of one call, both drawn at random; all tensors of a call have its samples in front."""
    call = calls[int(torch.randint(len(calls), (1,), generator=generator))]
    count = len(call.output)
    chosen = torch.randperm(count, generator=generator)[:size]

    def pick(tensor: Tensor) -> Tensor:
        return tensor[chosen] if tensor.ndim and len(tensor) == count else tensor

    positional, named = _mapped(pick, (call.positional, dict(call.named)))
    return Call(call.timestep, positional, named, call.output[chosen])


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nested tuples, lists and mappings with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _mapped(change, part) for name, part in value.items()}
    return type(value)(_mapped(change, part) for part in value) if isinstance(value, list | tuple) else value
