"""Algebra of low-rank updates X = up · down, done on the factors: X itself is never formed.

Factors are ambiguous, (B, A) and (BR, R⁻¹A) are the same update, so everything here depends on
the product alone. Sums are exact in the "core": thin QR of the stacked factors, then an SVD of
a matrix no larger than the summed ranks (Core Space Merging, NeurIPS 2025). Half-precision
factors are worked on in float32, float64 stays float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SPARE = 10
"""Directions that `leading` looks for beyond those asked for."""
_PASSES = 2
"""Power iterations of `leading`."""
_WORTH = 8
"""How many times fewer directions than the matrix has make a random search worth it."""


@dataclass(frozen=True)
class LowRank:
    """An update X = up · down of shape (m, n); `up` is (m, r), `down` is (r, n), both floating point.

    Raises:
        ValueError: the factors are no matrices or do not fit together.
    """

    up: Tensor
    down: Tensor

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0]:
            raise ValueError(f"factors {tuple(self.up.shape)} and {tuple(self.down.shape)} do not make an update")

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of X."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """r, the number of columns of `up`; the true rank may be lower."""
        return self.up.shape[1]

    @property
    def T(self) -> LowRank:  # noqa: N802  (as torch and numpy call it)
        """Xᵀ, which swaps the input and the output side."""
        return LowRank(self.down.T, self.up.T)


@dataclass(frozen=True)
class Canonical:
    """X = U · diag(S) · Vᵀ: U (m, k) and V (n, k) have orthonormal columns, S (k,) falls and is ≥ 0.

    The sign is fixed by making the largest entry of each column of V positive.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    @property
    def rank(self) -> int:
        """k, the number of directions kept."""
        return self.S.shape[0]

    @property
    def norm(self) -> float:
        """‖X‖, the Frobenius norm."""
        return float(self.S.norm())

    @property
    def T(self) -> Canonical:  # noqa: N802  (as torch and numpy call it)
        """Xᵀ, whose signs are fixed by the columns of U."""
        return Canonical(self.V, self.S, self.U)

    def first(self, rank: int) -> Canonical:
        """The best approximation of at most `rank` (Eckart–Young)."""
        return Canonical(self.U[:, :rank], self.S[:rank], self.V[:, :rank])

    def above(self, floor: float) -> Canonical:
        """Only the directions whose singular value exceeds `floor`; possibly none."""
        return self.first(int(torch.count_nonzero(self.S.gt(floor))))

    def factors(self) -> LowRank:
        """Balanced factors U√S and √S·Vᵀ: both sides are equally large, which half precision likes."""
        root = self.S.sqrt()
        return LowRank(self.U * root, (self.V * root).T)


@dataclass(frozen=True)
class Merged:
    """A weighted sum of updates, and ‖sum − result‖ / ‖sum‖ of what truncation cut off."""

    result: Canonical
    error: float


def canonical(update: LowRank) -> Canonical:
    """The singular value decomposition of X, from thin QRs of its factors; k = min(r, m, n).

    Raises:
        ValueError: a factor is not finite.
    """
    up, down = _working(update.up, update.down)
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(down.T)
    return decompose(left, left_core @ right_core.T, right)


def canonicals(updates: Sequence[LowRank]) -> tuple[Canonical, ...]:
    """`canonical` of each update; at once where all have the same shape and rank, which is faster.

    Raises:
        ValueError: a factor is not finite.
    """
    if len({(update.shape, update.rank) for update in updates}) != 1:
        return tuple(map(canonical, updates))
    pairs = [_working(update.up, update.down) for update in updates]
    left, left_core = torch.linalg.qr(torch.stack([up for up, _ in pairs]))
    right, right_core = torch.linalg.qr(torch.stack([down.T for _, down in pairs]))
    whole = decompose(left, left_core @ right_core.mT, right)
    return tuple(Canonical(*parts) for parts in zip(whole.U, whole.S, whole.V, strict=True))


