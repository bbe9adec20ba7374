"""Adapters that rotate weights: OFT (Qiu et al., arXiv 2306.07280) and BOFT (Liu et al., arXiv 2311.06243).

LyCORIS rotates the output side of a weight, PEFT the input side, with other numbers in their files.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt, prod
from typing import TYPE_CHECKING

from modelgrove_hub.contracts import LazyTensor
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.adapter_keys import Key
from modelgrove_hub.formats.adapter_scale import Rotation, Scaling
from modelgrove_hub.formats.adapters import check_factor, read_alpha, read_finite
from modelgrove_hub.formats.lycoris import Change, fitting

if TYPE_CHECKING:
    from torch import Tensor

Parts = Mapping[str, LazyTensor]
"""Part of the formula → tensor."""


def read_rotation(key: Key, parts: Parts, scaling: Scaling) -> Change:
    """OFT of PEFT (a rotation of the input side), or OFT and BOFT of LyCORIS (of the output side).

    Raises:
        DataError: the tensors are not those of an OFT, or the weight is not of their size.
        UsageError: an OFT of PEFT comes without its configuration.
    """
    rotation = parts.get("rotation")
    if rotation is not None and rotation.key.endswith(".weight"):
        return _read_oft(key, rotation, scaling)
    return _read_output_rotation(key, parts)


def _read_output_rotation(key: Key, parts: Parts) -> Change:
    """Blocks (k, b, b), or (m, k, b, b) of butterfly stages, rotate the output side.

    ΔW = (R − I) · W with R by Cayley's transform of the blocks' skew parts, bounded by the constraint `alpha` · out;
    `rescale` then scales the rows.

    Raises:
        DataError: there are no such blocks, or the weight is not of their size.
    """
    blocks, rescale = parts.get("blocks"), parts.get("scale")
    if blocks is None or len(blocks.shape) not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
        raise DataError(
            f"module {key.module}: an OFT without oft_blocks of square matrices is not understood; "
            "merge it into its base with the tool that wrote it"
        )
    check_factor(blocks)
    out = blocks.shape[-3] * blocks.shape[-1]
    constraint = read_alpha(parts["alpha"]) * out if "alpha" in parts else 0.0
    butterfly = len(blocks.shape) == 4
    tensor = blocks

    def compute(weight: Tensor | None) -> Tensor:
        from lycoris.functional import boft, diag_oft

        base = fitting(weight, (out, None), tensor)
        scale = None if rescale is None else read_finite(rescale).reshape(out, 1)
        method = boft if butterfly else diag_oft
        found: Tensor = method.diff_weight(base, read_finite(tensor), scale, constraint=constraint, backend="torch")
        return found

    return Change.of(key, "boft" if butterfly else "oft", None, (), compute, needs_weight=True)


def _read_oft(key: Key, rotation: LazyTensor, scaling: Scaling) -> Change:
    """PEFT's OFT: W · diag(R₁ … R_k)ᵀ, from the entries (k, b(b−1)/2) above the diagonals of skew matrices Qᵢ."""
    config = scaling.rotation(key.component)
    if config is None:
        raise UsageError(
            f"tensor {rotation.name} is of PEFT's OFT, and only its adapter_config.json says how it rotates: "
            "put it beside the file"
        )
    check_factor(rotation)
    numbers = rotation.shape[1]
    side = (1 + isqrt(1 + 8 * numbers)) // 2
    if len(rotation.shape) != 2 or side * (side - 1) // 2 != numbers:
        raise DataError(f"tensor {rotation.name} {rotation.shape} does not hold the upper halves of square matrices")
    columns = None if config.block_share else rotation.shape[0] * side

    def compute(weight: Tensor | None) -> Tensor:
        base = fitting(weight, (None, columns), rotation)
        if base.shape[1] % side:
            raise DataError(
                f"tensor {rotation.name} is of blocks of {side}, the base's weight has {base.shape[1]} columns"
            )
        return _turned(base, _cayley_series(_skew(read_finite(rotation), side, config), config)) - base

    return Change.of(key, "oft", None, (), compute, needs_weight=True)


def read_butterfly(key: Key, parts: Parts, _: Scaling) -> Change:
    """PEFT's BOFT: s ∘ (W · diag(R₁ … R_k)ᵀ) with R by Cayley's transform of the skew parts of boft_R (1, k, b, b).

    Raises:
        DataError: the tensors are not those of a BOFT, or the weight is not of their size.
        UsageError: there are several butterfly stages.
    """
    blocks, scale = parts.get("rotation"), parts.get("scale")
    if blocks is None or scale is None:
        raise DataError(f"module {key.module} of a BOFT lacks {'boft_R' if blocks is None else 'boft_s'}")
    for tensor in (blocks, scale):
        check_factor(tensor)
    if len(blocks.shape) != 4 or blocks.shape[-1] != blocks.shape[-2] or max(scale.shape) != prod(scale.shape):
        raise DataError(f"module {key.module}: {blocks.shape} and {scale.shape} are not the shapes of a BOFT")
    stages, count, side, _side = blocks.shape
    if stages != 1:
        raise UsageError(
            f"tensor {blocks.name} has {stages} butterfly stages, of which only one is understood: merge the adapter "
            "into its base with PEFT (merge_and_unload)"
        )

    def compute(weight: Tensor | None) -> Tensor:
        import torch

        base = fitting(weight, (prod(scale.shape), count * side), blocks)
        entries = read_finite(blocks)[0]
        skew, one = (entries - entries.mT) / 2, torch.eye(side)
        turns = torch.linalg.solve(one + skew, one - skew, left=False)
        return _turned(base, turns) * read_finite(scale).reshape(-1, 1) - base

    return Change.of(key, "boft", None, (), compute, needs_weight=True)


def _turned(weight: Tensor, turns: Tensor) -> Tensor:
    """W (out, k·b) · diag(Rᵢ)ᵀ, for R (k, b, b), or (1, b, b) for all blocks."""
    blocks = weight.view(weight.shape[0], -1, turns.shape[-1]).transpose(0, 1)  # (k, out, b)
    found: Tensor = (blocks @ turns.mT).transpose(0, 1).reshape(weight.shape)
    return found


def _skew(entries: Tensor, side: int, config: Rotation) -> Tensor:
    """(k, b(b−1)/2) → skew matrices (k, b, b); those of a constrained OFT are no longer than eps / √k."""
    import torch

    upper = entries.new_zeros(entries.shape[0], side, side)
    rows, columns = torch.triu_indices(side, side, 1)
    upper[:, rows, columns] = entries
    skew = upper - upper.mT
    if config.coft:
        longest = config.eps / len(entries) ** 0.5
        norms = skew.norm(dim=(1, 2), keepdim=True)
        skew = torch.where(norms <= longest, skew, longest * skew / norms)
    return skew


def _cayley_series(skew: Tensor, config: Rotation) -> Tensor:
    """(I − Q)(I + Q)⁻¹ in PEFT's sign: exactly, or I + 2Q + 2Q² + … + Qⁿ as PEFT ≥ 0.18 cuts the series of 2Q off."""
    import torch

    one = torch.eye(skew.shape[-1]).expand_as(skew)
    if not config.use_cayley_neumann:
        exact: Tensor = torch.linalg.solve(one + skew, one - skew, left=False)
        return exact
    terms = config.num_cayley_neumann_terms
    last = {1: 0, 2: 1}.get(terms, max(terms - 1, 3))
    found, power = one.clone(), one
    for exponent in range(1, last + 1):
        power = power @ skew
        found += power if exponent == last and terms > 2 else 2 * power
    return found
