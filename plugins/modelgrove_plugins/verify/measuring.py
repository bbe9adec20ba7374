"""Read marks from a model: one pass over its matrices for any number of keys."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from modelgrove_hub.contracts import Context, InputModel, LazyTensor
from modelgrove_hub.errors import NotFoundError
from modelgrove_hub.hub import Hub
from modelgrove_hub.keys import CommittedKey, find_key, list_keys, read_secret
from modelgrove_plugins.verify.reading import Matrix

if TYPE_CHECKING:
    from datetime import datetime

    from torch import Tensor

    from modelgrove_kernels.lowrank import LowRank
    from modelgrove_kernels.weight_mark import MarkKey, Reading, Statistic

Weight = Callable[[Matrix], "tuple[Tensor | LowRank, float | None]"]
"""A matrix → its values, and what they are measured by (None: their own rms)."""
KEY = "Commitment of the key, as `modelgrove key ls` shows it; its secret is read from its file."


def committed(public: str) -> tuple[CommittedKey, MarkKey, int]:
    """The key of a commitment in this hub, its secret, and how many keys were committed to here.

    Raises:
        NotFoundError: it was not committed here, or its secret is not on this machine.
        DataError: the file holds another secret.
    """
    from modelgrove_kernels.weight_mark import MarkKey

    hub = Hub.open()
    try:
        with hub.reading() as session:
            key, count = find_key(session, public), len(list_keys(session))
        if key.id != public:
            raise NotFoundError(f"no key {public!r} was committed here: give its whole commitment")
        return key, MarkKey(read_secret(hub.settings, key), key.bits), count
    finally:
        hub.engine.dispose()


def registered(model: InputModel) -> datetime | None:
    """When the model was registered in this hub; None for one that is not."""
    from modelgrove_hub.keys import registered_at

    hub = Hub.open()
    try:
        with hub.reading() as session:
            return registered_at(session, model.revision_id)
    finally:
        hub.engine.dispose()


def plain(matrix: Matrix) -> tuple[Tensor | LowRank, None]:
    """A matrix as it is."""
    return matrix.read(), None


def measure(
    context: Context, keys: Sequence[MarkKey], matrices: Sequence[Matrix], weight: Weight = plain,
    span: tuple[float, float] = (0.0, 1.0), what: str = "reading",
) -> list[Statistic]:  # fmt: skip
    """s of every key; each matrix is read once. `span` is the share of the job's progress that this is."""
    from modelgrove_kernels.weight_mark import Statistic

    found = [Statistic(key.bits) for key in keys]
    for number, matrix in enumerate(matrices):
        context.progress(span[0] + (span[1] - span[0]) * number / len(matrices), f"{what} {matrix.name}")
        values, scale = weight(matrix)
        for key, statistic in zip(keys, found, strict=True):
            statistic.add(key.carriers(matrix.name, matrix.shape), values, scale)
    return found


def read_bits(key: MarkKey, statistic: Statistic) -> Reading:
    """The bits that agree with the key's."""
    from modelgrove_kernels.weight_mark import Reading

    return Reading.of(statistic.values(), key.message())


def told(key: MarkKey, statistic: Statistic, hypotheses: int = 1) -> dict[str, Any]:
    """A reading as JSON values: k of n, the exact p of both polarities, and the weakest bit in standard deviations."""
    from modelgrove_kernels.weight_mark import log10, smallest_margin

    reading = read_bits(key, statistic)
    p = reading.p(hypotheses)
    sign = -1.0 if reading.inverted else 1.0
    return {
        "bits": reading.bits,
        "agreeing": reading.agreeing,
        "accuracy": round(reading.accuracy, 4),
        "inverted": reading.inverted,
        "p": float(p),
        "log10_p": round(log10(p), 2),
        "weakest_bit": round(smallest_margin(sign * statistic.values(), key.message()), 2),
    }


def wrong_keys(seed: int, bits: int, count: int) -> list[MarkKey]:
    """Keys that nobody marked anything with."""
    from modelgrove_kernels.weight_mark import MarkKey

    return [MarkKey(hashlib.sha256(f"wrong key {number} of {seed}".encode()).digest(), bits) for number in range(count)]


def rounded_to(bits: int) -> Callable[[LazyTensor], Tensor]:
    """A tensor as `compress --method rtn` would leave it: 16 is bfloat16, 8 has a scale a row, fewer one for 64 inputs.

    Vectors stay.
    """

    def change(tensor: LazyTensor) -> Tensor:
        import torch

        from modelgrove_plugins.compress.packed import pack, unpack
        from modelgrove_plugins.compress.targets import FLOATS

        values = tensor.read()
        if len(tensor.shape) < 2 or tensor.dtype not in FLOATS:
            return values
        if bits == 16:
            return values.to(torch.bfloat16)
        return unpack(pack(values, bits, None if bits == 8 else 64), tensor.name)

    return change
