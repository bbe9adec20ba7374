"""Read our packed format as the original's copy: its values in float32, and how far they are from the original."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isclose
from pathlib import Path

from torch import Tensor

from modelgrove_analyzers.heritage.rounding import GridFit, measure_grid
from modelgrove_hub.formats.quantized import PackedTensor, manifest_of
from modelgrove_hub.store.tensors import StoredTensor, tensors_of
from modelgrove_kernels.layouts import layout_of, restore
from modelgrove_kernels.packing import unfold

_ROUNDED = 0.999
"""Share of values within half a step when a tensor was rounded to nearest."""
_SAME_ERROR = 1e-4


@dataclass(frozen=True)
class PackedSource:
    """One quantized tensor in a packed file."""

    name: str
    entry: PackedTensor
    parts: Mapping[str, StoredTensor]
    """Suffix → stored part."""

    def read(self) -> Tensor:
        """The values that the codes stand for, float32, in the original's shape."""
        return unfold(self._matrix(), self.entry.shape, self.entry.axes)

    def fit(self, original: Tensor) -> GridFit:
        """How far `original`, of the original's shape, lies from this tensor.

        Rounding to nearest leaves every value within half a step. Calibrated methods do not, but they
        state their error: only the very tensor that was packed has just this distance.
        """
        exact, mine = original.float().permute(self.entry.axes).reshape(self.entry.matrix), self._matrix()
        turned = self.entry.rotation is not None or self.entry.smooth or self.entry.rank
        if self.entry.layout in ("int8", "int4") and not turned:
            scales = self.parts["scales"].read().float().reshape(-1, 1)
            fit = measure_grid(exact, mine, self.entry.group, scales, "F32")
            if fit.within >= _ROUNDED:
                return fit
        norm = float(exact.norm())
        error = float((mine - exact).norm()) / norm if norm else 0.0
        same = isclose(error, self.entry.error, rel_tol=_SAME_ERROR, abs_tol=1e-6)
        return GridFit(self.entry.group, 2**self.entry.bits, float(same), error)

    def _matrix(self) -> Tensor:
        return restore(layout_of(self.entry), {suffix: part.read() for suffix, part in self.parts.items()})


def packed_sources(file: Path) -> dict[str, PackedSource]:
    """The quantized tensors of a file by original name; none if it is not packed."""
    manifest = manifest_of(file)
    if manifest is None:
        return {}
    stored = {tensor.name: tensor for tensor in tensors_of(file)}
    return {
        name: PackedSource(name, entry, {suffix: stored[f"{name}.{suffix}"] for suffix in entry.parts()})
        for name, entry in manifest.tensors.items()
    }


def unpacked(file: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a packed file under their original names; quantized ones in float32, others as stored."""
    sources = packed_sources(file)
    parts = {part.name for source in sources.values() for part in source.parts.values()}
    for name, source in sources.items():
        yield name, source.read()
    for tensor in tensors_of(file):
        if tensor.name not in parts:
            yield tensor.name, tensor.read()
