"""The methods beside LoRA: their parts → exact factors where those are small, else a matrix.

LoHa (Hyeon-Woo et al., arXiv 2108.06098), LoKr, GLoRA and (IA)³ as LyCORIS writes them, DoRA (arXiv 2402.09353) as
LyCORIS and PEFT do. Formulas that are more than a line are those of the package lycoris-lora.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from modelgrove_hub.contracts import LazyTensor
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.adapter_keys import Key
from modelgrove_hub.formats.adapter_scale import Scaling
from modelgrove_hub.formats.adapters import FLOATS, Factors, check_factor, check_finite, read_alpha, read_finite

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_hub.formats.updates import Update

MOST_ENTRIES = 2**28
"""Of a product of factors, which a small file may declare to be huge; the largest layers have 2²⁶."""

Parts = Mapping[str, LazyTensor]
"""Part of the formula → tensor."""


@dataclass(frozen=True)
class Change:
    """An `updates.Update` that is computed from a few tensors."""

    module: str
    component: str
    parameter: str
    restored: bool
    kernel: tuple[int, ...]
    shape: tuple[int, int] | None
    method: str
    compute: Callable[[Tensor | None], Tensor | tuple[Tensor, Tensor]]
    """The base's weight → the matrix, or (up, down)."""
    needs_weight: bool = False

    def read(self, weight: Tensor | None = None) -> Factors | Tensor:
        """See `updates.Update`."""
        found = self.compute(weight)
        place = f"module {self.module}, the product of a {self.method} adapter's parts"
        if isinstance(found, tuple):
            up, down = (check_finite(factor, place) for factor in found)
            return Factors(self.module, self.component, self.kernel, down, up, self.restored)
        return check_finite(found, place)

    @classmethod
    def of(
        cls, key: Key, method: str, shape: tuple[int, int] | None, kernel: tuple[int, ...],
        compute: Callable[[Tensor | None], Tensor | tuple[Tensor, Tensor]], *, parameter: str = "weight",
        needs_weight: bool = False,
    ) -> Change:  # fmt: skip
        """An update of the module that `key` names.

        Raises:
            DataError: its matrix would be too large.
        """
        if shape is not None and prod(shape) > MOST_ENTRIES:
            raise DataError(
                f"module {key.module}: a {method} of {shape[0]} × {shape[1]} numbers, at most {MOST_ENTRIES} are read"
            )
        return cls(key.module, key.component, parameter, key.restored, kernel, shape, method, compute, needs_weight)

    @classmethod
    def vector(cls, key: Key, parameter: str, method: str, tensor: LazyTensor, scale: float = 1.0) -> Change:
        """A difference of a bias or of a norm's weight, (1, n)."""
        size = prod(tensor.shape)
        if tensor.dtype not in FLOATS or size == 0:
            raise DataError(f"tensor {tensor.name} is {tensor.dtype} {tensor.shape}: no difference of a vector")
        return cls.of(
            key, method, (1, size), (), lambda _: read_finite(tensor, scale).reshape(1, size), parameter=parameter
        )

    @classmethod
    def difference(cls, key: Key, parameter: str, tensor: LazyTensor) -> Change:
        """A whole difference of a weight."""
        check_factor(tensor)
        shape = (tensor.shape[0], prod(tensor.shape[1:]))
        return cls.of(
            key, "diff", shape, tensor.shape[2:], lambda _: read_finite(tensor).flatten(1), parameter=parameter
        )

    @classmethod
    def value(cls, key: Key, tensor: LazyTensor) -> Change:
        """A weight that takes the place of the base's."""
        check_factor(tensor)
        shape = (tensor.shape[0], prod(tensor.shape[1:]))

        def compute(weight: Tensor | None) -> Tensor:
            return read_finite(tensor).flatten(1) - fitting(weight, shape, tensor)

        return cls.of(key, "diff", shape, tensor.shape[2:], compute, needs_weight=True)


