"""The layers of a network as a shared basis sees them: by input width."""

from __future__ import annotations

from math import prod
from pathlib import Path

from modelgrove_hub.contracts import InputModel
from modelgrove_hub.errors import DataError, StorageError
from modelgrove_hub.formats.shared_basis import MAX_COLUMNS, BasisColumns
from modelgrove_hub.store.disk import create_temporary, publish

_ATTENTION = ("attn", "attention")


def narrowest(base: InputModel) -> int:
    """Inputs of the narrowest attention layer, or of the narrowest linear layer where there is no attention.

    Raises:
        DataError: the network has no linear layer.
    """
    linear = {t.name: t.shape[1] for t in base.tensors() if len(t.shape) == 2 and t.name.endswith(".weight")}
    attention = [width for name, width in linear.items() if any(word in name for word in _ATTENTION)]
    if not linear:
        raise DataError(f"model {base.name} has no linear layers: say the width")
    return min(min(attention or linear.values()), MAX_COLUMNS)


def write_columns(base: InputModel, columns: BasisColumns, path: Path) -> list[int]:
    """Write `width.N` (rank, N), a frozen down factor, for every input width N of the base; returns the widths.

    Of a convolution it is in·kernel. Layers that are narrower than the columns reach are left out.

    Raises:
        DataError: no layer is wide enough.
        StorageError: the file cannot be written.
    """
    from safetensors.torch import save

    from modelgrove_kernels.shared_basis import MAX_ELEMENTS
    from modelgrove_kernels.shared_basis import columns as columns_of

    shapes = [tensor.shape for tensor in base.tensors() if len(tensor.shape) in (2, 4)]
    most = MAX_ELEMENTS // columns.stop
    widths = sorted({prod(shape[1:]) for shape in shapes if columns.stop <= prod(shape[1:]) <= most})
    if not widths:
        raise DataError(f"model {base.name} has no layer with {columns.stop} inputs or more")
    factors = {f"width.{n}": columns_of(n, columns.seed, columns.start, columns.rank).T.contiguous() for n in widths}
    try:
        file, temporary = create_temporary(path.absolute().parent)
        file.write(save(factors, columns.to_metadata()))
        publish(file, temporary, path)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
    return widths
