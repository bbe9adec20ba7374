"""Line up the modules of several LoRAs, whatever naming each file uses, and refuse what does not belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelgrove_hub.contracts import InputModel
from modelgrove_hub.errors import UsageError
from modelgrove_hub.formats.adapter_keys import flat
from modelgrove_hub.formats.adapters import AdapterFile, Target, open_adapter

_SHOWN = 20


@dataclass(frozen=True)
class Site:
    """One module of the base, and what the adapters do there: adapter's place → its target."""

    module: str
    component: str
    kernel: tuple[int, ...]
    targets: Mapping[int, Target]


@dataclass(frozen=True)
class Alignment:
    """Adapters that fit together. `sites` are in order of their canonical names."""

    files: tuple[AdapterFile, ...]
    sites: tuple[Site, ...]
    warnings: tuple[str, ...]

    def coverage(self) -> list[dict[str, Any]]:
        """How much of every adapter was understood, and how many of its modules another one changes too."""
        rows = []
        for place, file in enumerate(self.files):
            mine = [site for site in self.sites if place in site.targets]
            rows.append(
                {
                    "adapter": file.name,
                    "modules": len(file.targets),
                    "shared": sum(len(site.targets) > 1 for site in mine),
                    "unmatched": len(file.unmatched),
                    "unmatched_names": list(file.unmatched[:_SHOWN]),
                }
            )
        return rows


def align(models: Sequence[InputModel]) -> Alignment:
    """Match the modules of LoRAs by name, with underscores for dots.

    Raises:
        UsageError: they are for different bases, one is no plain LoRA, or a kohya name has unknown words.
        DataError: a file is broken.
    """
    families = {model.family: model.name for model in models if model.family not in ("", "unknown")}
    if len(families) > 1:
        shown = " and ".join(f"{name} ({family})" for family, name in families.items())
        raise UsageError(f"adapters of different families cannot be merged: {shown}")
    files = tuple(open_adapter(model) for model in models)
    groups: dict[str, dict[int, Target]] = {}
    for place, file in enumerate(files):
        for name, target in file.targets.items():
            groups.setdefault(flat(name), {})[place] = target
    sites = sorted(
        (_site(targets, files) for targets in groups.values()), key=lambda site: (site.component, site.module)
    )
    return Alignment(files, tuple(sites), tuple(_warnings(files, sites)))


def _site(targets: Mapping[int, Target], files: Sequence[AdapterFile]) -> Site:
    place, first = next(iter(targets.items()))
    for other_place, other in targets.items():
        if other.shape != first.shape or _spatial(other.kernel) != _spatial(first.kernel):
            raise UsageError(
                f"module {first.module} is {_described(first)} in {files[place].name} but {_described(other)} in "
                f"{files[other_place].name}: the adapters are for different bases"
            )
    named = next((target for target in targets.values() if target.restored), None)
    if named is None:
        raise UsageError(
            f"module {first.module} of {files[place].name}: the dots of this kohya name are not known, "
            "so the result could not be written in diffusers' naming"
        )
    components = sorted({target.component for target in targets.values()} - {""})
    if len(components) > 1:
        raise UsageError(f"module {named.module} is in different components: {' and '.join(components)}")
    kernel = max((target.kernel for target in targets.values()), key=len)
    return Site(named.module, components[0] if components else "", kernel, targets)


def _spatial(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """A kernel of ones is a linear layer: some converters write the one, some the other."""
    return () if all(size == 1 for size in kernel) else kernel


def _described(target: Target) -> str:
    out, width = target.shape
    return f"{out}×{width}" + (f" with kernel {'×'.join(map(str, target.kernel))}" if target.kernel else "")


def _warnings(files: Sequence[AdapterFile], sites: Sequence[Site]) -> list[str]:
    warnings = [
        f"{file.name}: {len(file.unmatched)} tensors belong to no LoRA factors and are left out"
        for file in files
        if file.unmatched
    ]
    bases = {file.base: file.name for file in files if file.base}
    if len(bases) > 1:
        shown = ", ".join(f"{name}: {base}" for base, name in bases.items())
        warnings.append(f"the adapters name different bases: {shown}")
    if len(files) > 1 and not any(len(site.targets) > 1 for site in sites):
        warnings.append("the adapters change no module in common")
    return warnings