def leading(matrix: Tensor, rank: int) -> Canonical:
    """The `rank` leading directions of a formed matrix (m, n), or all if there are fewer.

    A matrix of which few directions are wanted is multiplied with random vectors first and decomposed in the space
    that they reach, as Halko, Martinsson & Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1 (three passes, ten
    directions to spare); the same matrix gives the same directions.

    Raises:
        ValueError: the matrix is not finite.
    """
    (X,) = _working(matrix)
    spared, width = rank + _SPARE, min(X.shape)
    if spared * _WORTH >= width:
        tall = X.shape[0] >= X.shape[1]
        space, core = torch.linalg.qr(X if tall else X.T)
        return (decompose(space, core, None) if tall else decompose(None, core.T, space)).first(rank)
    generator = torch.Generator().manual_seed(0)
    space = torch.linalg.qr(X @ torch.randn(X.shape[1], spared, generator=generator, dtype=X.dtype)).Q
    for _ in range(_PASSES):
        space = torch.linalg.qr(X @ torch.linalg.qr(X.T @ space).Q).Q
    right, core = torch.linalg.qr(X.T @ space)
    return decompose(space, core.T, right).first(rank)


def merge(
    updates: Sequence[LowRank], weights: Sequence[float], rank: int | None = None, energy: float | None = None
) -> Merged:
    """Σ wᵢXᵢ, exact up to rounding, cut to at most `rank` and to the fewest directions that hold
    the share `energy` of ‖Σ wᵢXᵢ‖². With neither, only directions lost in rounding are dropped.

    Raises:
        ValueError: no updates, different shapes, weights that do not fit, or a factor is not finite.
    """
    if not updates or len(updates) != len(weights):
        raise ValueError(f"{len(updates)} updates and {len(weights)} weights cannot be summed")
    if len({update.shape for update in updates}) > 1:
        raise ValueError(f"updates of different shapes cannot be summed: {[update.shape for update in updates]}")
    return truncate(canonical(stack(updates, weights)), rank, energy)


def truncate(form: Canonical, rank: int | None = None, energy: float | None = None) -> Merged:
    """X cut to at most `rank` and to the fewest directions that hold the share `energy` of ‖X‖².

    With neither, only directions lost in rounding are dropped. One direction is always left.
    """
    whole = _never_empty(form)
    kept = _kept(whole, rank, energy)
    total = float(whole.S.square().sum())
    lost = float(whole.S[kept:].square().sum())
    return Merged(whole.first(kept), (lost / total) ** 0.5 if total else 0.0)


