"""A keyed mark in weights: 128 signs, each the correlation of all weights with a secret pattern of its own.

Carrier i on a matrix T (rows, columns) is uᵢvᵢᵀ, two vectors of random signs that follow from the key, the matrix's
name and its shape. Over all matrices

    sᵢ = Σ_T uᵢᵀ (T / rms(T)) vᵢ / √D,    D = Σ_T rows · columns,

which is of mean 0 and variance 1 for random signs whatever T is, and blind to the scale of any T. Embedding is the
smallest change, measured as a share of each matrix's own rms, after which every bᵢsᵢ ≥ margin: a quadratic programme
whose dual has one variable a bit. Reading counts the bits with sign(sᵢ) = bᵢ. The bits b follow from the key as well,
so that for weights which do not depend on the key the count is Binomial(n, ½) exactly, however the sᵢ depend on each
other.

After Uchida et al., Embedding Watermarks into Deep Neural Networks (ICMR 2017), section 3; carriers of rank one and the
closed form are ours. A low-rank update BA is marked in the product, which a change of gauge (BG, G⁻¹A) leaves alone.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache

import numpy as np
import torch
from torch import Tensor

from modelgrove_kernels.lowrank import LowRank, canonical, inner, stack, truncate

POLARITIES = 2
"""An adapter of strength −1 shows every bit inverted, so both signs are looked at, and counted as two hypotheses."""
_DOMAIN = b"modelgrove weight mark 1\0"
_SWEEPS = 500
_REACHED = 1e-3
"""Of the margin: what rounding and a last step may leave undone."""
_ROUNDS = 12


@dataclass(frozen=True)
class MarkKey:
    """The secret and how many bits are read with it.

    Raises:
        ValueError: the secret has not 32 bytes, or there are no bits.
    """

    secret: bytes = field(repr=False)
    bits: int = 128

    def __post_init__(self) -> None:
        if len(self.secret) != 32 or self.bits < 1:
            raise ValueError(f"a key has 32 secret bytes and one bit or more, not {len(self.secret)} and {self.bits}")

    def message(self) -> Tensor:
        """b: (bits,) signs, float32."""
        return self._signs("message", (), 1, self.bits)[0]

    def carriers(self, name: str, shape: tuple[int, int]) -> Carriers:
        """u (bits, rows) and v (bits, columns) for the matrix called `name`."""
        rows, columns = shape
        left, right = (self._signs(f"{side}\0{name}", shape, self.bits, n) for side, n in (("u", rows), ("v", columns)))
        return Carriers(left, right)

    def _signs(self, what: str, shape: tuple[int, ...], count: int, width: int) -> Tensor:
        return signs([self.secret], what, shape, count, width)[0]


@dataclass(frozen=True)
class Carriers:
    """Patterns uᵢvᵢᵀ of one matrix: `left` (n, rows) and `right` (n, columns), signs, float32."""

    left: Tensor
    right: Tensor

    def correlations(self, weight: Tensor | LowRank) -> Tensor:
        """uᵢᵀ T vᵢ: (n,), float64."""
        if isinstance(weight, LowRank):
            products = (self.left @ weight.up.float()) * (self.right @ weight.down.float().T)
        else:
            products = (self.left @ weight.float()) * self.right
        return products.double().sum(1)

    def gram(self) -> Tensor:
        """⟨uᵢvᵢᵀ, uⱼvⱼᵀ⟩: (n, n), float64. Sums of fewer than 2²⁴ signs are exact."""
        return (self.left @ self.left.T).double() * (self.right @ self.right.T).double()

    def tangent_gram(self, update: LowRank) -> Tensor:
        """The same of their parts that a change of the factors at their rank can make: (n, n), float64.

        Orthogonal to these is what leaves both column spaces, (I − P_B) uvᵀ (I − P_A).
        """
        up, down = _spaces(update)
        left = self.left - (self.left @ up) @ up.T
        right = self.right - (self.right @ down) @ down.T
        return self.gram() - (left @ left.T).double() * (right @ right.T).double()

    def added(self, weight: Tensor, amounts: Tensor) -> Tensor:
        """T + rms(T) · Σ amountsᵢ uᵢvᵢᵀ, float32, for (n,) amounts."""
        pattern = (self.left.T * amounts.float()) @ self.right
        return weight.float() + rms(weight) * pattern

    def added_low_rank(self, update: LowRank, amounts: Tensor) -> LowRank:
        """BA + rms(BA) times the part of Σ amountsᵢ uᵢvᵢᵀ that `tangent_gram` is of, cut to the rank of BA."""
        up, down = _spaces(update)
        scaled = self.left.T * (amounts.float() * rms(update))
        inside = LowRank(up, (up.T @ scaled) @ self.right)
        outside = scaled @ (self.right @ down)
        rest = LowRank(outside - up @ (up.T @ outside), down.T)
        found = truncate(canonical(stack([update, inside, rest], [1.0, 1.0, 1.0])), update.rank).result.factors()
        return _padded(found, update.rank)


def signs(secrets: Sequence[bytes], what: str, shape: tuple[int, ...], count: int, width: int) -> Tensor:
    """(len(secrets), count, width) signs, float32: HMAC-SHA256 of what they are for, stretched by SHAKE-256.

    Those of a secret are the same among any others, and row i is the same for any count.
    """
    purpose = _DOMAIN + f"{what}\0{'x'.join(map(str, shape))}".encode()
    stride = -(-width // 8)
    seeds = (hmac.digest(secret, purpose, "sha256") for secret in secrets)
    stream = b"".join(hashlib.shake_256(seed).digest(count * stride) for seed in seeds)
    packed = np.frombuffer(stream, np.uint8).reshape(len(secrets), count, stride)
    found = np.unpackbits(packed, axis=2, count=width).astype(np.float32)
    found *= 2
    found -= 1
    return torch.from_numpy(found)


@dataclass
class Statistic:
    """s over matrices that come one by one."""

    bits: int
    total: Tensor = field(init=False)
    size: int = 0
    """D, weights looked at."""
    energy: float = 0.0
    """D, unless matrices are measured by something else than their own rms."""

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.bits, dtype=torch.float64)

    def add(self, carriers: Carriers, weight: Tensor | LowRank, scale: float | None = None) -> None:
        """Take one matrix into account, over `scale` instead of its own rms; nothing of a matrix that is zero.

        A difference of two models is measured by the weights that it is of: what differs by rounding alone says little.
        """
        own = rms(weight)
        by, count = own if scale is None else scale, weight.shape[0] * weight.shape[1]
        if own and by:
            self.total += carriers.correlations(weight) / by
            self.energy += (own / by) ** 2 * count
        self.size += count

    def values(self) -> Tensor:
        """s: (bits,), float64, of variance 1 for random signs."""
        return self.total / math.sqrt(self.energy) if self.energy else self.total


@dataclass(frozen=True)
class Reading:
    """How many of n bits agree with the key's, and what that says.

    The null hypothesis: the weights do not depend on the key, which is random; then k is Binomial(n, ½).
    """

    bits: int
    agreeing: int

    @classmethod
    def of(cls, statistic: Tensor, message: Tensor) -> Reading:
        """Of s and b; s = 0 counts as +1."""
        signs = torch.where(statistic >= 0, 1.0, -1.0)
        return cls(len(message), int((signs == message).sum()))

    @property
    def inverted(self) -> bool:
        """Whether more bits are inverted than right."""
        return 2 * self.agreeing < self.bits

    @property
    def strongest(self) -> int:
        """The bits that agree in the better polarity."""
        return max(self.agreeing, self.bits - self.agreeing)

    @property
    def accuracy(self) -> float:
        """Share of bits that agree, in the key's own polarity."""
        return self.agreeing / self.bits

    def p(self, hypotheses: int = 1) -> Fraction:
        """The exact probability of as many bits in either polarity, times `hypotheses`, at most 1."""
        return min(Fraction(1), tail(self.bits, self.strongest) * POLARITIES * hypotheses)