def read_hadamard(key: Key, parts: Parts, scaling: Scaling) -> Change:
    """LoHa: (w1_a · w1_b) ∘ (w2_a · w2_b) · alpha / rank, of rank r² by the Khatri–Rao product; Tucker cores: a matrix.

    Raises:
        DataError: a part is missing, or the shapes are not those of a LoHa.
    """
    from modelgrove_hub.formats.naming import adapter_names

    kind = next(kind for kind in adapter_names().kinds if kind.name == "loha")
    wanted = ("w1_a", "w1_b", "w2_a", "w2_b")
    if missing := [suffix for suffix, part in kind.core.items() if part not in parts]:
        raise DataError(f"module {key.module} of a LoHa lacks {', '.join(missing)}")
    factors = [parts[part] for part in wanted]
    cores = [parts[core] for core in ("t1", "t2") if core in parts]
    for tensor in (*factors, *cores):
        check_factor(tensor)
    (a1, b1, a2, b2), shown = [tensor.shape for tensor in factors], ", ".join(str(tensor.shape) for tensor in factors)
    alpha = read_alpha(parts["alpha"]) if "alpha" in parts else None
    if cores:
        return _tucker_hadamard(key, factors, cores, scaling.scale(key.component, key.module, a1[0], alpha))
    if len(a1) != 2 or len(b1) < 2 or a1 != a2 or b1 != b2 or b1[0] != a1[1]:
        raise DataError(f"module {key.module}: {shown} are not the shapes of a LoHa's factors")
    (out, rank), width, kernel = a1, prod(b1[1:]), b1[2:]
    scale = scaling.scale(key.component, key.module, rank, alpha)

    def compute(_: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        up1, down1, up2, down2 = (read_finite(tensor).flatten(1) for tensor in factors)
        if rank * rank >= min(out, width):
            return (up1 @ down1) * (up2 @ down2) * scale
        up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
        return up * scale, (down1[:, None, :] * down2[None, :, :]).flatten(0, 1)

    return Change.of(key, "loha", (out, width), kernel, compute)


def _tucker_hadamard(key: Key, factors: list[LazyTensor], cores: list[LazyTensor], scale: float) -> Change:
    """LoHa of a convolution: each half is t ×₁ w_a ×₂ w_b, with w_a (r, out), w_b (r, in) and t (r, r, *kernel)."""
    (rank, out), (_, width), kernel = factors[0].shape, factors[1].shape, cores[0].shape[2:]
    fits = all(tensor.shape == (rank, out) for tensor in factors[::2]) and all(
        tensor.shape == (rank, width) for tensor in factors[1::2]
    )
    if len(cores) != 2 or not fits or any(core.shape != (rank, rank, *kernel) for core in cores):
        shown = ", ".join(str(tensor.shape) for tensor in (*factors, *cores))
        raise DataError(f"module {key.module}: {shown} are not the shapes of a LoHa with Tucker cores")

    def compute(_: Tensor | None) -> Tensor:
        w1_a, w1_b, w2_a, w2_b = map(read_finite, factors)
        halves = [
            _tucker(read_finite(core), a, b) for core, a, b in zip(cores, (w1_a, w2_a), (w1_b, w2_b), strict=True)
        ]
        return halves[0] * halves[1] * scale

    return Change.of(key, "loha", (out, width * prod(kernel)), kernel, compute)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """t (r, s, *kernel), a (r, out), b (s, in) → (out, in·kernel)."""
    import torch

    return torch.einsum("rs...,rp,sq->pq...", core, a, b).flatten(1)


def read_kronecker(key: Key, parts: Parts, scaling: Scaling) -> Change:
    """LoKr: w1 ⊗ w2 · alpha / rank, where either may be a product of two, and w2 a Tucker product.

    kron(w1, a·b) = kron(w1, a) · kron(I, b), and kron(a·b, w2) = kron(a, w2) · kron(b, I): exact factors.

    Raises:
        DataError: a part is missing, or the shapes are not those of a LoKr.
    """
    for tensor in parts.values():
        if tensor is not parts.get("alpha"):
            check_factor(tensor)
    first, second = _half(key, parts, "w1"), _half(key, parts, "w2")
    rows, columns = first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]
    rank = second.rank or first.rank
    alpha = read_alpha(parts["alpha"]) if "alpha" in parts else None
    # Where both halves are whole, LyCORIS trains with alpha = rank.
    scale = scaling.scale(key.component, key.module, rank, alpha if rank else None)

    def compute(_: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        import torch

        (a1, b1), (a2, b2) = first.read(), second.read()
        if a1.shape[1] * a2.shape[1] >= min(rows, columns):
            return torch.kron((a1 @ b1).contiguous(), (a2 @ b2).contiguous()) * scale
        return torch.kron(a1.contiguous(), a2.contiguous()) * scale, torch.kron(b1.contiguous(), b2.contiguous())

    return Change.of(key, "lokr", (rows, columns), second.kernel, compute)


@dataclass(frozen=True)
class _Half:
    """One side of a Kronecker product as (m, n) = a · b; a whole matrix is itself times I."""

    shape: tuple[int, int]
    kernel: tuple[int, ...]
    rank: int | None
    """None of a whole matrix."""
    read: Callable[[], tuple[Tensor, Tensor]]


def _half(key: Key, parts: Parts, name: str) -> _Half:
    whole, a, b, core = (parts.get(part) for part in (name, f"{name}_a", f"{name}_b", f"{name.replace('w', 't')}"))
    if whole is not None and a is None and b is None:
        shape, tensor = (whole.shape[0], prod(whole.shape[1:])), whole
        return _Half(shape, whole.shape[2:], None, lambda: _with_identity(read_finite(tensor).flatten(1)))
    if whole is not None or a is None or b is None:
        raise DataError(f"module {key.module} of a LoKr has neither {name} nor both of {name}_a and {name}_b")
    factors = a, b
    if core is not None:
        (rank, rows), width, kernel, middle = a.shape, b.shape[1], core.shape[2:], core
        if len(a.shape) != 2 or b.shape != (rank, width) or core.shape != (rank, rank, *kernel):
            raise DataError(f"module {key.module}: {a.shape}, {b.shape} and {core.shape} are no Tucker product")
        return _Half(
            (rows, width * prod(kernel)), kernel, rank,
            lambda: (read_finite(factors[0]).T, _tucker_rows(read_finite(middle), read_finite(factors[1]))),
        )  # fmt: skip
    if len(a.shape) != 2 or a.shape[1] != b.shape[0]:
        raise DataError(f"module {key.module}: {a.shape} and {b.shape} are no factors of a matrix")
    return _Half(
        (a.shape[0], prod(b.shape[1:])), b.shape[2:], b.shape[0],
        lambda: (read_finite(factors[0]), read_finite(factors[1]).flatten(1)),
    )  # fmt: skip


def _with_identity(matrix: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    rows, columns = matrix.shape
    return (matrix, torch.eye(columns)) if columns <= rows else (torch.eye(rows), matrix)


def _tucker_rows(core: Tensor, b: Tensor) -> Tensor:
    """t (r, s, *kernel), b (s, in) → (r, in·kernel)."""
    import torch

    return torch.einsum("rs...,sq->rq...", core, b).flatten(1)


def read_glora(key: Key, parts: Parts, scaling: Scaling) -> Change:
    """GLoRA (Chavan et al., arXiv 2306.07967) as LyCORIS writes it: (W ×_in a1·a2 + b1·b2) · alpha / rank.

    a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in, *kernel); in older files the names of each pair
    are the other way round.

    Raises:
        DataError: a part is missing, or the shapes are not those of a GLoRA.
        UsageError: there is a Tucker core.
    """
    if "mid" in parts:
        raise UsageError(
            f"tensor {parts['mid'].name} is a GLoRA's Tucker core, which is not understood: merge it into its base "
            "with LyCORIS"
        )
    if missing := [name for name in ("a1", "a2", "b1", "b2") if name not in parts]:
        raise DataError(f"module {key.module} of a GLoRA lacks {', '.join(f'.{name}.weight' for name in missing)}")
    pairs = [(parts["a1"], parts["a2"]), (parts["b1"], parts["b2"])]
    for tensor in (*pairs[0], *pairs[1]):
        check_factor(tensor)
    if not _glora_fits(pairs):
        pairs = [(second, first) for first, second in pairs]
    if not _glora_fits(pairs):
        shown = ", ".join(f"{name} {parts[name].shape}" for name in ("a1", "a2", "b1", "b2"))
        raise DataError(f"module {key.module}: {shown} are not the shapes of a GLoRA's factors")
    (a1, a2), (b1, b2) = pairs
    (width, rank), out, kernel = a1.shape[:2], b1.shape[0], b2.shape[2:]
    alpha = read_alpha(parts["alpha"]) if "alpha" in parts else None
    scale = scaling.scale(key.component, key.module, rank, alpha)
    shape = (out, width * prod(kernel))

    def compute(weight: Tensor | None) -> Tensor:
        base = fitting(weight, shape, a1)
        inputs, outputs = (read_finite(tensor).flatten(1) for tensor in (a1, b1))
        turned = base.view(out, width, -1).transpose(1, 2) @ inputs @ read_finite(a2).flatten(1)
        added: Tensor = turned.transpose(1, 2).reshape(shape) + outputs @ read_finite(b2).flatten(1)
        return added * scale

    return Change.of(key, "glora", shape, kernel, compute, needs_weight=True)


def _glora_fits(pairs: list[tuple[LazyTensor, LazyTensor]]) -> bool:
    (a1, a2), (b1, b2) = ([tensor.shape for tensor in pair] for pair in pairs)
    points = all(size == 1 for shape in (a1, a2, b1) for size in shape[2:])
    return points and a1[1] == a2[0] == b1[1] == b2[0] and a1[0] == a2[1] == b2[1]


def read_ia3(key: Key, parts: Parts, _: Scaling) -> Change:
    """(IA)³: rows or columns of W are scaled. LyCORIS stores the change of the factor, PEFT the factor itself.

    Raises:
        DataError: there is no vector, or the weight is not of its size.
    """
    vector, flag = parts.get("vector"), parts.get("flag")
    if vector is None or vector.dtype not in FLOATS or prod(vector.shape) != max(vector.shape, default=0):
        raise DataError(f"module {key.module} of an (IA)³ has no vector")
    # PEFT's is (out, 1) or (1, in); LyCORIS's lies along the input if `on_input` says so.
    factors = flag is None
    on_input = vector.shape[0] == 1 if factors else bool(read_alpha(flag)) if flag else False
    size, tensor = prod(vector.shape), vector

    def compute(weight: Tensor | None) -> Tensor:
        change = read_finite(tensor).flatten() - (1.0 if factors else 0.0)
        if not on_input:
            return fitting(weight, (size, None), tensor) * change[:, None]
        base = fitting(weight, (None, None), tensor)
        if base.shape[1] % size:
            raise DataError(f"tensor {tensor.name} has {size} numbers, the base's weight {base.shape[1]} columns")
        return base * change.repeat_interleave(base.shape[1] // size)

    return Change.of(key, "ia3", None, (), compute, needs_weight=True)


def read_magnitude(update: Update, magnitude: LazyTensor) -> Change:
    """DoRA: m · (W + X) / ‖W + X‖ − W, norms by row, or by input column if that is how m lies.

    Raises:
        DataError: m is no vector of the module's size.
    """
    size = prod(magnitude.shape)
    if magnitude.dtype not in FLOATS or size == 0 or size != max(magnitude.shape):
        raise DataError(f"tensor {magnitude.name} {magnitude.shape} is no vector of magnitudes")
    # (out, 1, …), (out,) and PEFT's (1, out, 1, 1) of convolutions are rows; (1, in) and (1, in, 1, 1) columns.
    peft = "lora_magnitude_vector" in magnitude.key
    by_column = not peft and len(magnitude.shape) > 1 and magnitude.shape[0] == 1 and size > 1
    kernel = prod(update.kernel)

    def compute(weight: Tensor | None) -> Tensor:
        found = update.read(weight)
        added = found.up @ found.down if isinstance(found, Factors) else found
        base = fitting(weight, (added.shape[0], added.shape[1]), magnitude)
        m = read_finite(magnitude).flatten()
        whole = base + added
        columns = whole.view(whole.shape[0], -1, kernel)
        if size != (columns.shape[1] if by_column else len(whole)):
            raise DataError(f"tensor {magnitude.name} has {size} magnitudes, the base's weight is {tuple(base.shape)}")
        norms = columns.norm(dim=(0, 2), keepdim=True) if by_column else columns.norm(dim=(1, 2), keepdim=True)
        scaled: Tensor = columns / norms * (m.view(1, -1, 1) if by_column else m.view(-1, 1, 1))
        return scaled.reshape(whole.shape) - base

    return Change(
        update.module, update.component, update.parameter, update.restored, update.kernel, update.shape, "dora",
        compute, needs_weight=True,
    )  # fmt: skip


def fitting(weight: Tensor | None, shape: tuple[int | None, int | None], tensor: LazyTensor) -> Tensor:
    """The base's weight (out, in·kernel), float32, if it has the shape, as far as that is known."""
    found = () if weight is None else tuple(weight.shape)
    fits = len(found) == 2 and all(wanted in (None, size) for wanted, size in zip(shape, found, strict=True))
    if weight is None or not fits:
        raise DataError(f"tensor {tensor.name} is for a weight of {shape}, the base's is {found}")
    return weight.float()
