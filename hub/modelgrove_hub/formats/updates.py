"""What an adapter adds to each parameter of its base: exact factors or a matrix, whatever method and naming.

LoRA and LoCon (with a Tucker core too), AdaLoRA, LoHa, LoKr, whole and sparse differences say it by themselves. DoRA,
GLoRA, (IA)³, OFT and BOFT change the weights that are there, so what they add is known once the base's weight is given.
Methods whose effect is no change of weights, because it depends on the timestep or on where a token comes from, are
refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Protocol

from modelgrove_hub.contracts import InputModel, LazyTensor
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.adapter_keys import Key, key_of
from modelgrove_hub.formats.adapter_scale import CONFIG, Scaling, read_scaling
from modelgrove_hub.formats.adapters import (
    FLOATS,
    AdapterFile,
    Factors,
    Target,
    check_factor,
    declared_base,
    full_key,
    target_of,
)
from modelgrove_hub.formats.lycoris import (
    Change,
    read_glora,
    read_hadamard,
    read_ia3,
    read_kronecker,
    read_magnitude,
)
from modelgrove_hub.formats.naming import AdapterKind, adapter_names
from modelgrove_hub.formats.native_names import Surroundings
from modelgrove_hub.formats.parting import parted
from modelgrove_hub.formats.patterns import any_of
from modelgrove_hub.formats.rotations import read_butterfly, read_rotation
from modelgrove_hub.formats.sara import SparseManifest, read_manifest, read_sparse

if TYPE_CHECKING:
    from torch import Tensor

_MARK, _DIAGONAL = "dora", "adalora"
_COMPANY = "diff"
_SPARSE = "sara"
_WHOLE = {".diff": "weight", ".diff_b": "bias", ".w_norm": "weight", ".b_norm": "bias"}
"""Differences of a whole parameter."""
_VALUE, _BIASES = ".set_weight", (".lora_B.bias", ".lora_B.default.bias")


class Update(Protocol):
    """What an adapter does to one parameter: known from the header, read when asked."""

    @property
    def module(self) -> str:
        """The canonical path, relative to the component."""

    @property
    def component(self) -> str:
        """As in `Key`; "" if the file leaves it open."""

    @property
    def parameter(self) -> str:
        """ "weight" or "bias"."""

    @property
    def restored(self) -> bool:
        """False if the name is still kohya's flat one."""

    @property
    def kernel(self) -> tuple[int, ...]:
        """The shape of a convolution's kernel; () for all else."""

    @property
    def shape(self) -> tuple[int, int] | None:
        """(out, in·kernel); (1, n) of a vector; None where the file does not tell it."""

    @property
    def method(self) -> str:
        """lora, adalora, loha, lokr, diff, dora, glora, ia3, oft, boft, sara."""

    @property
    def needs_weight(self) -> bool:
        """Whether what it adds depends on the base's weight."""

    def read(self, weight: Tensor | None = None) -> Factors | Tensor:
        """Factors or a matrix of `shape`, float32, with the scale in it.

        `weight` is the base's, (out, in·kernel), which is needed where `needs_weight` says so.

        Raises:
            DataError: a value is not finite, or the weight does not fit.
        """


@dataclass
class _Group:
    """The tensors of one module by suffix."""

    key: Key
    parts: dict[str, LazyTensor] = field(default_factory=dict)

    def named(self, kind: AdapterKind) -> dict[str, LazyTensor]:
        """The tensors of one method by their part in its formula."""
        found: dict[str, LazyTensor] = {}
        for suffix, part in {**kind.extra, **kind.core}.items():
            if suffix in self.parts:
                if part in found:
                    raise DataError(f"tensors {found[part].name} and {self.parts[suffix].name} are the same part")
                found[part] = self.parts[suffix]
        return found


