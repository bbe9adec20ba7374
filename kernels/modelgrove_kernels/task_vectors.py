"""What merging methods do to updates entry by entry, or to an update as one vector.

An update here is a formed matrix X (a, b), float32 or float64, in any coordinates. Methods that look at entries depend
on the coordinates; those that look at lengths and angles do not. Everything is deterministic: equal magnitudes are
told apart by their place, random numbers come from the generator that is passed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator, Tensor

_PARALLEL = 0.9995
"""Beyond this |cos θ| a great circle is interpolated as a line, as is usual: sin θ loses its digits."""


def principal_bases(updates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Orthogonal matrices L (a, a) and R (b, b): the eigenvectors of Σ XᵢXᵢᵀ and Σ XᵢᵀXᵢ, the strongest first.

    The entries of LᵀXᵢR belong to the updates themselves, up to signs that all of them share: neither the order of the
    updates nor how they are factored matters. For small matrices, such as cores: the cost is cubic.

    Raises:
        ValueError: a value is not finite.
    """
    _check_finite(updates)
    doubles = [update.double() for update in updates]
    left = torch.linalg.eigh(torch.stack([X @ X.T for X in doubles]).sum(0)).eigenvectors
    right = torch.linalg.eigh(torch.stack([X.T @ X for X in doubles]).sum(0)).eigenvectors
    return left.flip(1).to(updates[0].dtype), right.flip(1).to(updates[0].dtype)


def trim(update: Tensor, density: float, outliers: float = 0.0) -> Tensor:
    """Only the k = ⌊density·ab⌋ largest entries, at least one; the ⌊outliers·ab⌋ even larger ones are dropped too.

    As TIES trims (Yadav et al. 2023), and with `outliers` as Model Breadcrumbs does (Davari & Belilovsky 2024). Where
    both shares exceed one together, fewer outliers are dropped.

    Raises:
        ValueError: a value is not finite.
    """
    _check_finite([update])
    count = update.numel()
    kept = min(count, max(1, int(density * count)))
    above = min(int(outliers * count), count - kept)
    magnitudes = update.abs().flatten().numpy()
    mask = _largest(magnitudes, kept + above)
    if above:
        mask &= ~_largest(magnitudes, above)
    return update * torch.from_numpy(mask).view(update.shape)


def _largest(magnitudes: np.ndarray, kept: int) -> np.ndarray:
    """True for exactly `kept` (≥ 1) of the values; of equal ones the first."""
    place = magnitudes.size - kept
    threshold = np.partition(magnitudes, place)[place]
    mask: np.ndarray = magnitudes > threshold
    mask[np.flatnonzero(magnitudes == threshold)[: kept - np.count_nonzero(mask)]] = True
    return mask


def drop(update: Tensor, keep: float | Tensor, generator: Generator) -> Tensor:
    """Each entry with probability `keep` (a number or (a, b)), divided by it: the expectation stays (DARE, MagPrune).

    Raises:
        ValueError: a value is not finite.
    """
    _check_finite([update])
    drawn = torch.rand(update.shape, generator=generator, dtype=torch.float32)
    return torch.where(drawn < keep, update / keep, 0.0)


def keep_by_rank(update: Tensor, density: float, spread: float) -> Tensor:
    """MagPrune's probabilities (a, b) of keeping an entry (Deep et al. 2024).

    Within a row they rise evenly with the rank of the magnitude, from density − spread/2 to density + spread/2.
    """
    rows, columns = update.shape
    if columns == 1:
        return torch.full_like(update, density)
    # Magnitude in the high half, place in the low: one sort of integers ranks them, equal ones by place. The bits of
    # floats ≥ 0 are ordered as the floats are.
    keys = update.abs().float().contiguous().numpy().view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(columns, dtype=np.uint64)
    keys.sort(axis=1)
    order = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    rising = torch.linspace(density - spread / 2, density + spread / 2, columns, dtype=update.dtype)
    return torch.empty_like(update).scatter_(1, torch.from_numpy(order), rising.expand(rows, columns))


def elected_mean(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TIES after trimming: every entry takes the sign of Σ wᵢXᵢ, and the mean of the wᵢXᵢ that agree with it.

    Each is weighted by |wᵢ| in the mean, so that it is the plain one of the paper for equal weights, grows with the
    weights, and an update whose weight goes to zero fades out. Where the sum is exactly zero the result is.
    """
    pairs = [(abs(weight), weight * update) for weight, update in zip(weights, updates, strict=True)]
    mass = torch.zeros_like(updates[0])
    for _, scaled in pairs:
        mass += scaled
    elected = mass.sign()
    total, voices = torch.zeros_like(elected), torch.zeros_like(elected)
    for weight, scaled in pairs:
        agreeing = (scaled.sign() == elected) & (scaled != 0)
        total.add_(scaled * agreeing, alpha=weight)
        voices.add_(agreeing, alpha=weight)
    return torch.where(voices > 0, total / voices, 0.0)


def slerp(start: Tensor, end: Tensor, t: float) -> Tensor:
    """sin((1−t)θ)/sin θ · start + sin(tθ)/sin θ · end, θ the angle between them as vectors.

    A straight line where they are nearly parallel, opposite, or one is zero.

    Raises:
        ValueError: a value is not finite.
    """
    _check_finite([start, end])
    cosine = _cosine(start, end)
    if abs(cosine) > _PARALLEL or not (bool(start.any()) and bool(end.any())):
        return (1 - t) * start + t * end
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * start + math.sin(t * angle) * end) / math.sin(angle)


def stock_ratio(updates: Sequence[Tensor]) -> float:
    """Model Stock's t = N·cos θ / (1 + (N−1)·cos θ), the share of the mean, in [0, 1] (Jang et al. 2024).

    cos θ is the mean over all pairs; where it is negative t is 0. With fewer than two updates there is no angle: 1.

    Raises:
        ValueError: a value is not finite.
    """
    _check_finite(updates)
    count = len(updates)
    if count < 2:
        return 1.0
    pairs = [_cosine(a, b) for place, a in enumerate(updates) for b in updates[:place]]
    cosine = max(0.0, sum(pairs) / len(pairs))
    return count * cosine / (1 + (count - 1) * cosine)


def _cosine(a: Tensor, b: Tensor) -> float:
    """⟨a, b⟩ / ‖a‖‖b‖ in [−1, 1]; 0 if one is zero."""
    # Scaled first: squares of small updates underflow in float32.
    sizes = [float(x.abs().max()) if x.numel() else 0.0 for x in (a, b)]
    if not all(sizes):
        return 0.0
    first, second = ((x / size).flatten() for x, size in zip((a, b), sizes, strict=True))
    found = float(first @ second) / float(first.norm()) / float(second.norm())
    return min(1.0, max(-1.0, found))


def _check_finite(updates: Sequence[Tensor]) -> None:
    if not all(bool(update.isfinite().all()) for update in updates):
        raise ValueError("an update holds NaN or infinite values")