def stack(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Σ wᵢXᵢ as one update of the summed rank: factors side by side, the weights on `up`."""
    pairs = [_working(update.up, update.down) for update in updates]
    up = torch.cat([up * weight for (up, _), weight in zip(pairs, weights, strict=True)], dim=1)
    return LowRank(up, torch.cat([down for _, down in pairs]))


def inner(a: LowRank, b: LowRank) -> float:
    """⟨a, b⟩ = tr(aᵀb), from r×r products of the factors."""
    a_up, a_down, b_up, b_down = _working(a.up, a.down, b.up, b.down)
    return float(((a_up.T @ b_up) * (a_down @ b_down.T)).sum())


def second_moment_inner(a: LowRank, b: LowRank) -> float:
    """⟨aaᵀ, bbᵀ⟩ = ‖aᵀb‖²; for the input side, ⟨aᵀa, bᵀb⟩, give `a.T` and `b.T`."""
    return float(second_moment_gram([a], [b])[0, 0])


def gram(rows: Sequence[LowRank], columns: Sequence[LowRank] | None = None) -> Tensor:
    """⟨Xᵢ, Yⱼ⟩ for all pairs, (n, m), float32 or float64; `columns` default to `rows`."""
    columns = rows if columns is None else columns
    ups, downs = _crossed(rows, columns)
    return block_sums(ups * downs, [x.rank for x in rows], [y.rank for y in columns])


def second_moment_gram(rows: Sequence[LowRank], columns: Sequence[LowRank] | None = None) -> Tensor:
    """⟨XᵢXᵢᵀ, YⱼYⱼᵀ⟩ = tr[(AᵢAᵢᵀ)(BᵢᵀBⱼ)(AⱼAⱼᵀ)(BⱼᵀBᵢ)] for all pairs, (n, m), with B = up, A = down."""
    columns = rows if columns is None else columns
    ups, _ = _crossed(rows, columns)
    heights, widths = [x.rank for x in rows], [y.rank for y in columns]
    # tr(G P H Pᵀ) = Σ (G P) ∘ (P H) for symmetric G and H: no root of a Gram matrix is needed.
    left = [_own_gram(x.down, ups) @ block for x, block in zip(rows, torch.split(ups, heights), strict=True)]
    right = [block @ _own_gram(y.down, ups) for y, block in zip(columns, torch.split(ups, widths, dim=1), strict=True)]
    return block_sums(torch.cat(left) * torch.cat(right, dim=1), heights, widths)


def block_sums(values: Tensor, heights: Sequence[int], widths: Sequence[int]) -> Tensor:
    """Sums over the blocks of `values` (Σ heights, Σ widths) → (len(heights), len(widths))."""
    return _owners(heights, values).T @ values @ _owners(widths, values)


def _owners(sizes: Sequence[int], like: Tensor) -> Tensor:
    places = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.long))
    return torch.nn.functional.one_hot(places, len(sizes)).to(like.dtype)


def _crossed(rows: Sequence[LowRank], columns: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """BᵀB and AAᵀ of the stacked factors, each (Σ ranks of rows, Σ ranks of columns)."""
    left, right = stack(rows, [1.0] * len(rows)), stack(columns, [1.0] * len(columns))
    left_up, left_down, right_up, right_down = _working(left.up, left.down, right.up, right.down)
    return left_up.T @ right_up, left_down @ right_down.T


def _own_gram(down: Tensor, like: Tensor) -> Tensor:
    down = down.to(like.dtype)
    return down @ down.T


def decompose(left: Tensor | None, core: Tensor, right: Tensor | None) -> Canonical:
    """The singular value decomposition of left · core · rightᵀ; both sides have orthonormal columns, None is I.

    Several at once have a dimension in front.

    Raises:
        ValueError: the core is not finite.
    """
    if not bool(torch.isfinite(core).all()):
        raise ValueError("a factor holds NaN or infinite values, or is too large to multiply")
    u, s, vt = torch.linalg.svd(core, full_matrices=False)
    U, V = u if left is None else left @ u, vt.mT if right is None else right @ vt.mT
    if not s.numel():
        return Canonical(U, s, V)
    largest = V.gather(-2, V.abs().argmax(-2, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(V.dtype)
    return Canonical(U * sign, s, V * sign)


def _never_empty(form: Canonical) -> Canonical:
    """A sum of updates without any direction is zero, written as one direction of strength zero."""
    if form.rank:
        return form
    U, V = (torch.eye(side.shape[0], 1, dtype=side.dtype) for side in (form.U, form.V))
    return Canonical(U, form.S.new_zeros(1), V)


def _kept(whole: Canonical, rank: int | None, energy: float | None) -> int:
    """How many directions to keep; at least one, so that the result is still an adapter."""
    rounding = torch.finfo(whole.S.dtype).eps * whole.rank**0.5 * float(whole.S[:1].sum())
    kept = whole.above(rounding).rank
    if energy is not None:
        shares = whole.S.double().square().cumsum(0)
        needed = int(torch.searchsorted(shares, energy * shares[-1])) + 1
        kept = min(kept, needed)
    return max(1, kept if rank is None else min(kept, rank))


def _working(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in one dtype that QR and SVD accept: float64 if any is, else float32."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return tuple(tensor.to(dtype) for tensor in tensors)
