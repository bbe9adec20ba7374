"""Vector quantization of weights: a codebook by k-means, and assignments that are learned with it (VQ4DiT).

Deng et al. (AAAI 2025, arXiv 2408.17131) cut the rows of W into sub-vectors w_i of d columns, each of which is an entry
of a codebook C = {c_1 … c_k}. k-means alone leaves sub-vectors on entries whose gradients contradict each other, so
each keeps its n nearest entries A_c as candidates, mixed by ratios that begin at softmax of -log ‖w_i - c‖:

    ŵ_i = Σ_m R_im · c_(A_c(i, m))

Codebook and ratios are learned together while a block answers as before, under a penalty Σ 2 · p (1 - p) on a ratio p
that is undecided; one above .99 is frozen. Here n = 2, as published, so that a sub-vector's ratios are σ(z) and
1 - σ(z), and the penalty, 1 - |2p - 1|^β, is twice the published one at β = 2. Each row has a scale, its root mean
square: the packed format stores one anyway, and the entries serve all rows alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from modelgrove_kernels.bitstream import pack_bits
from modelgrove_kernels.packing import chunks, stored, unfold

ROUNDS = 20
"""Of k-means, at most."""
_SAMPLED = 128
"""Sub-vectors an entry that k-means looks at; all of them find their entry in the end."""
_FROZEN = 0.99


def kmeans(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k entries (k, d) for float32 points (n, d), by Lloyd's algorithm from points drawn as in k-means++.

    An entry without points moves to the point that is farthest from its own; with fewer than k different points some
    entries are equal.
    """
    drawn = points[torch.randperm(len(points), generator=generator)[: k * _SAMPLED]]
    entries = _seeds(drawn, k, generator)
    previous = torch.full((len(drawn),), -1)
    for _ in range(ROUNDS):
        distances, nearest = (found.squeeze(1) for found in nearest_entries(drawn, entries, 1))
        if torch.equal(nearest, previous):
            break
        previous = nearest
        counts = torch.bincount(nearest, minlength=k)
        sums = torch.zeros_like(entries).index_add_(0, nearest, drawn)
        entries = torch.where(counts.unsqueeze(1) > 0, sums / counts.clamp_min(1).unsqueeze(1), entries)
        idle = (counts == 0).nonzero().flatten()[: len(drawn)]
        entries[idle] = drawn[distances.topk(len(idle)).indices]
    return entries


def _seeds(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k of the points, each drawn with a chance that grows with its squared distance from those before (k-means++)."""
    seeds = points[:1].repeat(k, 1)
    distances = (points - seeds[0]).square().sum(1)
    for number in range(1, k):
        if not bool(distances.any()):
            break
        seeds[number] = points[torch.multinomial(distances, 1, generator=generator)]
        distances = torch.minimum(distances, (points - seeds[number]).square().sum(1))
    return seeds


def nearest_entries(points: Tensor, entries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Squared distances and indices (n, count) of the nearest of `entries` (k, d) to points (n, d), ascending."""
    distances, indices = torch.empty(len(points), count), torch.empty(len(points), count, dtype=torch.long)
    norms = entries.square().sum(1)
    for part in chunks(len(points), len(entries)):
        all_distances = torch.addmm(norms, points[part], entries.T, alpha=-2)
        found = all_distances.topk(count, dim=1, largest=False)
        distances[part] = (found.values + points[part].square().sum(1, keepdim=True)).clamp_min_(0)
        indices[part] = found.indices
    return distances, indices


class Codebook:
    """A weight (rows, K) of any floating dtype as entries of a codebook, 2^bits of them, by k-means.

    Raises:
        ValueError: a value is not finite.
    """

    def __init__(self, weight: Tensor, bits: int, vector: int, generator: torch.Generator) -> None:
        exact = weight.float()
        if not bool(torch.isfinite(exact).all()):
            raise ValueError("NaN or infinite values cannot be quantized")
        self.bits, self.vector, self.columns = bits, vector, weight.shape[1]
        self.scales = stored(exact.double().square().mean(1, keepdim=True).sqrt().float())
        self.points = functional.pad(exact / self.scales.float(), (0, -self.columns % vector)).view(-1, vector)
        """Sub-vectors (n, vector) of all rows over their scales, the last of a row padded with zeros."""
        self.entries = kmeans(self.points, 2**bits, generator)

    @property
    def group(self) -> int:
        """Columns of a row, padded."""
        return self.columns + -self.columns % self.vector

    def parts(self, learned: Assignment | None = None) -> dict[str, Tensor]:
        """codes, scales (rows, 1) and table (1, 2^bits, vector) of layout `lut`: nearest entries, or learned ones."""
        entries = (self.entries if learned is None else learned.entries.detach()).half()
        chosen = nearest_entries(self.points, entries.float(), 1)[1] if learned is None else learned.decided()
        codes = pack_bits(chosen.view(len(self.scales), -1).to(torch.uint8), self.bits)
        return {"codes": codes, "scales": self.scales, "table": entries.unsqueeze(0)}


class Assignment(nn.Module):
    """A weight of a layer's `shape`, its axes in packed order `axes`, under learning: a `reconstruction.Relaxed`."""

    RATE = 0.5
    """Of z: some hundred steps must carry a choice across; the published 0.05 is for thousands."""
    ENTRY_RATE = 1e-3
    """Of the entries, whose root mean square is about one; published 1e-4."""

    def __init__(self, book: Codebook, shape: Sequence[int], axes: Sequence[int]) -> None:
        super().__init__()
        self.book, self.shape, self.axes = book, tuple(shape), tuple(axes)
        distances, self.candidates = nearest_entries(book.points, book.entries, 2)
        first, second = distances.clamp_min(1e-12).sqrt().unbind(1)
        self.entries = nn.Parameter(book.entries.clone())
        self.choice = nn.Parameter((second / first).log())
        self.frozen = torch.zeros(len(first), dtype=torch.bool)

    def _ratios(self) -> Tensor:
        """p of the first candidate; of frozen ones 0 or 1."""
        ratios = torch.sigmoid(self.choice)
        self.frozen = self.frozen | ((ratios.detach() - 0.5).abs() > _FROZEN - 0.5)
        return torch.where(self.frozen, (ratios.detach() >= 0.5).float(), ratios)

    def forward(self) -> Tensor:
        """The weight with its soft assignments."""
        ratios = self._ratios().unsqueeze(1)
        first, second = (self.entries[candidates] for candidates in self.candidates.unbind(1))
        rows = (second + ratios * (first - second)).view(len(self.book.scales), -1)[:, : self.book.columns]
        return unfold(rows * self.book.scales.float(), self.shape, self.axes)

    def penalty(self, exponent: float) -> Tensor:
        """1 - |2p - 1|^β, the mean."""
        return (1 - (2 * self._ratios() - 1).abs().pow(exponent)).mean()

    def rates(self) -> Sequence[tuple[nn.Parameter, float]]:
        """z and the codebook."""
        return [(self.choice, self.RATE), (self.entries, self.ENTRY_RATE)]

    @torch.no_grad()
    def decided(self) -> Tensor:
        """The entry (n,) that each sub-vector chose."""
        return torch.where(self.choice >= 0, self.candidates[:, 0], self.candidates[:, 1])
