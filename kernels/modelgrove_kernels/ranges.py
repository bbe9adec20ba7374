"""Ranges for activations that are stored: the one that loses least, channels that share one, outliers by axis.

Inputs are those that `calibration` samples, (n, K) in packed order: column k belongs to channel k mod C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelgrove_kernels.calibration import LayerInputs
from modelgrove_kernels.emulation import round_to_ranges

SHRUNK = 40
"""Ranges that are tried for each end: 1, .98 … .22 of what was seen."""
_VALUES = 1 << 13
"""Values that a search looks at."""
_NORM = 2.4
"""Of the errors, as in BRECQ's search: what is cut off counts for more than in a squared error."""
_ROUNDS = 30


def best_range(values: Tensor, bits: int) -> tuple[float, float]:
    """(low, high), around zero, whose grid of 2^bits - 1 steps has the least error on `values` of any shape.

    Both ends shrink together, as in BRECQ's and Q-Diffusion's search, then each by itself: what follows a SiLU is
    long on one side only.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    low, high = (float(end) for end in torch.aminmax(values)) if values.numel() else (0.0, 0.0)
    if not (-float("inf") < low <= high < float("inf")):
        raise ValueError("the layer's inputs are NaN or infinite")
    low, high = min(low, 0.0), max(high, 0.0)
    some = _some(values.float().flatten())
    shares = 1 - torch.arange(SHRUNK) / 50
    for left, right in ((shares, shares), (torch.ones(1), shares), (shares, torch.ones(1))):
        lows, highs = (end.expand(SHRUNK) for end in (left * low, right * high))
        errors = [_error(some, bits, one, other) for one, other in zip(lows, highs, strict=True)]
        best = int(torch.tensor(errors).argmin())
        low, high = float(lows[best]), float(highs[best])
    return low, high


def channel_extremes(inputs: LayerInputs, channels: int) -> Tensor:
    """(lowest, highest) of each channel, (channels, 2).

    Those of the sample, both stretched until they reach the largest |x| of all inputs: outliers are few, and a sample
    misses them.
    """
    cut = inputs.sample.view(-1, channels)
    ends = torch.stack([cut.amin(0), cut.amax(0)], 1)
    seen, far = ends.abs().amax(1), inputs.absmax.view(-1, channels).amax(0)
    return ends * torch.where(seen > 0, far / seen, 1.0)[:, None]


def spreads(sample: Tensor, channels: int) -> tuple[float, float]:
    """How far channels differ, and how far pixels do: largest less smallest root mean square.

    The paper compares extremes over a set of pictures at each position. Single inputs know no position, and the
    extremes of all of them follow one outlying channel; their root mean squares do so much less.
    """
    squares = sample.float().square()
    own = squares.view(-1, channels).mean(0), squares.mean(1)
    by_channel, by_pixel = (float(mean.amax().sqrt() - mean.amin().sqrt()) for mean in own)
    return by_channel, by_pixel


def alike(extremes: Tensor, count: int) -> Tensor:
    """Which of at most `count` groups each of the ranges (n, 2) is in, int64 (n,), by k-means; groups are numbered
    from 0, none is empty.

    Starts from the ranges' quantiles by width, so that nothing is drawn by chance.
    """
    width = (extremes[:, 1] - extremes[:, 0]).argsort()
    middles = ((torch.arange(count) + 0.5) / count * len(width)).long()
    centres = extremes[width[middles]]
    nearest = torch.zeros(len(extremes), dtype=torch.long)
    for _ in range(_ROUNDS):
        nearest = torch.cdist(extremes, centres).argmin(1)
        means = [extremes[nearest == group].mean(0) for group in range(count)]
        moved = torch.stack([old if bool(new.isnan().any()) else new for old, new in zip(centres, means, strict=True)])
        if torch.equal(moved, centres):
            break
        centres = moved
    groups: Tensor = torch.unique(nearest, return_inverse=True)[1]
    return groups


def group_extremes(extremes: Tensor, groups: Tensor) -> Tensor:
    """(lowest, highest) over each group of the ranges (n, 2), (groups, 2); `groups` (n,) counts from 0."""
    ends = [extremes[groups == group] for group in range(int(groups.max()) + 1)]
    return torch.stack([torch.stack([own[:, 0].amin(), own[:, 1].amax()]) for own in ends])


def _some(values: Tensor) -> Tensor:
    """At most `_VALUES` of them, drawn evenly."""
    if len(values) <= _VALUES:
        return values
    return values[torch.randint(len(values), (_VALUES,), generator=torch.Generator().manual_seed(0))]


def _error(values: Tensor, bits: int, low: Tensor, high: Tensor) -> float:
    return float((round_to_ranges(values, bits, low, high) - values).abs().pow(_NORM).sum())
