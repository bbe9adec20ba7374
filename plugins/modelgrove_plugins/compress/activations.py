"""Ranges of activations that are stored beside packed weights, as the calibration found them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from modelgrove_hub.formats.quantized import Activations
from modelgrove_plugins.compress.packed import Stored

if TYPE_CHECKING:
    from torch import Tensor


def with_ranges(
    stored: Stored, bits: int, ranges: Tensor, channels: Tensor | None = None, **remarks: Any
) -> Stored:  # fmt: skip
    """A packed tensor whose layer rounds its inputs to stored `ranges`, float32 (intervals, groups, 2).

    `channels` (C,) says which group each input channel is in, where there are several; `remarks` are for the report.
    """
    intervals, groups, _ = ranges.shape
    kind = "static" if intervals == 1 else "timestep"
    activations = Activations(bits=bits, ranges=kind, groups=groups, intervals=intervals)
    return with_activations(stored, activations, channels, ranges.float().contiguous(), **remarks)


def with_activations(
    stored: Stored, activations: Activations, channels: Tensor | None = None, ranges: Tensor | None = None,
    **remarks: Any,
) -> Stored:  # fmt: skip
    """A packed tensor whose layer rounds its inputs as `activations` say; their parts count as its bytes."""
    more = {}
    if activations.groups > 1 and channels is not None:
        more["channels"] = channels.byte()
    if ranges is not None:
        more["ranges"] = ranges
    size = stored.entry.bytes + sum(part.nbytes for part in more.values())
    entry = stored.entry.model_copy(update={"activations": activations, "bytes": size})
    return replace(stored, entry=entry, parts={**stored.parts, **more}, remarks={**stored.remarks, **remarks})
