"""Read LoRAs: any of the usual files → exact factors per module.

Only the product of the factors means anything, so alpha and rank are folded into it once, by the
rule of the trainer that wrote the file, and never travel further.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from modelgrove_hub.contracts import InputModel, LazyTensor
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.adapter_keys import DENOISERS, Key, Role, foreign_method, parse_key
from modelgrove_hub.formats.adapter_scale import Scaling, read_scaling
from modelgrove_hub.formats.naming import adapter_names
from modelgrove_hub.formats.native_names import Piece, Surroundings, pieces
from modelgrove_hub.store.tensors import all_finite

if TYPE_CHECKING:
    from torch import Tensor

Kind = TypeVar("Kind", covariant=True)
"""Of update: a LoRA's, or any."""

FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Factors:
    """One module's update up · down: `up` (out, r) and `down` (r, in·kernel), float32, scale folded into `up`.

    `kernel` is () for a linear layer and the kernel's shape for a convolution, whose weight is
    (up · down).reshape(out, in, *kernel).
    """

    module: str
    component: str
    kernel: tuple[int, ...]
    down: Tensor
    up: Tensor
    restored: bool = True
    """False if the name is still kohya's flat one, because a word of it is not in the vocabulary."""

    @property
    def rank(self) -> int:
        """r, the number of rows of `down`."""
        return self.down.shape[0]


@dataclass(frozen=True)
class Target:
    """Where one module's factors lie in the file: known from the header, read when asked."""

    module: str
    component: str
    restored: bool
    rank: int
    kernel: tuple[int, ...]
    shape: tuple[int, int]
    """(out, in·kernel), the shape of the update as a matrix."""
    scale: float
    down: LazyTensor
    up: LazyTensor
    mid: LazyTensor | None = None
    """The Tucker core (rank, rank of `down`, *kernel) of a LoCon, between two convolutions of one pixel."""
    diagonal: LazyTensor | None = None
    """AdaLoRA's (rank, 1), between the factors."""
    piece: Piece | None = None
    """The rows of `up` that this module has, if its authors fuse it with others."""
    parameter: str = "weight"
    method: str = "lora"
    needs_weight: bool = False

    def read(self, weight: Tensor | None = None) -> Factors:  # noqa: ARG002  (an `updates.Update`)
        """The factors, with the scale folded into `up`; the base's weight is not needed.

        Raises:
            DataError: a factor holds NaN or infinite values, or the scale makes it infinite.
        """
        down = read_finite(self.down)
        if self.mid is not None:
            core = read_finite(self.mid)
            down = core.movedim(1, -1) @ down.flatten(1)  # (rank, *kernel, in)
            down = down.movedim(-1, 1)
        down = down.reshape(self.rank, self.shape[1])
        if self.diagonal is not None:
            down = down * read_finite(self.diagonal).reshape(self.rank, 1)
        up = read_finite(self.up, self.scale).flatten(1)
        if self.piece is not None:
            up = self.piece.of(up)
        return Factors(self.module, self.component, self.kernel, down, up, self.restored)

    def parted(self, around: Surroundings) -> tuple[Target, ...]:
        """This under diffusers' names, where the denoiser's authors have other ones."""
        if self.component not in DENOISERS:
            return (self,)
        return tuple(
            replace(
                self, module=piece.module, component="transformer", restored=True,
                shape=(piece.stop - piece.start, self.shape[1]), piece=piece,
            )
            for piece in pieces(self.module, self.shape, around)
        ) or (self,)  # fmt: skip


@dataclass(frozen=True)
class AdapterFile(Generic[Kind]):
    """An adapter whose header was understood. `targets` are keyed and sorted by canonical module name."""

    name: str
    targets: Mapping[str, Kind]
    unmatched: tuple[str, ...]
    """Tensors that belong to no update: nothing here takes them into account."""
    dtype: str
    """The widest dtype of the tensors, as safetensors writes it."""
    base: str | None
    """The base model that the file names, unchecked."""
    convention: str

    @property
    def coverage(self) -> dict[str, Any]:
        """How much of the file was understood, for reports."""
        return {"modules": len(self.targets), "unmatched": list(self.unmatched)}


