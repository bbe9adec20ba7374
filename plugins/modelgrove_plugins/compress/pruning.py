"""What pruning methods share: their parameter, a matrix of which some weights are kept, and a component's threshold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from modelgrove_hub.contracts import InputModel
from modelgrove_hub.errors import UsageError
from modelgrove_plugins.compress.packed import Stored, describe, matrix_of

if TYPE_CHECKING:
    from torch import Tensor

AUTO = "auto"


def shares_of(text: str) -> dict[str, float]:
    """ "0.35" → {"": 0.35}: every component; "unet=0.35,text_encoder=0.475" → those, and no other.

    Raises:
        ValueError: it is neither, or a share is not between 0 and 1.
    """
    shares = {}
    for part in text.split(","):
        name, named, number = part.rpartition("=")
        try:
            share = float(number)
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            raise ValueError(
                f"{part.strip()!r} is no share between 0 and 1, as in 0.35 or unet=0.35,text_encoder=0.475"
            )
        if (named and not name.strip()) or name.strip() in shares or (not named and "," in text):
            raise ValueError(f"{text!r}: name each component once, as in unet=0.35,text_encoder=0.475")
        shares[name.strip()] = share
    return shares


def _checked(text: str) -> str:
    if text != AUTO:
        shares_of(text)
    return text


Sparsity = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, int | float) else value),
    AfterValidator(_checked),
]
"""A share of weights, one for each component, or "auto"."""
SPARSITY = "Share of the weights that become zero, in (0, 1): 0.35, or unet=0.35,text_encoder=0.475."


def component_of(name: str) -> str:
    """ "unet/conv_in.weight" → "unet"; "" where the model is no folder of components."""
    return name.rpartition("/")[0]


def check_components(shares: Mapping[str, float], model: InputModel) -> None:
    """Raises UsageError: a component of `shares` is none of the model's."""
    found = {component_of(tensor.name) for tensor in model.tensors()}
    for name in shares:
        if name and name not in found:
            known = ", ".join(sorted(found - {""})) or "none: give one share without a name"
            raise UsageError(f"sparsity: {model.name} has no component {name!r}; its components are {known}")


def share_for(shares: Mapping[str, float], name: str) -> float:
    """Of a tensor's weights; 0 if its component is not pruned."""
    return shares.get("", shares.get(component_of(name), 0.0))


def keep(values: Tensor, mask: Tensor, remarks: Mapping[str, Any] | None = None) -> Stored:
    """`values` of two or more dimensions in layout `sparse`, where its packed matrix has `mask` (rows, columns).

    Raises:
        ValueError: a value is not finite.
    """
    import torch

    from modelgrove_kernels.layouts import sparse_parts

    if not bool(torch.isfinite(values).all()):
        raise ValueError("NaN or infinite values cannot be pruned")
    matrix = matrix_of(values) * mask
    parts = sparse_parts(matrix, values.dtype)
    stored = describe(
        values, parts, layout="sparse", bits=1, group=max(1, matrix.shape[1]), nonzero=len(parts["values"])
    )
    share = 1 - len(parts["values"]) / matrix.numel()
    return Stored(stored.entry, parts, {"sparsity": round(share, 4), **(remarks or {})})


def largest(scores: Tensor, sparsity: float) -> Tensor:
    """Which of `scores` (rows, n) are kept: in each row all but the `sparsity` share that is smallest."""
    import torch

    dropped = torch.argsort(scores, dim=1, stable=True)[:, : int(sparsity * scores.shape[1])]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, dropped, False)


def threshold(weights: Callable[[], Iterable[Tensor]], sparsity: float) -> float:
    """The |w| of which `sparsity` of all values are smaller, exactly, without holding more than one tensor.

    `weights` gives the tensors, twice: the floats' bit patterns (which order as their magnitudes do) are counted by
    their upper 16 bits, then by the lower 16 of those that share the upper half found. At most the share is smaller;
    less where many values are equal.
    """
    import torch

    def counted(bits: Tensor) -> Tensor:
        return torch.bincount(bits.long(), minlength=1 << 16)

    def patterns() -> Iterable[Tensor]:
        return (tensor.float().abs().flatten().view(torch.int32) for tensor in weights())

    upper = torch.zeros(1 << 16, dtype=torch.long)
    for bits in patterns():
        upper += counted(bits >> 16)
    place = int(sparsity * int(upper.sum()))
    high, before = _bin(upper, place)
    lower = torch.zeros_like(upper)
    for bits in patterns():
        lower += counted(bits[bits >> 16 == high] & 0xFFFF)
    low, _ = _bin(lower, place - before)
    return float(torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32))


def _bin(counts: Tensor, place: int) -> tuple[int, int]:
    """The bin of the value that has `place` values before it, and how many lie in the bins before that."""
    import torch

    ends = counts.cumsum(0)
    found = int(torch.searchsorted(ends, place, right=True))
    return found, int(ends[found] - counts[found])