def open_updates(model: InputModel) -> AdapterFile[Update]:
    """Understand an adapter's tensors by name and shape; only alphas and flags are read.

    `targets` are keyed by canonical name, with ".bias" behind it for a bias. What belongs to no update is `unmatched`.

    Raises:
        UsageError: a method is not understood or cannot be a change of weights; it is named.
        DataError: parts do not fit together, say a module twice, or have rank 0.
    """
    tensors = list(model.tensors())
    groups, unmatched = _grouped(model.name, tensors)
    metadata = model.metadata()
    scaling = read_scaling(model.files(), metadata, model.name)
    sparse = read_manifest(metadata, f"model {model.name}")
    around = Surroundings.of(group.key.module for group in groups.values())
    targets: dict[str, Update] = {}
    for group in groups.values():
        used: set[str] = set()
        found = list(_updates(model.name, group, scaling, sparse, used))
        widths = [update.shape[1] for update in found if update.parameter == "weight" and update.shape is not None]
        beside = replace(around, width=widths[0] if widths else None)
        for update in found:
            suffix = "" if update.parameter == "weight" else f".{update.parameter}"
            for part in parted(update, beside):
                name = (group.key.target if part is update else part.module) + suffix
                if name in targets:
                    raise DataError(
                        f"model {model.name} changes {name} twice, under two of its names or by two tensors"
                    )
                targets[name] = part
        unmatched += [tensor.name for suffix, tensor in group.parts.items() if suffix not in used]
    if not targets:
        names = ", ".join(tensor.name for tensor in tensors[:3])
        raise UsageError(f"model {model.name} holds no adapter, only tensors such as {names or '(none)'}")
    _refuse_brought(model.name, unmatched)
    ours = [tensor for group in groups.values() for tensor in group.parts.values() if tensor.dtype in FLOATS]
    conventions = [group.key.convention for group in groups.values()]
    return AdapterFile(
        name=model.name,
        targets={name: targets[name] for name in sorted(targets)},
        unmatched=tuple(unmatched),
        dtype=max((tensor.dtype for tensor in ours if len(tensor.shape) > 1), key=FLOATS.index, default="F32"),
        base=declared_base(scaling, model),
        convention=max(set(conventions), key=conventions.count),
    )


def read_updates(model: InputModel) -> Iterator[tuple[str, Factors | Tensor]]:
    """Each weight's update by canonical name, one in memory at a time: factors, or a matrix (out, in·kernel), float32.

    Raises:
        UsageError: it is no adapter whose file alone says what it adds.
        DataError: parts do not fit together, hold values that are not finite, have rank 0, or say a module twice.
    """
    for name, update in open_updates(model).targets.items():
        if update.needs_weight:
            raise UsageError(
                f"model {model.name} is a {update.method} adapter, as {name} says: what it adds depends on the base's "
                "weights. Export its weight differences (.diff)"
            )
        if update.parameter == "weight":
            yield name, update.read()


def _grouped(name: str, tensors: Sequence[LazyTensor]) -> tuple[dict[str, _Group], list[str]]:
    groups: dict[str, _Group] = {}
    unmatched = []
    for tensor in tensors:
        key_name = full_key(tensor)
        _refuse_special(name, tensor.name)
        path, suffix = adapter_names().split(key_name) or ("", "")
        if not path or suffix not in _suffixes():
            unmatched.append(tensor.name)
            continue
        key = key_of(path, suffix)
        group = groups.setdefault(key.target, _Group(key))
        if suffix in group.parts:
            raise DataError(f"tensors {tensor.name} and {group.parts[suffix].name} are both {key.target}'s {suffix}")
        group.parts[suffix] = tensor
    return groups, unmatched


def _refuse_special(model: str, tensor: str) -> None:
    if marked := adapter_names().marked(tensor):
        raise UsageError(
            f"model {model}: {tensor} belongs to a {marked[1]} adapter, which is not understood: merge it into its "
            "base with the tool that wrote it"
        )
    for special in adapter_names().special:
        if any_of((special.pattern,)).fullmatch(tensor):
            raise UsageError(f"model {model}: {tensor} belongs to a {special.adapter_type} adapter: {special.reason}")


def _refuse_brought(model: str, unmatched: Sequence[str]) -> None:
    """What is no part of a LoRA may say that the file as a whole is something else."""
    for brought in adapter_names().brought:
        proof = next((name for name in unmatched if brought.fits(name)), None)
        if proof is not None:
            raise UsageError(f"model {model}: {proof} belongs to a {brought.adapter_type}: {brought.reason}")


@cache
def _suffixes() -> frozenset[str]:
    """Suffixes of methods, without the embeddings' factors, which are no change of a matrix product."""
    kinds = adapter_names().kinds
    return frozenset(s for kind in kinds for s in (*kind.core, *kind.extra) if "lora_embedding" not in s)


