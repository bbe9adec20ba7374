"""Line up the modules of several adapters, whatever naming each file uses, and refuse what does not belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelgrove_hub.contracts import InputModel
from modelgrove_hub.errors import UsageError
from modelgrove_hub.formats.adapters import AdapterFile, Factors
from modelgrove_hub.formats.sara import SparseChange, check_base
from modelgrove_hub.formats.slots import Slot, slot_name, slots_of
from modelgrove_hub.formats.updates import Update, open_updates
from modelgrove_plugins.merge.origins import check_origins

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_kernels.lowrank import LowRank

_SHOWN = 20


@dataclass(frozen=True)
class Site:
    """One parameter of the base, and what the adapters do there: adapter's place → its update."""

    module: str
    component: str
    parameter: str
    kernel: tuple[int, ...]
    shape: tuple[int, int]
    targets: Mapping[int, Update]
    slot: Slot | None
    """Where it is in the base, if a base is known and has it."""

    @property
    def name(self) -> str:
        """The module, and the parameter if it is not the weight."""
        return self.module if self.parameter == "weight" else f"{self.module}.{self.parameter}"

    @property
    def sparse(self) -> dict[int, SparseChange] | None:
        """The updates if all of them change single weights, else None."""
        found = {place: target for place, target in self.targets.items() if isinstance(target, SparseChange)}
        return dict(sorted(found.items())) if len(found) == len(self.targets) else None

    def read(self) -> dict[int, LowRank | Tensor]:
        """Every adapter's update as factors or a matrix, float32.

        Raises:
            DataError: a tensor is not finite.
        """
        from modelgrove_kernels.lowrank import LowRank

        needed = self.slot is not None and any(target.needs_weight for target in self.targets.values())
        weight = self.slot.read() if self.slot is not None and needed else None
        found: dict[int, LowRank | Tensor] = {}
        for place in sorted(self.targets):
            target = self.targets[place]
            update = target.read(weight) if target.needs_weight else target.read()
            found[place] = LowRank(update.up, update.down) if isinstance(update, Factors) else update
        return found


@dataclass(frozen=True)
class Alignment:
    """Adapters that fit together. `sites` are in order of their canonical names."""

    files: tuple[AdapterFile[Update], ...]
    sites: tuple[Site, ...]
    warnings: tuple[str, ...]
    based: bool
    """Whether a base was given, whose modules are known."""

    def coverage(self) -> list[dict[str, Any]]:
        """How much of every adapter was understood and has its place, and how much another one changes too."""
        rows = []
        for place, file in enumerate(self.files):
            mine = [site for site in self.sites if place in site.targets]
            row: dict[str, Any] = {
                "adapter": file.name,
                "modules": len(file.targets),
                "shared": sum(len(site.targets) > 1 for site in mine),
                "unmatched": len(file.unmatched),
                "unmatched_names": list(file.unmatched[:_SHOWN]),
            }
            if self.based:
                homeless = [site.name for site in mine if site.slot is None]
                row |= {"in_base": len(mine) - len(homeless), "not_in_base": homeless[:_SHOWN]}
            rows.append(row)
        return rows


def align(models: Sequence[InputModel], base: InputModel | None = None) -> Alignment:
    """Match the modules of adapters by name, with underscores for dots, and with those of the base.

    Raises:
        UsageError: they are for different bases, or one cannot be merged: it is said which, and why.
        DataError: a file is broken.
    """
    families = {model.family: model.name for model in (*models, *_some(base)) if model.family not in ("", "unknown")}
    if len(families) > 1:
        shown = " and ".join(f"{name} ({family})" for family, name in families.items())
        raise UsageError(f"models of different families cannot be merged: {shown}")
    files = tuple(open_updates(model) for model in models)
    wanting = [model for model, file in zip(models, files, strict=True) if _needs_weight(file)]
    known = base or next((model.base for model in wanting if model.base), None)
    if wanting and known is None:
        kind = next(target.method for file in files for target in file.targets.values() if target.needs_weight)
        raise UsageError(
            f"model {wanting[0].name}: what a {kind} adapter adds depends on the base's weights: "
            "register its base, or give it with --base"
        )
    if base is not None:
        for file in files:
            check_base(file, base)
    slots = slots_of(known) if known else {}
    groups: dict[str, dict[int, Update]] = {}
    for place, file in enumerate(files):
        for name, target in file.targets.items():
            groups.setdefault(slot_name(name), {})[place] = target
    origins = check_origins(models, base, groups)
    sites = sorted(
        (_site(targets, files, slots.get(name), known) for name, targets in groups.items()),
        key=lambda site: (site.component, site.name),
    )
    warnings = [*origins, *_warnings(files, sites, based=known is not None)]
    return Alignment(files, tuple(sites), tuple(warnings), known is not None)