@dataclass(frozen=True)
class Adapter:
    """A LoRA in memory."""

    modules: Mapping[str, Factors]
    unmatched: tuple[str, ...] = ()
    dtype: str = "F32"
    base: str | None = None


def read_adapter(model: InputModel) -> Adapter:
    """All factors of a LoRA in memory, float32. Raises what `open_adapter` and `Target.read` raise."""
    file = open_adapter(model)
    modules = {name: target.read() for name, target in file.targets.items()}
    return Adapter(modules, file.unmatched, file.dtype, file.base)


def open_adapter(model: InputModel) -> AdapterFile[Target]:
    """Understand a LoRA's tensors by name and shape; only the alphas are read.

    Raises:
        UsageError: it is another kind of adapter, which is named, or no adapter at all.
        DataError: factors do not fit together, have rank 0, or a configuration is broken.
    """
    tensors = list(model.tensors())
    _refuse_other_kinds(model.name, tensors)
    groups, unmatched = _group(tensors)
    scaling = read_scaling(model.files(), model.metadata(), model.name)
    scaling.require_plain()
    around = Surroundings.of(group.key.module for group in groups.values())
    targets: dict[str, Target] = {}
    for name in sorted(groups):
        whole = target_of(groups[name].key, {str(role): part for role, part in groups[name].parts.items()}, scaling)
        for target in whole.parted(around):
            canonical = name if target is whole else target.module
            if canonical in targets:
                raise DataError(f"model {model.name} changes {canonical} twice, under two of its names")
            targets[canonical] = target
    if not targets:
        names = ", ".join(tensor.name for tensor in tensors[:3])
        raise UsageError(f"model {model.name} holds no LoRA factors, only tensors such as {names or '(none)'}")
    factors = [tensor for target in targets.values() for tensor in (target.down, target.up)]
    return AdapterFile(
        name=model.name,
        targets={name: targets[name] for name in sorted(targets)},
        unmatched=tuple(unmatched),
        dtype=max((tensor.dtype for tensor in factors), key=FLOATS.index),
        base=declared_base(scaling, model),
        convention=Counter(group.key.convention for group in groups.values()).most_common(1)[0][0],
    )


@dataclass
class _Group:
    """The tensors of one module."""

    key: Key
    parts: dict[Role, LazyTensor]


def _refuse_other_kinds(name: str, tensors: list[LazyTensor]) -> None:
    for tensor in tensors:
        if method := foreign_method(tensor.name):
            raise UsageError(f"model {name} is not a plain LoRA: {tensor.name} belongs to a {method} adapter")


def _group(tensors: list[LazyTensor]) -> tuple[dict[str, _Group], list[str]]:
    groups: dict[str, _Group] = {}
    unmatched = []
    for tensor in tensors:
        key = parse_key(full_key(tensor))
        if key is None:
            unmatched.append(tensor.name)
            continue
        group = groups.setdefault(key.target, _Group(key, {}))
        if key.role in group.parts:
            raise DataError(f"tensor {tensor.name} and {group.parts[key.role].name} are both {key.target}'s {key.role}")
        group.parts[key.role] = tensor
    whole = {name: group for name, group in groups.items() if {Role.DOWN, Role.UP} <= group.parts.keys()}
    for name, group in groups.items():
        if name not in whole:
            unmatched += [tensor.name for tensor in group.parts.values()]
    return whole, unmatched


def full_key(tensor: LazyTensor) -> str:
    """The name in the file, after that of the component whose folder the file is in (PEFT writes a folder each)."""
    component = tensor.name.removesuffix(tensor.key).replace("/", ".")
    known = any(prefix.prefix == component for prefix in adapter_names().prefixes)
    return component + tensor.key if known else tensor.key