def _updates(
    model: str, group: _Group, scaling: Scaling, sparse: SparseManifest | None, used: set[str]
) -> Iterator[Update]:
    """The updates of one module's parameters; `used` gets the suffixes that they take into account."""
    kinds = [kind for kind in adapter_names().kinds if any(suffix in kind.core for suffix in group.parts)]
    methods = [kind for kind in kinds if kind.name not in (_MARK, _DIAGONAL, _COMPANY)]
    whole = [suffix for suffix in (".diff", _VALUE, ".w_norm") if suffix in group.parts]
    if len(methods) + len(whole) > 1:
        names = [kind.name for kind in methods] + whole
        raise DataError(f"model {model} changes {group.key.target} by {' and '.join(names)}: which one counts?")
    for kind in methods:
        if kind.name == _SPARSE:
            used |= {*kind.core, *kind.extra}
            yield from read_sparse(group.key, group.parts, sparse)
            continue
        if _emptied(group):
            used.update(group.parts)
            continue
        update = _READERS[kind.name](group.key, group.named(kind), scaling)
        if update is None:
            continue
        apart = ("bias", "scale") if kind.name == "lora" else ()
        used |= {suffix for suffix, part in {**kind.extra, **kind.core}.items() if part not in apart}
        if isinstance(update, Target):
            update = _with_diagonal(model, update, group, scaling, used)
            yield from _biases(group, update.scale, used)
        if marks := [suffix for suffix in group.parts if suffix in _kind(_MARK).core]:
            update = read_magnitude(update, group.parts[marks[0]])
            used.update(marks[:1])
        yield update
    yield from _differences(group, used)


def _emptied(group: _Group) -> bool:
    """Whether AdaLoRA has cut all directions of the module, which then stays as it is."""
    diagonal = group.named(_kind(_DIAGONAL)).get("diagonal")
    return diagonal is not None and diagonal.shape[:1] == (0,)


def _with_diagonal(model: str, update: Target, group: _Group, scaling: Scaling, used: set[str]) -> Target:
    """An AdaLoRA's product is up · diag(E) · down (Zhang et al., arXiv 2303.10512, equation 3)."""
    kind = _kind(_DIAGONAL)
    diagonal = group.named(kind).get("diagonal")
    if diagonal is None:
        return update
    scale = scaling.adaptive(update.component)
    if scale is None:
        raise UsageError(
            f"model {model}: {diagonal.name} belongs to an AdaLoRA, and only its {CONFIG} says at what scale: "
            "put it beside the file"
        )
    check_factor(diagonal)
    if diagonal.shape != (update.rank, 1):
        raise DataError(f"tensor {diagonal.name} {diagonal.shape} is no diagonal of rank {update.rank}")
    used |= {*kind.core, *kind.extra}
    return replace(update, diagonal=diagonal, scale=scale, method=_DIAGONAL)


def _biases(group: _Group, scale: float, used: set[str]) -> Iterator[Update]:
    """A LoRA's own bias, which its factors' scale acts on (PEFT's lora_bias)."""
    for suffix in _BIASES:
        if suffix in group.parts:
            used.add(suffix)
            yield Change.vector(group.key, "bias", "lora", group.parts[suffix], scale)


def _differences(group: _Group, used: set[str]) -> Iterator[Update]:
    for suffix, parameter in _WHOLE.items():
        if suffix in group.parts:
            used.add(suffix)
            tensor = group.parts[suffix]
            if len(tensor.shape) < 2:
                yield Change.vector(group.key, parameter, _COMPANY, tensor)
            else:
                yield Change.difference(group.key, parameter, tensor)
    if _VALUE in group.parts:
        used.add(_VALUE)
        yield Change.value(group.key, group.parts[_VALUE])


def _lora(key: Key, parts: Mapping[str, LazyTensor], scaling: Scaling) -> Update | None:
    return target_of(key, parts, scaling) if {"down", "up"} <= parts.keys() else None


_READERS: Mapping[str, Callable[[Key, Mapping[str, LazyTensor], Scaling], Update | None]] = {
    "lora": _lora,
    "loha": read_hadamard,
    "lokr": read_kronecker,
    "glora": read_glora,
    "oft": read_rotation,
    "boft": read_butterfly,
    "ia3": read_ia3,
}


def _kind(name: str) -> AdapterKind:
    return next(kind for kind in adapter_names().kinds if kind.name == name)
