"""What an adapter adds to each module, wherever the file alone says it: LoRA, LoHa and whole differences.

LoHa (Hyeon-Woo et al., arXiv 2108.06098) as LyCORIS writes it: (w1_a · w1_b) ∘ (w2_a · w2_b) · alpha / rank. A whole
difference (`.diff`) is the update itself. What DoRA adds depends on the base's weights: such a model has to be
exported as differences first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from modelgrove_hub.contracts import InputModel, LazyTensor
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.adapter_keys import foreign_method, module_of, parse_key
from modelgrove_hub.formats.adapters import (
    AdapterFile,
    Factors,
    check_factor,
    full_key,
    open_adapter,
    open_tensors,
    read_alpha,
    read_finite,
)
from modelgrove_hub.formats.naming import adapter_names

if TYPE_CHECKING:
    from torch import Tensor

_DIFFERENCE, _ALPHA = ".diff", ".alpha"
_HADAMARD = (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b")
_TUCKER = (".hada_t1", ".hada_t2")
_MOST_ENTRIES = 2**28
"""Of a LoHa's product, which a small file may declare to be huge; the largest layers have 2²⁶."""

_Parts = dict[str, LazyTensor]
"""Suffix → tensor of one module."""


def read_updates(model: InputModel) -> Iterator[tuple[str, Factors | Tensor]]:
    """Each module's update by canonical name, one in memory at a time: factors, or a matrix (out, in·kernel), float32.

    Raises:
        UsageError: it is another kind of adapter, which is named, or no adapter at all.
        DataError: parts do not fit together, hold values that are not finite, have rank 0, or say a module twice.
    """
    tensors = list(model.tensors())
    modules = _whole_modules(tensors)
    taken = {tensor.name for parts in modules.values() for tensor in parts.values()}
    rest = [tensor for tensor in tensors if tensor.name not in taken]
    lora = _open_lora(model, rest, alone=not modules)
    targets = lora.targets if lora else {}
    for module, parts in modules.items():
        if module in targets or (_DIFFERENCE in parts and parts.keys() & set(_HADAMARD)):
            raise DataError(f"model {model.name} changes {module} by two methods: which one counts?")
        yield module, _difference(parts) if _DIFFERENCE in parts else _hadamard(module, parts)
    for module, target in targets.items():
        yield module, target.read()


def _whole_modules(tensors: Sequence[LazyTensor]) -> dict[str, _Parts]:
    """The modules of LoHa and of whole differences, with their tensors."""
    found: dict[str, _Parts] = {}
    alphas: dict[str, LazyTensor] = {}
    for tensor in tensors:
        path, suffix = adapter_names().split(full_key(tensor)) or ("", "")
        if suffix in _HADAMARD or suffix == _DIFFERENCE:
            parts = found.setdefault(module_of(path), {})
            if suffix in parts:
                raise DataError(f"tensors {tensor.name} and {parts[suffix].name} are both {module_of(path)}'s {suffix}")
            parts[suffix] = tensor
        elif suffix in _TUCKER:
            raise UsageError(
                f"tensor {tensor.name} is the Tucker core of a LoHa on a convolution, which is not understood"
            )
        elif suffix == _ALPHA:
            alphas[module_of(path)] = tensor
    for module in found.keys() & alphas.keys():
        found[module][_ALPHA] = alphas[module]
    return found


def _open_lora(model: InputModel, tensors: list[LazyTensor], *, alone: bool) -> AdapterFile | None:
    """The plain LoRA among the tensors, which there must be if it is alone."""
    for tensor in tensors:
        method = foreign_method(tensor.name)
        if method == "dora":
            raise UsageError(
                f"model {model.name} is a DoRA, as {tensor.name} says: what it adds depends on the base's weights. "
                f"Export its weight differences ({_DIFFERENCE})"
            )
        if method and not alone:
            raise UsageError(
                f"model {model.name}: {tensor.name} belongs to a {method} adapter, which is not understood"
            )
    if alone:
        return open_adapter(model)
    return open_tensors(model, tensors) if any(parse_key(full_key(tensor)) for tensor in tensors) else None


def _difference(parts: Mapping[str, LazyTensor]) -> Tensor:
    values = read_finite(parts[_DIFFERENCE])
    return values.flatten(1) if values.ndim > 1 else values.reshape(1, -1)  # a norm's weight is a vector


def _hadamard(module: str, parts: Mapping[str, LazyTensor]) -> Tensor:
    import torch

    missing = [suffix for suffix in _HADAMARD if suffix not in parts]
    if missing:
        raise DataError(f"module {module} of a LoHa lacks {', '.join(missing)}")
    factors = [parts[suffix] for suffix in _HADAMARD]
    for tensor in factors:
        check_factor(tensor)
    shapes = [tensor.shape for tensor in factors]
    (out, rank), (_, width) = shapes[:2] if all(len(shape) == 2 for shape in shapes) else ((0, 0), (0, 0))
    if not rank or shapes[0] != shapes[2] or shapes[1] != shapes[3] or shapes[1][0] != rank:
        raise DataError(f"module {module}: {', '.join(map(str, shapes))} are not the shapes of a LoHa's factors")
    if out * width > _MOST_ENTRIES:
        raise DataError(f"module {module}: a LoHa of {out} × {width} numbers, at most {_MOST_ENTRIES} are read")
    alpha = read_alpha(parts[_ALPHA]) if _ALPHA in parts else None
    first_up, first_down, second_up, second_down = map(read_finite, factors)
    update = (first_up @ first_down) * (second_up @ second_down) * (alpha / rank if alpha else 1.0)
    if not bool(torch.isfinite(update).all()):
        raise DataError(f"module {module}: the product of a LoHa's factors is infinite")
    return update