def _some(model: InputModel | None) -> tuple[InputModel, ...]:
    return () if model is None else (model,)


def _needs_weight(file: AdapterFile[Update]) -> bool:
    return any(target.needs_weight for target in file.targets.values())


def _site(
    targets: Mapping[int, Update], files: Sequence[AdapterFile[Update]], slot: Slot | None, base: InputModel | None
) -> Site:
    # An adapter that scales or rotates weights does not say how many there are.
    sized = {place: target for place, target in targets.items() if target.shape is not None}
    place, first = next(iter((sized or targets).items()))
    for other_place, other in sized.items():
        if other.shape != first.shape or _spatial(other.kernel) != _spatial(first.kernel):
            raise UsageError(
                f"module {first.module} is {_described(first)} in {files[place].name} but {_described(other)} in "
                f"{files[other_place].name}: the adapters are for different bases"
            )
    if slot is not None and base is not None and first.shape not in (None, slot.shape):
        raise UsageError(
            f"module {first.module} is {_described(first)} in {files[place].name} but {_sides(slot.shape)} "
            f"in {base.name}: it is for another base"
        )
    wanting = next((target for target in targets.values() if target.needs_weight), None)
    if wanting is not None and slot is None and base is not None:
        raise UsageError(
            f"module {wanting.module} of a {wanting.method} adapter is not in {base.name}: what it adds depends on the "
            "weights, so it fits a base that names its modules alike"
        )
    named = next((target for target in targets.values() if target.restored), None)
    if named is None:
        raise UsageError(
            f"module {first.module} of {files[place].name}: the dots of this kohya name are not known, "
            "so the result could not be written"
        )
    components = sorted({target.component for target in targets.values()} - {""})
    if len(components) > 1:
        raise UsageError(f"module {named.module} is in different components: {' and '.join(components)}")
    kernel = max((target.kernel for target in targets.values()), key=len)
    component = components[0] if components else ""
    # What says no shape needs the weight, and so has a slot.
    shape = slot.shape if slot is not None else first.shape or (0, 0)
    return Site(named.module, component, named.parameter, kernel, shape, targets, slot)


def _spatial(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """A kernel of ones is a linear layer: some converters write the one, some the other."""
    return () if all(size == 1 for size in kernel) else kernel


def _sides(shape: tuple[int, int] | None) -> str:
    return "×".join(map(str, shape or ()))


def _described(target: Update) -> str:
    return _sides(target.shape) + (f" with kernel {'×'.join(map(str, target.kernel))}" if target.kernel else "")


def _warnings(files: Sequence[AdapterFile[Update]], sites: Sequence[Site], *, based: bool) -> list[str]:
    warnings = [
        f"{file.name}: {len(file.unmatched)} tensors belong to no update that is understood and are left out"
        for file in files
        if file.unmatched
    ]
    homeless = sum(site.slot is None for site in sites) if based else 0
    if homeless:
        first = next(site.name for site in sites if site.slot is None)
        warnings.append(f"{homeless} of {len(sites)} modules are not in the base, such as {first}")
    bases = {file.base: file.name for file in files if file.base}
    if len(bases) > 1:
        shown = ", ".join(f"{name}: {base}" for base, name in bases.items())
        warnings.append(f"the adapters name different bases: {shown}")
    if len(files) > 1 and not any(len(site.targets) > 1 for site in sites):
        warnings.append("the adapters change no module in common")
    return warnings
