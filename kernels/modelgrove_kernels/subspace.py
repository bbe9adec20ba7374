"""How low-rank updates get in each other's way, and what can be done about it afterwards.

An update reads its input along the columns of V and writes along the columns of U. Two updates
whose inputs overlap disturb each other; the measure that tracks real damage best, from weights
alone, is the energy-weighted crosstalk (shared/research/merge.md §1.1.2). Updates are given in
canonical form, without directions of singular value zero (`Canonical.above`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modelgrove_kernels.lowrank import Canonical, LowRank, block_sums, leading

_PRESENT = 1e-5
"""Singular values below this share of the largest are rounding."""


@dataclass(frozen=True)
class Relations:
    """Pairwise measures of n updates to one layer, each (n, n).

    `inner` is ⟨Xᵢ, Xⱼ⟩. The overlaps are ‖VᵢᵀVⱼ‖² and ‖UᵢᵀUⱼ‖² over the smaller rank, in [0, 1];
    random subspaces have max(rᵢ, rⱼ)/d. `echo` is that of `echoes`; echo[i, j] / echo[i, i] is the
    energy-weighted crosstalk of j on i.
    """

    inner: Tensor
    input_overlap: Tensor
    output_overlap: Tensor
    echo: Tensor


def relations(updates: Sequence[Canonical]) -> Relations:
    """All pairwise measures, from two products of the stacked singular vectors."""
    ranks = [update.rank for update in updates]
    inputs = _cross([update.V for update in updates])
    outputs = _cross([update.U for update in updates])
    s = torch.cat([update.S for update in updates])
    weights = s[:, None] * s
    smaller = torch.tensor([[max(1, min(a, b)) for b in ranks] for a in ranks], dtype=s.dtype)
    return Relations(
        inner=block_sums(inputs * outputs * weights, ranks, ranks),
        input_overlap=block_sums(inputs.square(), ranks, ranks) / smaller,
        output_overlap=block_sums(outputs.square(), ranks, ranks) / smaller,
        echo=echoes(updates, updates),
    )


def echoes(inputs: Sequence[Canonical], updates: Sequence[Canonical]) -> Tensor:
    """‖Yⱼ Vᵢ Sᵢ‖ for all pairs, (n, m): how strongly update Yⱼ answers to the inputs that Xᵢ was made for."""
    # ‖Yⱼ Vᵢ Sᵢ‖ = ‖Sᵢ (VᵢᵀVⱼ) Sⱼ‖: the U of an update has orthonormal columns.
    rows = torch.cat([x.V * x.S for x in inputs], dim=1)
    columns = torch.cat([y.V * y.S for y in updates], dim=1)
    squares = (rows.T @ columns).square()
    return block_sums(squares, [x.rank for x in inputs], [y.rank for y in updates]).sqrt()


def effective_rank(singular_values: Tensor, floor: float) -> int:
    """The number of directions above the noise floor."""
    return int(torch.count_nonzero(singular_values > floor))


def entropy_rank(singular_values: Tensor) -> float:
    """How many directions share the update: exp of the entropy of σ/Σσ (Roy & Vetterli 2007); 0 if X = 0."""
    present = singular_values[singular_values > 0].double()
    shares = present / present.sum()
    return float(torch.exp(-(shares * shares.log()).sum())) if shares.numel() else 0.0


def rounding_floor(norm: float, dtype: torch.dtype) -> float:
    """The singular values that storing the factors of an update of Frobenius norm `norm` in `dtype` may add.

    Rounding moves each factor by at most half an eps of its entries, and X by twice that.
    """
    return norm * torch.finfo(dtype).eps


def noise_floor(deviation: float, shape: tuple[int, int]) -> float:
    """The largest singular value of an (m, n) matrix of independent noise: deviation·(√m + √n) (Marchenko–Pastur)."""
    return deviation * (math.sqrt(shape[0]) + math.sqrt(shape[1]))


def directions(matrix: Tensor, most: int | None = None) -> Canonical:
    """The leading directions of a formed matrix (m, n), all if `most` does not bound them, without those of rounding.

    A direction that is only rounding has a random place, in which repairs would see something that updates share.

    Raises:
        ValueError: the matrix is not finite.
    """
    form = leading(matrix, min(matrix.shape) if most is None else most)
    return form.above(_PRESENT * float(form.S[:1].sum()))


def project_apart(updates: Sequence[Canonical]) -> list[LowRank]:
    """Mutual input projection: each update stops reading what any other one reads.

    Xᵢ ← Xᵢ(I − QᵢQᵢᵀ), Qᵢ an orthonormal basis of the span of all other Vⱼ. The rank stays, the
    shared directions are lost to everyone; compare norms for the energy lost.
    """
    joint, inputs = _joint_inputs(updates)
    projected = []
    for i, update in enumerate(updates):
        own = _without(inputs[i], _basis(torch.cat([inputs[0][:, :0], *inputs[:i], *inputs[i + 1 :]], dim=1)))
        projected.append(LowRank(update.U * update.S, (joint @ own).T))
    return projected


def project_in_turn(updates: Sequence[Canonical]) -> list[LowRank]:
    """Each update stops reading what one before it reads: the first stays whole (Gram–Schmidt on the input side)."""
    joint, inputs = _joint_inputs(updates)
    projected = []
    for i, update in enumerate(updates):
        own = _without(inputs[i], _basis(torch.cat([inputs[0][:, :0], *inputs[:i]], dim=1)))
        projected.append(LowRank(update.U * update.S, (joint @ own).T))
    return projected


def share_inputs(updates: Sequence[Canonical]) -> list[LowRank]:
    """Each update keeps of every input direction the share that it has of the energy which all put there.

    Xᵢ ← Xᵢ·S^(-½)·Cᵢ·S^(-½) with Cⱼ = XⱼᵀXⱼ and S = Σ Cⱼ: σ²/(σ² + τ²), τ² being the others' energy. The shares add up
    to one and none exceeds it, so that no update grows. What one alone reads stays, of what two read alike each keeps
    half.
    """
    joint, inputs = _joint_inputs(updates)
    cores = [inner.double() * update.S.double() for inner, update in zip(inputs, updates, strict=True)]
    energies = [core @ core.T for core in cores]
    values, vectors = torch.linalg.eigh(torch.stack(energies).sum(0))
    read = values > _PRESENT**2 * values[-1:].sum()
    root = (vectors[:, read] / values[read].sqrt()) @ vectors[:, read].T
    shared = []
    for update, inner, energy in zip(updates, inputs, energies, strict=True):
        own = (inner.double().T @ root @ energy @ root).to(inner.dtype)
        shared.append(LowRank(update.U * update.S, own @ joint.T))
    return shared


def orthogonalise(updates: Sequence[Canonical]) -> list[LowRank]:
    """Löwdin: all U and all V are replaced by the nearest orthonormal ones, singular values stay.

    As in TSV-M (Gargiulo et al., CVPR 2025, arXiv 2412.00081). Symmetric: no update has priority. Where
    the summed rank exceeds a side's width, each update keeps its strongest width // n directions.
    Directions that several updates share exactly are averaged among them.
    """
    room = min(min(update.U.shape[0], update.V.shape[0]) for update in updates) // len(updates)
    crowded = sum(update.rank for update in updates) > room * len(updates)
    kept = [update.first(room) if crowded else update for update in updates]
    sizes = [update.rank for update in kept]
    U = _nearest_orthonormal(torch.cat([update.U for update in kept], dim=1))
    V = _nearest_orthonormal(torch.cat([update.V for update in kept], dim=1))
    pairs = zip(torch.split(U, sizes, dim=1), torch.split(V, sizes, dim=1), kept, strict=True)
    return [LowRank(u * update.S, v.T) for u, v, update in pairs]


def _joint_inputs(updates: Sequence[Canonical]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """An orthonormal basis of all input directions together, and each update's V in it: all the work is small there."""
    joint, core = torch.linalg.qr(torch.cat([update.V for update in updates], dim=1))
    return joint, torch.split(core, [update.rank for update in updates], dim=1)


def _without(columns: Tensor, basis: Tensor) -> Tensor:
    """The columns without their parts along an orthonormal basis."""
    for _ in range(2):  # in float32 one pass leaves 1e-7 of a direction that it should remove
        columns = columns - basis @ (basis.T @ columns)
    return columns


def _cross(bases: Sequence[Tensor]) -> Tensor:
    stacked = torch.cat(list(bases), dim=1)
    return stacked.T @ stacked


def _thin_svd(columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of a tall matrix through QR, without the directions of singular value (nearly) zero."""
    q, r = torch.linalg.qr(columns)
    u, s, vt = torch.linalg.svd(r, full_matrices=False)
    # Columns have length one, so an absolute tolerance fits; shared directions come out near eps.
    real = int(torch.count_nonzero(s > 100 * torch.finfo(s.dtype).eps))
    return q @ u[:, :real], s[:real], vt[:real]


def _basis(columns: Tensor) -> Tensor:
    return _thin_svd(columns)[0]


def _nearest_orthonormal(columns: Tensor) -> Tensor:
    u, _, vt = _thin_svd(columns)
    return u @ vt
