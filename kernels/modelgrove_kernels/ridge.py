"""Kernel ridge regression in closed form: layer weights, the fit, and what it predicts without some rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_INTERCEPT = 1e3
_SWEEPS = 1000


@dataclass(frozen=True)
class KernelRidge:
    """f(x) = k(x, ·) @ dual + intercept: minimises Σ ‖f(xᵢ) − tᵢ‖² + λ‖f‖² with a free intercept.

    `dual` (n, d) and `intercept` (d,) are float64, `inverse` is (K + c·11ᵀ + λI)⁻¹ with a large c,
    which is how the intercept is left free.
    """

    dual: Tensor
    intercept: Tensor
    inverse: Tensor
    targets: Tensor

    def predict(self, kernel: Tensor) -> Tensor:
        """f at new points from their kernel values with the training points: (m, n) → (m, d)."""
        return kernel.double() @ self.dual + self.intercept

    def left_out(self, groups: Sequence[int]) -> Tensor:
        """Predictions (n, d) for the training points, each by a fit without all points of its group.

        Closed form: the residuals of a group S without S are (G_SS)⁻¹ (G t)_S, G the inverse.
        Equal numbers in `groups` (n,) are one group; all different is leave-one-out.
        """
        predicted = torch.empty_like(self.targets)
        labels = torch.as_tensor(groups)
        for group in set(groups):
            rows = torch.nonzero(labels == group).squeeze(1)
            block = self.inverse[rows][:, rows]
            predicted[rows] = self.targets[rows] - torch.linalg.solve(block, self.dual[rows])
        return predicted


def fit_ridge(kernel: Tensor, targets: Tensor, regulariser: float) -> KernelRidge:
    """Kernel ridge of `targets` (n, d) over the symmetric kernel matrix (n, n).

    Raises:
        ValueError: shapes do not fit, or the regulariser is not positive.
    """
    n = len(targets)
    if kernel.shape != (n, n) or regulariser <= 0:
        raise ValueError(f"kernel {tuple(kernel.shape)} for {n} targets, regulariser {regulariser}")
    kernel, targets = kernel.double(), targets.double()
    free = _INTERCEPT * float(kernel.diagonal().mean())
    inverse = torch.linalg.inv(kernel + free + regulariser * torch.eye(n, dtype=torch.float64))
    dual = inverse @ targets
    return KernelRidge(dual, free * dual.sum(0), inverse, targets)


def centred(kernel: Tensor) -> Tensor:
    """The kernel (…, n, n) of the points less their mean."""
    return kernel - kernel.mean(-1, keepdim=True) - kernel.mean(-2, keepdim=True) + kernel.mean((-2, -1), keepdim=True)


def align(kernels: Tensor, target: Tensor) -> Tensor:
    """Weights w ≥ 0 (l,), summing to one, whose Σ w_l K_l is nearest in direction to `target` (n, n).

    `kernels` is (l, n, n). All are centred first; diagonals do not count, because a point's
    likeness with itself says nothing. Cortes, Mohri & Rostamizadeh, JMLR 13 (2012), section 3.2.2,
    solved by coordinate descent. All zeros when no kernel is positively aligned.
    """
    off = ~torch.eye(target.shape[-1], dtype=torch.bool)
    rows = torch.stack([centred(kernel.double())[off] for kernel in kernels])
    products, wanted = rows @ rows.T, rows @ centred(target.double())[off]
    weights = torch.zeros_like(wanted)
    for _ in range(_SWEEPS):
        before = weights.clone()
        for i in torch.nonzero(products.diagonal() > 0).flatten().tolist():
            weights[i] = (weights[i] + (wanted[i] - products[i] @ weights) / products[i, i]).clamp(min=0)
        if torch.allclose(before, weights, rtol=1e-6, atol=0):
            break
    total = weights.sum()
    return weights / total if total > 0 else weights
