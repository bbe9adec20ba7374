"""Whether an adapter reads the columns of a shared basis that it declares, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelgrove_hub.contracts import InputModel
from modelgrove_hub.errors import DataError
from modelgrove_hub.formats.adapters import AdapterFile, Target, open_adapter
from modelgrove_hub.formats.shared_basis import BasisColumns, columns_from

TOLERANCE: Mapping[str, float] = {"F16": 2e-3, "BF16": 2e-3}
"""Relative distance by the dtype of a down factor: rounding is at most 2⁻¹¹ of float16 and 2⁻⁹ of bfloat16."""
EXACT = 1e-3
"""Of wider dtypes."""
_NEAR = 0.05
"""A factor of which more is outside of the basis's best columns was not trained in them."""


@dataclass(frozen=True)
class Checked:
    """What was found. `layers` are those that do not keep to the columns, with their distances."""

    columns: BasisColumns | None
    """As declared, or as found where nothing is declared."""
    declared: bool
    modules: int = 0
    rotated: int = 0
    """Layers that read the right columns, in rows that are mixtures of them."""
    layers: Sequence[Mapping[str, Any]] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        """Whether there are columns, and every layer reads nothing else."""
        return self.columns is not None and not self.layers


def check(model: InputModel, known: BasisColumns | None) -> Checked:
    """Compare an adapter's down factors with the columns that its metadata declare.

    If they declare none, its narrowest layer is looked for in `known`, all columns of a basis.

    Raises:
        UsageError: it is no plain LoRA.
        DataError: what it declares is broken, or a factor is not finite.
    """
    file = open_adapter(model)
    declared = columns_from(model.metadata(), f"model {model.name}")
    columns = declared or (_find(file, known) if known else None)
    if columns is None:
        return Checked(None, declared=False, modules=len(file.targets))
    rotated, layers = 0, []
    for name, target in file.targets.items():
        found = _layer(name, target, columns)
        if found is None:
            continue
        if found.pop("rotated"):
            rotated += 1
        else:
            layers.append(found)
    return Checked(columns, declared is not None, len(file.targets), rotated, layers)


def _layer(name: str, target: Target, columns: BasisColumns) -> dict[str, Any] | None:
    """None if the layer's rows are the columns, scaled; else what they are."""
    from modelgrove_kernels.shared_basis import MAX_ELEMENTS, fit
    from modelgrove_kernels.shared_basis import columns as columns_of

    width = target.shape[1]
    if width < columns.stop:
        return {"layer": name, "width": width, "rotated": False, "distance": 1.0}
    if width * columns.stop > MAX_ELEMENTS:
        raise DataError(f"{name} has {width} inputs: {columns.stop} columns of that width are too many to look at")
    found = fit(target.read().down, columns_of(width, columns.seed, columns.start, columns.rank))
    tolerance = TOLERANCE.get(target.down.dtype, EXACT)
    if found.rows <= tolerance:
        return None
    return {"layer": name, "width": width, "rotated": found.span <= tolerance, "distance": round(found.span, 6)}


def _find(file: AdapterFile[Target], whole: BasisColumns) -> BasisColumns | None:
    """The range that the narrowest layer reads, if it reads little else."""
    from modelgrove_kernels.shared_basis import basis, find_columns

    wide = [target for target in file.targets.values() if target.shape[1] >= whole.stop]
    if not wide:
        return None
    target = min(wide, key=lambda one: one.shape[1])
    tolerance = TOLERANCE.get(target.down.dtype, EXACT)
    found = find_columns(target.read().down, basis(target.shape[1], whole.seed, whole.stop), tolerance)
    if not found.columns or found.outside > _NEAR:
        return None
    first, last = found.columns[0], found.columns[-1]
    return BasisColumns(whole.base, whole.seed, first, last - first + 1)
