"""Read our packed format as the original's copy: its values in float32, and how far they are from the original."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from modelgrove_analyzers.heritage.rounding import GridFit, measure_grid
from modelgrove_hub.formats.quantized import CODES, SCALES, ZEROS, PackedTensor, manifest_of
from modelgrove_hub.store.tensors import StoredTensor, tensors_of
from modelgrove_kernels.packing import Packed, dequantize, unfold


@dataclass(frozen=True)
class PackedSource:
    """One quantized tensor in a packed file."""

    name: str
    entry: PackedTensor
    parts: Mapping[str, StoredTensor]

    def read(self) -> Tensor:
        """The values that the codes stand for, float32, in the original's shape."""
        return unfold(self._matrix(), self.entry.shape, self.entry.axes)

    def fit(self, original: Tensor) -> GridFit:
        """How far `original`, of the original's shape, lies from this tensor's own grid."""
        matrix = original.float().permute(self.entry.axes).reshape(self.entry.matrix)
        scales = self.parts[self.name + SCALES].read().float().reshape(-1, 1)
        return measure_grid(matrix, self._matrix(), self.entry.group, scales, "F32")

    def _matrix(self) -> Tensor:
        codes, scales = (self.parts[self.name + part].read() for part in (CODES, SCALES))
        zeros = self.parts[self.name + ZEROS].read() if self.name + ZEROS in self.parts else None
        return dequantize(Packed(codes, scales, zeros, self.entry.matrix[1], self.entry.bits, self.entry.group))


def packed_sources(file: Path) -> dict[str, PackedSource]:
    """The quantized tensors of a file by original name; none if it is not packed."""
    manifest = manifest_of(file)
    if manifest is None:
        return {}
    stored = {tensor.name: tensor for tensor in tensors_of(file)}
    return {
        name: PackedSource(name, entry, {part: stored[part] for part in entry.parts(name)})
        for name, entry in manifest.tensors.items()
    }


def unpacked(file: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a packed file under their original names; quantized ones in float32, others as stored."""
    sources = packed_sources(file)
    parts = {part for source in sources.values() for part in source.parts}
    for name, source in sources.items():
        yield name, source.read()
    for tensor in tensors_of(file):
        if tensor.name not in parts:
            yield tensor.name, tensor.read()