def tail(bits: int, least: int) -> Fraction:
    """P(Binomial(bits, ½) ≥ least), exact."""
    return Fraction(_ways(bits)[max(0, least)] if least <= bits else 0, 2**bits)


def threshold(bits: int, alpha: float, hypotheses: int = 1) -> int | None:
    """The fewest agreeing bits of probability ≤ alpha / hypotheses; None where not even all of them are enough."""
    allowed = Fraction(alpha) / hypotheses
    return next((least for least in range(bits + 1) if tail(bits, least) <= allowed), None)


def log10(p: Fraction) -> float:
    """Of an exact probability above 0, however small."""
    return math.log10(p.numerator) - math.log10(p.denominator)


@cache
def _ways(bits: int) -> list[int]:
    """Σ_{j ≥ k} C(bits, j) for k = 0 … bits."""
    sums, total = [0] * (bits + 1), 0
    for place in range(bits, -1, -1):
        total += math.comb(bits, place)
        sums[place] = total
    return sums


def lifts(statistic: Tensor, message: Tensor, gram: Tensor, margin: float) -> Tensor:
    """λ ≥ 0: (n,) float64, such that the change Σ λᵢbᵢCᵢ lifts every bᵢsᵢ to `margin` and is the smallest that does.

    `gram` is ⟨Cᵢ, Cⱼ⟩ (n, n), in the units of s. Gauss–Seidel on the dual (Hildreth 1957).

    Raises:
        ValueError: no change within the carriers' span reaches the margin.
    """
    signs = message.double()
    H, have = (gram * signs[:, None] * signs).numpy(), (signs * statistic).numpy()
    amounts, reached = np.zeros(len(have)), have.copy()
    for _ in range(_SWEEPS):
        for place in range(len(have)):
            step = max(-amounts[place], (margin - reached[place]) / max(H[place, place], 1e-30))
            amounts[place] += step
            reached += step * H[:, place]
        if reached.min() >= margin * (1 - _REACHED):
            return torch.from_numpy(amounts)
    raise ValueError(f"{len(have)} bits do not fit into these weights: take fewer bits")


