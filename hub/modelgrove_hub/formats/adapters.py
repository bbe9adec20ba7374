"""Read and write LoRAs: any of the usual files → exact factors per module, and back in diffusers' convention.

Only the product of the factors means anything, so alpha and rank are folded into it once, by the
rule of the trainer that wrote the file, and never travel further.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from modelgrove_hub.contracts import InputModel, LazyTensor, TensorWriter
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.adapter_keys import NATIVE, Key, Role, foreign_method, native_root, parse_key
from modelgrove_hub.formats.adapter_scale import METADATA, Scaling, read_scaling
from modelgrove_hub.formats.naming import adapter_names

if TYPE_CHECKING:
    from torch import Tensor, dtype

WEIGHTS = "pytorch_lora_weights.safetensors"
"""What diffusers calls a LoRA's file."""

FLOATS = ("F16", "BF16", "F32", "F64")
_UNET_ROOTS = ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding")
_TRANSFORMER_ROOTS = ("transformer_blocks", "single_transformer_blocks", "x_embedder", "context_embedder", "norm_out")


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

    def read(self) -> Factors:
        """The factors, with the scale folded into `up`.

        Raises:
            DataError: a factor holds NaN or infinite values, or the scale makes it infinite.
        """
        down = read_finite(self.down).reshape(self.rank, self.shape[1])
        up = read_finite(self.up, self.scale).reshape(self.shape[0], self.rank)
        return Factors(self.module, self.component, self.kernel, down, up, self.restored)


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA whose header was understood. `targets` are keyed and sorted by canonical module name."""

    name: str
    targets: Mapping[str, Target]
    unmatched: tuple[str, ...]
    """Tensors that belong to no pair of factors: nothing here takes them into account."""
    dtype: str
    """The widest dtype of the factors, as safetensors writes it."""
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


def open_adapter(model: InputModel) -> AdapterFile:
    """Understand a LoRA's tensors by name and shape; only the alphas are read.

    Raises:
        UsageError: it is another kind of adapter, which is named, or no adapter at all.
        DataError: factors do not fit together, have rank 0, or a configuration is broken.
    """
    tensors = list(model.tensors())
    _refuse_other_kinds(model.name, tensors)
    return open_tensors(model, tensors)


def open_tensors(model: InputModel, tensors: list[LazyTensor]) -> AdapterFile:
    """As `open_adapter`, of some of the model's tensors alone, which are known to be those of a LoRA."""
    groups, unmatched = _group(tensors)
    scaling = read_scaling(model.files(), model.metadata(), model.name)
    targets = {name: _target(groups[name], scaling) for name in sorted(groups)}
    if not targets:
        names = ", ".join(tensor.name for tensor in tensors[:3])
        raise UsageError(f"model {model.name} holds no LoRA factors, only tensors such as {names or '(none)'}")
    factors = [tensor for target in targets.values() for tensor in (target.down, target.up)]
    return AdapterFile(
        name=model.name,
        targets=targets,
        unmatched=tuple(unmatched),
        dtype=max((tensor.dtype for tensor in factors), key=FLOATS.index),
        base=_declared_base(scaling, model),
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


def _target(group: _Group, scaling: Scaling) -> Target:
    key, down, up = group.key, group.parts[Role.DOWN], group.parts[Role.UP]
    for tensor in (down, up):
        check_factor(tensor)
    rank, out = down.shape[0], up.shape[0]
    if len(down.shape) != len(up.shape) or up.shape[1] != rank or any(size != 1 for size in up.shape[2:]):
        raise DataError(f"tensors {down.name} {down.shape} and {up.name} {up.shape} are not the factors of one update")
    alpha = read_alpha(group.parts[Role.ALPHA]) if Role.ALPHA in group.parts else None
    return Target(
        module=key.module,
        component=key.component,
        restored=key.restored,
        rank=rank,
        kernel=tuple(down.shape[2:]),
        shape=(out, prod(down.shape[1:])),
        scale=scaling.scale(key.component, key.module, rank, alpha),
        down=down,
        up=up,
    )


def check_factor(tensor: LazyTensor) -> None:
    """Raise DataError unless the tensor can be a factor by dtype and shape."""
    if tensor.dtype not in FLOATS:
        raise DataError(f"tensor {tensor.name} is {tensor.dtype}; a LoRA's factors are {', '.join(FLOATS)}")
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
    import torch

    values = tensor.read().float()
    if not bool(torch.isfinite(values).all()):
        raise DataError(f"tensor {tensor.name} holds NaN or infinite values")
    scaled = values * scale
    if not bool(torch.isfinite(scaled).all()):
        raise DataError(
            f"tensor {tensor.name} is infinite when it is multiplied with its scale alpha / rank, {scale:g}"
        )
    return scaled


def _declared_base(scaling: Scaling, model: InputModel) -> str | None:
    named = (config.base_model_name_or_path for config in scaling.configs.values())
    metadata = model.metadata()
    return next((name for name in named if name), None) or metadata.get("ss_sd_model_name")


def write_adapter(adapter: Adapter, writer: TensorWriter, dtype: dtype | None = None) -> None:
    """Write all modules in diffusers' convention, as `dtype` or float32; give the file `adapter_metadata` too."""
    for factors in adapter.modules.values():
        write_factors(factors, writer, dtype)


def write_factors(factors: Factors, writer: TensorWriter, dtype: dtype | None = None) -> None:
    """Write one module's factors; the scale is in them, so the file says alpha = rank.

    Raises:
        UsageError: the module's name is still flat, so no loader would find the module.
    """
    if not factors.restored:
        raise UsageError(f"module {factors.module}: the dots of this kohya name are not known, so it cannot be written")
    down, up = tensor_names(factors.component, factors.module)
    width = factors.down.shape[1] // prod(factors.kernel)
    writer.add(down, factors.down.reshape(factors.rank, width, *factors.kernel).to(dtype or factors.down.dtype))
    writer.add(up, factors.up.reshape(*factors.up.shape, *(1 for _ in factors.kernel)).to(dtype or factors.up.dtype))


def tensor_names(component: str, module: str) -> tuple[str, str]:
    """Names of a module's down and up factor in diffusers' convention (in ComfyUI's, for native names)."""
    component = written_component(component, module)
    stem = f"{component}.{module}" if component else module
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def written_component(component: str, module: str) -> str:
    """The component's prefix in a file; where it is open, it follows from the module's name, or there is none."""
    root = module.split(".", 1)[0]
    if component:
        return component
    if native_root(module):
        return NATIVE
    if root == "text_model":
        return "text_encoder"
    return "unet" if root in _UNET_ROOTS else "transformer" if root in _TRANSFORMER_ROOTS else ""


def adapter_metadata(ranks: Mapping[tuple[str, str], int]) -> dict[str, str]:
    """The metadata that diffusers ≥ 0.34 reads: rank and alpha of every (component, module), truthfully.

    diffusers would misread the ranks of a native naming, whose prefix it renames, so such a file
    gets none: without it, loaders take alpha = rank, which is right.
    """
    grouped: dict[str, dict[str, int]] = {}
    for (component, module), rank in ranks.items():
        grouped.setdefault(written_component(component, module), {})[module] = rank
    metadata = {"format": "pt"}
    if not grouped.keys() & {NATIVE, ""}:
        fields = {
            f"{place}.{field}": value for place, group in grouped.items() for field, value in _fields(group).items()
        }
        metadata[METADATA] = json.dumps(fields, sort_keys=True)
    return metadata


def _fields(ranks: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's LoraConfig of one component, as far as it matters."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{module}": rank for module, rank in ranks.items() if rank != common}
    return {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "use_rslora": False,
        "use_dora": False,
    }
