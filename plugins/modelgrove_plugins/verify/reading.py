"""A model's matrices under names that every copy of it has: of a network's weights, or of what an adapter adds to them.

Names are those that adapters use for modules, so that a mark in an adapter is found in a checkpoint that it was baked
into. Packed weights are unpacked, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, cast

from modelgrove_hub.contracts import InputModel, LazyTensor
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.adapters import Factors, Target, check_finite
from modelgrove_hub.formats.quantized import PackedTensor, manifest_of
from modelgrove_hub.formats.slots import Slot, slot_name, slots_of
from modelgrove_hub.formats.updates import Update, open_updates
from modelgrove_plugins.compress.targets import FLOATS

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_kernels.lowrank import LowRank

SMALLEST = 4096
"""Weights of a matrix that carries a mark. A constant: whoever could choose it could try until it suits."""


@dataclass(frozen=True)
class Matrix:
    """One matrix (out, in·kernel) of a model: known from the header, read when asked."""

    name: str
    shape: tuple[int, int]
    read: Callable[[], Tensor | LowRank]
    """Float32. Raises DataError if a value is not finite."""


def matrices_of(model: InputModel) -> list[Matrix]:
    """What carries a mark, sorted by name.

    Raises:
        UsageError: nothing does, or an adapter's effect is no change of weights.
        DataError: the model holds no safetensors, or what it holds does not fit together.
    """
    found = adapter_matrices(model) if model.adapter_type is not None else network_matrices(model)
    if not found:
        raise UsageError(f"model {model.name} has no matrix of {SMALLEST} weights: there is no room for a mark")
    return sorted(found, key=lambda matrix: matrix.name)


def network_matrices(model: InputModel) -> list[Matrix]:
    """Of a checkpoint; packed tensors are there as what they stand for."""
    return [Matrix(name, slot.shape, partial(read_slot, slot)) for name, slot in carrying_slots(model).items()]


def carrying_slots(model: InputModel) -> dict[str, Slot]:
    """Name → where the matrix is; a matrix that its authors fused is there in the pieces that diffusers keeps apart."""
    by_tensor: dict[str, list[tuple[str, Slot]]] = {}
    for name, slot in slots_of(cast("InputModel", Unpacked(model))).items():
        if slot.shape[0] > 1 and prod(slot.shape) >= SMALLEST and slot.tensor.dtype in FLOATS:
            by_tensor.setdefault(slot.tensor.name, []).append((name, slot))
    return {name: slot for slots in by_tensor.values() for name, slot in (slots[1:] or slots)}


def adapter_matrices(model: InputModel) -> list[Matrix]:
    """Of an adapter: the product of its factors, or the difference that it is."""
    found = []
    for name, update in open_updates(model).targets.items():
        if update.needs_weight:
            raise UsageError(
                f"model {model.name} is a {update.method} adapter, as {name} says: what it adds depends on the base's "
                "weights. Bake it into its base, and look there"
            )
        if update.parameter == "weight" and update.shape and carries(update):
            found.append(Matrix(slot_name(name), update.shape, partial(read_update, update)))
    return found


def carries(update: Update) -> bool:
    """Whether an update is large enough, and of a weight."""
    shape = update.shape
    return update.parameter == "weight" and shape is not None and shape[0] > 1 and prod(shape) >= SMALLEST


def factors_of(model: InputModel) -> dict[str, Target]:
    """The modules of a LoRA whose factors can be written anew, by the names of their matrices."""
    targets = open_updates(model).targets
    return {
        slot_name(name): target
        for name, target in targets.items()
        if isinstance(target, Target) and target.mid is None and carries(target)
    }


def read_update(update: Update) -> Tensor | LowRank:
    """A product of factors as such, anything else as a matrix."""
    from modelgrove_kernels.lowrank import LowRank

    found = update.read()
    return LowRank(found.up, found.down) if isinstance(found, Factors) else found


def read_slot(slot: Slot) -> Tensor:
    """The finite values of a matrix, float32."""
    return check_finite(slot.read(), f"tensor {slot.tensor.name}")


@dataclass
class _Read:
    """A tensor that reads as other values than those in its file (a `LazyTensor`)."""

    name: str
    key: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    values: Callable[[], Tensor]

    def read(self) -> Tensor:
        """The values, made now."""
        return self.values()


class Changed:
    """A model whose tensors read as `change` returns them; in all else the model itself."""

    def __init__(self, model: InputModel, change: Callable[[LazyTensor], Tensor]) -> None:
        self._model, self._change = model, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def tensors(self) -> Iterator[LazyTensor]:
        """All tensors, changed when they are read."""
        for tensor in self._model.tensors():
            values = partial(self._change, tensor)
            yield _Read(tensor.name, tensor.key, tensor.file, tensor.dtype, tensor.shape, values)


class Unpacked:
    """A model whose packed tensors read as dense ones; in all else the model itself."""

    def __init__(self, model: InputModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def tensors(self) -> Iterator[LazyTensor]:
        """All tensors; those of packed files under their original names.

        Raises:
            DataError: a manifest is broken, or the file does not hold what it says.
        """
        files, by_file = self._model.files(), dict[str, dict[str, LazyTensor]]()
        for tensor in self._model.tensors():
            by_file.setdefault(tensor.file, {})[tensor.key] = tensor
        for file, tensors in by_file.items():
            manifest = manifest_of(files[file])
            folder = file.rpartition("/")[0]
            for key, entry in manifest.tensors.items() if manifest else ():
                try:
                    parts = {suffix: tensors.pop(f"{key}.{suffix}") for suffix in entry.parts()}
                except KeyError as error:
                    raise DataError(f"{file} of {self._model.name} lacks the tensor {error.args[0]}") from None

                name = f"{folder}/{key}" if folder else key
                values = partial(_unpacked, name, entry, parts)
                yield _Read(name, key, file, entry.dtype, tuple(entry.shape), values)
            yield from tensors.values()


def _unpacked(name: str, entry: PackedTensor, parts: Mapping[str, LazyTensor]) -> Tensor:
    from modelgrove_plugins.compress.packed import Stored, unpack

    return unpack(Stored(entry, {suffix: part.read() for suffix, part in parts.items()}), name)