def amounts(statistic: Tensor, message: Tensor, gram: Tensor, size: int, margin: float) -> Tensor:
    """What to give `Carriers.added` for every matrix: (n,) float64.

    `gram` is the sum of `Carriers.gram` over matrices, `size` D. The change adds to the rms that s is measured by, so
    that the target lies higher by √(1 + ρ²), ρ being the change relative to the weights.

    Raises:
        ValueError: as `lifts`.
    """
    target, root = margin, math.sqrt(size)
    signs = message.double()
    for _ in range(_ROUNDS):
        found = lifts(statistic, message, gram / size, target)
        change = relative_change(found * signs, gram, size)
        wanted = margin * math.sqrt(1 + change**2)
        if wanted <= target * (1 + _REACHED):
            break
        target = wanted
    return found * signs / root


def relative_change(signed: Tensor, gram: Tensor, size: int) -> float:
    """ρ = ‖Δ‖ / ‖T‖ of the change Σ signedᵢCᵢ / √D, both in units of each matrix's rms."""
    return math.sqrt(max(0.0, float(signed @ (gram / size) @ signed)) / size)


def marked_updates(key: MarkKey, updates: Mapping[str, LowRank], margin: float) -> dict[str, LowRank]:
    """Low-rank updates by name, changed as little as needed at their ranks, with every bᵢsᵢ ≥ `margin`.

    Cutting back to the rank undoes some of a step, so steps are repeated.

    Raises:
        ValueError: the bits do not fit at these ranks.
    """
    found, message = dict(updates), key.message()
    carriers = {name: key.carriers(name, update.shape) for name, update in found.items()}
    size = sum(math.prod(update.shape) for update in found.values())
    for _ in range(_ROUNDS):
        values = statistic_of(key, found).values()
        if float((values * message).min()) >= margin * (1 - _REACHED):
            return found
        gram = torch.stack([carriers[name].tangent_gram(update) for name, update in found.items()]).sum(0)
        step = amounts(values, message, gram, size, margin)
        found = {name: carriers[name].added_low_rank(update, step) for name, update in found.items()}
    raise ValueError(f"{key.bits} bits do not fit at these ranks: take fewer bits, a smaller margin, or a larger rank")


def statistic_of(key: MarkKey, weights: Mapping[str, Tensor | LowRank]) -> Statistic:
    """s of matrices by name."""
    found = Statistic(key.bits)
    for name, weight in weights.items():
        found.add(key.carriers(name, (weight.shape[0], weight.shape[1])), weight)
    return found


def rms(weight: Tensor | LowRank) -> float:
    """Root mean square of the entries of a matrix, or of a product of factors, which is not formed."""
    if isinstance(weight, LowRank):
        energy = max(0.0, inner(weight, weight))
        return math.sqrt(energy / math.prod(weight.shape))
    return float(weight.float().norm()) / math.sqrt(weight.numel())


def dithered(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Float values rounded to `dtype` at random, so that changes below a step survive on average.

    Rounding to nearest would undo most of a mark in bfloat16 weights, whose steps are larger than the mark.
    """
    facts = torch.finfo(dtype)
    if facts.bits >= 32:
        return values.to(dtype)
    exact = values.float()
    _, exponent = torch.frexp(exact)
    step = torch.ldexp(torch.full_like(exact, facts.eps), exponent - 1).clamp_min(facts.smallest_normal * facts.eps)
    steps = exact / step
    below = steps.trunc()
    further = torch.rand(exact.shape, generator=generator) < (steps - below).abs()
    return ((below + further * steps.sign()) * step).clamp(facts.min, facts.max).to(dtype)


def _spaces(update: LowRank) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the columns of `up` (rows, r) and of the rows of `down` (columns, r), float32."""
    form = canonical(update)
    return form.U.float(), form.V.float()


def _padded(update: LowRank, rank: int) -> LowRank:
    """Directions that were cut off as rounding come back as zeros, so that a file keeps its shapes."""
    missing = rank - update.rank
    if not missing:
        return update
    up = torch.nn.functional.pad(update.up, (0, missing))
    return LowRank(up, torch.nn.functional.pad(update.down, (0, 0, 0, missing)))


def smallest_margin(statistic: Tensor, message: Tensor) -> float:
    """min bᵢsᵢ: how far the weakest bit is from being read wrongly, in standard deviations of unmarked weights."""
    return float((statistic * message).min())
