"""Where the weights and biases of a checkpoint's modules lie, by the names that adapters use for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from modelgrove_hub.contracts import InputModel, LazyTensor
from modelgrove_hub.formats.adapter_keys import flat, module_of
from modelgrove_hub.formats.adapters import full_key
from modelgrove_hub.formats.naming import container_names
from modelgrove_hub.formats.native_names import Surroundings, pieces, swap_halves

if TYPE_CHECKING:
    from torch import Tensor

_PARAMETERS = {
    ".weight": "weight",
    ".bias": "bias",
    ".in_proj_weight": "weight",
    ".in_proj_bias": "bias",
}
_FUSED = ".in_proj"
"""OpenCLIP's attention has its fused matrix as a parameter of its own, not in a module."""

_CLIP = ("encoder.layers.", "embeddings.token_embedding.", "embeddings.position_embedding.", "final_layer_norm.")


@dataclass(frozen=True)
class Slot:
    """A parameter, or the rows of a fused one. `shape` is (out, in·kernel), of a vector (1, n)."""

    tensor: LazyTensor
    rows: slice | None
    shape: tuple[int, int]
    swapped: bool = False
    """Its authors have the second half of these rows first."""

    def read(self) -> Tensor:
        """The values, float32, of `shape`."""
        return self.part_of(self.tensor.read().float()).reshape(self.shape)

    def part_of(self, values: Tensor) -> Tensor:
        """The rows of this slot: a view of the whole tensor's values, or a copy where halves are swapped."""
        return swap_halves(self._rows(values)) if self.swapped else self._rows(values)

    def put(self, part: Tensor, values: Tensor) -> None:
        """Make a changed `part_of(values)` that of `values`; a view already is."""
        if self.swapped:
            rows = self._rows(values)
            rows.copy_(swap_halves(part.reshape(rows.shape)))

    def _rows(self, values: Tensor) -> Tensor:
        return values if self.rows is None else values[self.rows]


def slots_of(model: InputModel) -> Mapping[str, Slot]:
    """Canonical module name, flat, and ".bias" behind it for a bias → where it lies. Headers only.

    Beside components that adapters know, the names in any other folder (controlnet/, vae/) begin with the folder's.
    """
    found: dict[str, Slot] = {}
    parameters = list(parameters_of(model))
    around = Surroundings.of(_split(stem)[1] for stem, *_ in parameters)
    widths = {stem: prod(tensor.shape[1:]) for stem, _, tensor in parameters if len(tensor.shape) > 1}
    for stem, parameter, tensor in parameters:
        rows, columns = tensor.shape[0], prod(tensor.shape[1:])
        shape = (1, rows) if len(tensor.shape) == 1 else (rows, columns)
        for name, slot in _slots(stem, tensor, shape, replace(around, width=widths.get(stem))):
            found.setdefault(flat(name) + ("" if parameter == "weight" else f".{parameter}"), slot)
    return found


def slot_name(target: str) -> str:
    """An update's canonical name, as `slots_of` has it."""
    module = target.removesuffix(".bias")
    return flat(module) + target.removeprefix(module)


def parameters_of(model: InputModel) -> Iterator[tuple[str, str, LazyTensor]]:
    """The module's path as adapters have it, "weight" or "bias", and the tensor; other tensors are left out."""
    tensors = [tensor for tensor in model.tensors() if tensor.shape and 0 not in tensor.shape]
    parted = any(full_key(tensor) != tensor.key for tensor in tensors)
    for tensor in tensors:
        stranger = parted and tensor.name != tensor.key and full_key(tensor) == tensor.key
        path = tensor.name.replace("/", ".") if stranger else _path(tensor)
        suffix = next((suffix for suffix in _PARAMETERS if path.endswith(suffix)), None)
        if suffix is not None:
            yield path.removesuffix(suffix) + (_FUSED if suffix.startswith(_FUSED) else ""), _PARAMETERS[suffix], tensor


def _slots(stem: str, tensor: LazyTensor, shape: tuple[int, int], around: Surroundings) -> list[tuple[str, Slot]]:
    """The module, in diffusers' pieces where its authors have another name for it, and as it is called."""
    component, module = _split(stem)
    slots = [(module_of(stem), Slot(tensor, None, shape))]
    for piece in pieces(module, shape, around):
        size = piece.stop - piece.start
        part = (1, size) if shape[0] == 1 else (size, shape[1])
        whole = size == shape[1 if shape[0] == 1 else 0]
        rows = None if whole else slice(piece.start, piece.stop)
        slots.append((module_of(component + piece.module), Slot(tensor, rows, part, piece.swapped)))
    return slots


def _path(tensor: LazyTensor) -> str:
    """The tensor's name as adapters have it: behind "text_encoder." of that, behind nothing of a denoiser."""
    name = full_key(tensor)
    prefix = container_names().part_of(name)
    part = container_names().parts.get(prefix, "")
    rest = name.removeprefix(prefix)
    if not part.startswith("text_encoder"):
        return rest if part in ("denoiser", "unet", "model") else name
    # transformers 5 has CLIP's layers no more under "text_model", where adapters have them.
    clip = part != "text_encoder_3" and rest.startswith(_CLIP)
    return f"{part}.{'text_model.' if clip else ''}{rest}"


def _split(stem: str) -> tuple[str, str]:
    """("text_encoder.", rest) or ("", stem)."""
    head, dot, rest = stem.partition(".")
    return (head + dot, rest) if head.startswith("text_encoder") else ("", stem)
