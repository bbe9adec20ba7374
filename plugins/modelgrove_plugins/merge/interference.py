"""Sums up over all modules how adapters get in each other's way: one row a pair.

The crosstalk of b on a is ‖Δ_b V_a S_a‖ / ‖Δ_a V_a S_a‖ over all modules that a changes: how much
b answers to the inputs that a was made for, as a share of a's own answer, at weights of one. The
overlaps are means over the modules that both change, beside the chance level of random subspaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelgrove_kernels.lowrank import Canonical

_WORST = 3


class PairTable:
    """Accumulates the measures of every pair of adapters, module by module."""

    def __init__(self, names: Sequence[str]) -> None:
        import torch

        n = len(names)
        self._names = names
        self._inner, self._echo, self._inputs, self._outputs, self._shared = torch.zeros(5, n, n, dtype=torch.float64)
        self._chance_in, self._chance_out = torch.zeros(2, n, n, dtype=torch.float64)
        self._own = torch.zeros(n, dtype=torch.float64)
        self._worst: dict[tuple[int, int], list[tuple[float, str]]] = {}

    def add(
        self, module: str, places: Sequence[int], readers: Sequence[Canonical], updates: Sequence[Canonical],
        shape: tuple[int, int],
    ) -> None:  # fmt: skip
        """Take in one module (out, in·kernel), whose updates are given in any common coordinates.

        `updates` act on the inputs that `readers`, the adapters as they were, stand for.
        """
        import torch

        from modelgrove_kernels.subspace import echoes, relations

        found = relations(updates)
        echo = (found.echo if readers is updates else echoes(readers, updates)).double()
        # ‖X V S‖ = ‖U S²‖
        own = torch.stack([reader.S.double().pow(4).sum() for reader in readers]).sqrt()
        rows = torch.tensor(places)
        at = rows[:, None], rows[None, :]
        ranks = torch.tensor([max(update.rank, 1) for update in updates], dtype=torch.float64)
        larger = torch.maximum(ranks[:, None], ranks)
        self._inner[at] += found.inner.double()
        self._echo[at] += echo.square()
        self._own[rows] += own.square()
        self._inputs[at] += found.input_overlap.double()
        self._outputs[at] += found.output_overlap.double()
        self._chance_in[at] += (larger / shape[1]).clamp_max(1)
        self._chance_out[at] += (larger / shape[0]).clamp_max(1)
        self._shared[at] += 1
        self._note_worst(module, places, echo / own[:, None].clamp_min(torch.finfo(torch.float64).tiny))

    def rows(self) -> list[dict[str, Any]]:
        """One row a pair of adapters, as JSON values."""
        n = len(self._names)
        return [self._row(i, j) for i in range(n) for j in range(i + 1, n)]

    def _row(self, i: int, j: int) -> dict[str, Any]:
        shared = int(self._shared[i, j])
        norms = float((self._inner[i, i] * self._inner[j, j]).sqrt())
        worst = sorted(self._worst.get((i, j), []) + self._worst.get((j, i), []), reverse=True)[:_WORST]
        return {
            "a": self._names[i],
            "b": self._names[j],
            "shared_modules": shared,
            "cosine": rounded(float(self._inner[i, j]) / norms if norms else 0.0),
            "input_overlap": self._mean(self._inputs, i, j),
            "input_chance": self._mean(self._chance_in, i, j),
            "output_overlap": self._mean(self._outputs, i, j),
            "output_chance": self._mean(self._chance_out, i, j),
            "crosstalk_of_b_on_a": self._crosstalk(i, j),
            "crosstalk_of_a_on_b": self._crosstalk(j, i),
            "worst_modules": {module: rounded(value) for value, module in worst},
        }

    def _crosstalk(self, i: int, j: int) -> float:
        own = float(self._own[i])
        return rounded((float(self._echo[i, j]) / own) ** 0.5 if own else 0.0)

    def _mean(self, sums: Any, i: int, j: int) -> float:
        shared = float(self._shared[i, j])
        return rounded(float(sums[i, j]) / shared if shared else 0.0)

    def _note_worst(self, module: str, places: Sequence[int], shares: Any) -> None:
        for row, i in enumerate(places):
            for column, j in enumerate(places):
                if i != j:
                    entries = [*self._worst.get((i, j), []), (float(shares[row, column]), module)]
                    self._worst[i, j] = sorted(entries, reverse=True)[:_WORST]


def rounded(value: float, digits: int = 4) -> float:
    """For reports: `value` to so many digits."""
    return float(f"{value:.{digits}g}")