def target_of(key: Key, parts: Mapping[str, LazyTensor], scaling: Scaling) -> Target:
    """The LoRA of one module from its parts: down, up, and if there are mid and alpha.

    Raises:
        DataError: they are not the factors of one update, or have rank 0.
    """
    down, up, mid = parts[Role.DOWN], parts[Role.UP], parts.get("mid")
    for tensor in (down, up, *((mid,) if mid else ())):
        check_factor(tensor)
    rank, out = down.shape[0], up.shape[0]
    kernel = tuple(mid.shape[2:] if mid else down.shape[2:])
    inner = mid.shape[0] if mid else rank
    outside = (*up.shape[2:], *(down.shape[2:] if mid else ()))
    fits = up.shape[1] == inner and (mid is None or mid.shape[1] == rank) and all(size == 1 for size in outside)
    if len(down.shape) != len(up.shape) or not fits:
        shown = " and ".join(f"{tensor.name} {tensor.shape}" for tensor in (down, up, *((mid,) if mid else ())))
        raise DataError(f"tensors {shown} are not the factors of one update")
    alpha = read_alpha(parts[Role.ALPHA]) if Role.ALPHA in parts else None
    return Target(
        module=key.module,
        component=key.component,
        restored=key.restored,
        rank=inner,
        kernel=kernel,
        shape=(out, down.shape[1] * prod(kernel)),
        scale=scaling.scale(key.component, key.module, rank, alpha),
        down=down,
        up=up,
        mid=mid,
    )


def check_factor(tensor: LazyTensor) -> None:
    """Raise DataError unless the tensor can be a factor by dtype and shape."""
    if tensor.dtype not in FLOATS:
        raise DataError(
            f"tensor {tensor.name} is {tensor.dtype}; a LoRA's factors are {', '.join(FLOATS)}: "
            "convert it to one of these"
        )
    if not 2 <= len(tensor.shape) <= 5:
        raise DataError(f"tensor {tensor.name} has shape {tensor.shape}; a LoRA's factor has two to five dimensions")
    if 0 in tensor.shape:
        raise DataError(f"tensor {tensor.name} has shape {tensor.shape}: rank or width is 0")


def read_alpha(tensor: LazyTensor) -> float:
    """The number in the tensor `alpha` beside a module's factors.

    Raises:
        DataError: it is no finite number, or several.
    """
    if prod(tensor.shape) != 1:
        raise DataError(f"tensor {tensor.name} has shape {tensor.shape}; an alpha is one number")
    value = float(tensor.read())
    if not abs(value) < float("inf"):
        raise DataError(f"tensor {tensor.name} is {value}; an alpha is a finite number")
    return value


def read_finite(tensor: LazyTensor, scale: float = 1.0) -> Tensor:
    """The values times `scale`, float32.

    Raises:
        DataError: they are NaN or infinite, before or after that.
    """
    values = check_finite(tensor.read().float(), f"tensor {tensor.name}")
    if scale == 1.0:
        return values
    scaled = values * scale
    if not all_finite(scaled):
        raise DataError(
            f"tensor {tensor.name} is infinite when it is multiplied with its scale alpha / rank, {scale:g}"
        )
    return scaled


def check_finite(values: Tensor, what: str) -> Tensor:
    """The same values.

    Raises:
        DataError: one is NaN or infinite.
    """
    if not all_finite(values):
        raise DataError(f"{what} holds NaN or infinite values")
    return values


def declared_base(scaling: Scaling, model: InputModel) -> str | None:
    """The base that the configuration or the metadata name, unchecked."""
    named = (config.base_model_name_or_path for config in scaling.configs.values())
    metadata = model.metadata()
    return next((name for name in named if name), None) or metadata.get("ss_sd_model_name")
