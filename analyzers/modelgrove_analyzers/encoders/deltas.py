"""What an encoder reads of a full fine-tune: each matrix less that of a reference, as U·diag(S)·Vᵀ.

The reference is the base that the models were made from, or where none is registered their mean. Raw weights say
little, because what they share with the base hides what training changed. Every difference X = W − W_ref is
standardised: multiplied such that the mean square of its entries is one, so that strength is no cue. Convolutions are
(out, in·kernel), as in a LoRA's update.

Each layer is given twice, as X and as Xᵀ. A step of training adds Σ g xᵀ, with the layer's inputs x and the gradients
g: what a fine-tune was trained on is seen on the input side, while a LoRA, whose A stays near its random start, shows
its output side alone. Encoders that look at one side or one layer choose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from modelgrove_analyzers.encoders.features import Shape, common_shapes, read_layers
from modelgrove_hub.errors import DataError
from modelgrove_hub.formats.adapters import FLOATS

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_hub.contracts import InputModel
    from modelgrove_kernels.lowrank import Canonical

TRANSPOSED = ".T"
"""Ends the name of a layer that is given as Xᵀ."""
_ROUNDING = 0.25
"""‖X‖ / (ε ‖W‖) up to which a difference is rounding alone: rounding to nearest gives 0.19, ε being the dtype's."""


class _Stored(Protocol):
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> Tensor: ...


class Matrices(Mapping[str, "Tensor"]):
    """The matrices (out, in) of a model by layer, in the stored dtype, read from disk each time one is asked for.

    All tensors of floating-point numbers with two dimensions or more count. Layers are named as those of adapters:
    "unet.down_blocks.0.conv.weight" is "unet_down_blocks_0_conv".
    """

    def __init__(self, name: str, tensors: Iterable[_Stored]) -> None:
        self.name = name
        self._tensors = {
            tensor.name.removesuffix(".weight").replace(".", "_").replace("/", "_"): tensor
            for tensor in tensors
            if tensor.dtype in FLOATS and len(tensor.shape) > 1 and all(tensor.shape)
        }

    def __getitem__(self, layer: str) -> Tensor:
        return self._tensors[layer].read().flatten(1)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def only(self, layers: Iterable[str]) -> Matrices:
        """Some of the layers."""
        found = Matrices(self.name, ())
        found._tensors = {layer: self._tensors[layer] for layer in layers}
        return found

    def shape(self, layer: str) -> Shape:
        """(out, in), from the header."""
        out, *rest = self._tensors[layer].shape
        return out, prod(rest)


def find_reference(models: Sequence[InputModel], temp: Path) -> Matrices:
    """The base that most of `models` were made from, or their mean, which is written into the folder `temp`.

    Only layers that half of them have, in the same shape.

    Raises:
        DataError: a model holds no safetensors file, or there are no such layers.
    """
    opened = [Matrices(model.name, model.tensors()) for model in models]
    bases = {model.base.name: model.base for model in models if model.base}
    found = Counter(model.base.name for model in models if model.base).most_common(1)
    shapes = common_shapes([{layer: model.shape(layer) for layer in model} for model in opened])
    if found and 2 * found[0][1] >= len(models):
        reference = Matrices(found[0][0], bases[found[0][0]].tensors())
    else:
        reference = _mean(opened, shapes, temp / "mean.safetensors")
    common = reference.only(layer for layer in reference if shapes.get(layer) == reference.shape(layer))
    if not common:
        raise DataError(f"{len(models)} checkpoints have no matrices in common: they belong to different networks")
    return common


def read_model(model: InputModel, reference: Mapping[str, Tensor] | None, columns: int) -> dict[str, Canonical]:
    """The `columns` leading directions of every layer's update: of an adapter, or with a reference of a full fine-tune.

    Raises:
        UsageError: it is no adapter whose file alone says what it adds.
        DataError: it holds values that are not finite or far too large, changes nothing, or differs from the
            reference by rounding or in its sizes.
    """
    from modelgrove_hub.formats.updates import read_updates

    if reference is not None:
        return read_deltas(model, reference, columns)
    layers = read_layers(read_updates(model), columns)
    if not layers:
        raise DataError(f"{model.name} changes nothing: all of its updates are zero")
    return layers


def read_deltas(model: InputModel, reference: Mapping[str, Tensor], columns: int) -> dict[str, Canonical]:
    """The `columns` leading directions of what is different from the reference, one matrix in memory at a time.

    Raises:
        DataError: there is no layer of the reference, one has another shape there or holds values that are not
            finite, or nothing differs by more than rounding.
    """
    from modelgrove_kernels.lowrank import leading

    matrices = Matrices(model.name, model.tensors())
    if not matrices.keys() & reference.keys():
        raise DataError(f"{model.name} has none of the expert's layers, such as {next(iter(reference))}")
    layers = {}
    for layer in reference:
        if layer not in matrices:
            continue
        difference = _difference(matrices, layer, reference[layer])
        if difference is not None:
            layers[layer] = leading(difference, columns)
            layers[layer + TRANSPOSED] = layers[layer].T
    if not layers:
        raise DataError(f"{model.name} differs from what it is compared with by rounding at most")
    return layers


def used_of(reference: Mapping[str, Tensor] | None, layers: Iterable[str]) -> dict[str, Tensor] | None:
    """The reference of those `layers`, which may be given as Xᵀ, that an expert looks at."""
    if reference is None:
        return None
    return {name: reference[name] for name in dict.fromkeys(layer.removesuffix(TRANSPOSED) for layer in layers)}


def _difference(matrices: Matrices, layer: str, reference: Tensor) -> Tensor | None:
    """X standardised, float32; None where it is zero but for rounding."""
    import torch

    if matrices.shape(layer) != tuple(reference.shape):
        sizes = f"shape {matrices.shape(layer)}, the expert knows {tuple(reference.shape)}"
        raise DataError(f"layer {layer} of {matrices.name} has {sizes}: it belongs to another base model")
    values = matrices[layer]
    rounding = _ROUNDING * max(torch.finfo(values.dtype).eps, torch.finfo(reference.dtype).eps)
    difference: Tensor = values.float() - reference.float()
    norm = float(difference.norm())
    if not isfinite(norm):
        raise DataError(f"layer {layer} of {matrices.name} holds NaN or infinite values")
    if norm <= rounding * float(values.float().norm()):
        return None
    difference *= difference.numel() ** 0.5 / norm
    return difference


def _mean(models: Sequence[Matrices], shapes: Mapping[str, Shape], path: Path) -> Matrices:
    import torch

    from modelgrove_hub.store.tensors import all_finite, tensors_of
    from modelgrove_hub.store.writer import SafetensorsWriter

    with SafetensorsWriter(path) as writer:
        for layer, shape in shapes.items():
            total, count = torch.zeros(shape), 0
            for model in models:
                if layer in model and model.shape(layer) == shape:
                    values = model[layer].float()
                    # What is not finite is refused when the model itself is read.
                    finite = all_finite(values)
                    total, count = (total + values, count + 1) if finite else (total, count)
            writer.add(layer, total / max(count, 1))
    return Matrices("the mean of the models", tensors_of(path))
