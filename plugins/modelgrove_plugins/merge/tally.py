"""What a merge of adapters reports: sums over all modules."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modelgrove_plugins.merge.alignment import Alignment, Site
from modelgrove_plugins.merge.combining import Combined
from modelgrove_plugins.merge.interference import PairTable, rounded

if TYPE_CHECKING:
    from modelgrove_kernels.lowrank import Merged


@dataclass
class Tally:
    """Takes in one module after another."""

    names: Sequence[str]
    before: PairTable = field(init=False)
    after: PairTable = field(init=False)
    separated: bool = False
    """Whether the method changed the updates one by one."""
    squares: list[defaultdict[str, float]] = field(init=False)
    """For each adapter: sums over its modules."""
    modules: list[dict[str, Any]] = field(default_factory=list)
    norm: float = 0.0
    lost: float = 0.0
    total: float = 0.0
    away: float = 0.0
    """Squared norms: of the result, of what truncation cut off, of the exact sum, of the way from it to the result."""

    def __post_init__(self) -> None:
        self.before, self.after = PairTable(self.names), PairTable(self.names)
        self.squares = [defaultdict(float) for _ in self.names]

    def add(self, site: Site, combined: Combined, merged: Merged | None = None) -> None:
        """Note a module: what its adapters are, what the method made of them, and what truncation cut off, if any."""
        from modelgrove_kernels.subspace import directions

        parts = combined.parts
        self.before.add(site.name, parts.places, parts.forms, parts.forms, site.shape)
        if combined.changed is not None:
            self.separated = True
            changed = [directions(update) for update in combined.changed]
            self.after.add(site.name, parts.places, parts.forms, changed, site.shape)
        self._note_adapters(combined)
        square = float(combined.result.square().sum())
        self.norm += square
        if merged is not None:
            self.lost += square * merged.error**2
            row = {"module": site.name, "adapters": len(parts.places), "rank": merged.result.rank}
            self.modules.append({**row, "error": rounded(merged.error, 3)})
        exact = parts.total()
        self.total += float(exact.square().sum())
        self.away += float((combined.result - exact).square().sum())

    def _note_adapters(self, combined: Combined) -> None:
        from modelgrove_kernels.subspace import entropy_rank

        parts = combined.parts
        for number, (place, form, weight) in enumerate(zip(parts.places, parts.forms, parts.weights, strict=True)):
            # What the result and the adapter answer to the inputs V·S that the adapter was made for.
            answer, own = combined.result @ (form.V * form.S), weight * (form.U * form.S.square())
            found = {
                "modules": 1,
                "norm": form.norm**2,
                "rank": form.rank,
                "entropy_rank": entropy_rank(form.S),
                "answer": float(own.square().sum()),
                "damage": float((answer - own).square().sum()),
            }
            if combined.changed is None:
                found |= {"kept": found["norm"], "along": found["norm"]}
            else:
                kept = combined.changed[number]
                found |= {"kept": float(kept.square().sum()), "along": float((kept * parts.updates[number]).sum())}
            for name, value in found.items():
                self.squares[place][name] += value

    def report(self, alignment: Alignment, weights: Sequence[float]) -> dict[str, Any]:
        """All of it as JSON values."""
        adapters = [
            self._adapter_row(name, weight, sums)
            for name, weight, sums in zip(self.names, weights, self.squares, strict=True)
        ]
        warnings = [*alignment.warnings, *(_loss(row) for row in adapters if row.get("energy_kept", 1.0) < 0.5)]
        independent = sum(weight**2 * sums["norm"] for weight, sums in zip(weights, self.squares, strict=True))
        report: dict[str, Any] = {
            "relative_error": rounded((self.lost / self.norm) ** 0.5 if self.norm else 0.0, 3),
            "distance_from_sum": rounded((self.away / self.total) ** 0.5 if self.total else 0.0),
            "norm": rounded(self.norm**0.5, 5),
            "norm_if_independent": rounded(math.sqrt(independent), 5),
            "warnings": warnings,
            "coverage": alignment.coverage(),
            "adapters": adapters,
            "pairs": self.before.rows(),
        }
        if self.separated:
            report["pairs_after"] = self.after.rows()
        return {**report, "modules": self.modules}

    def _adapter_row(self, name: str, weight: float, sums: Mapping[str, float]) -> dict[str, Any]:
        row: dict[str, Any] = {
            "name": name,
            "weight": weight,
            "modules": int(sums["modules"]),
            "norm": rounded(sums["norm"] ** 0.5, 5),
            "effective_rank": round(sums["rank"] / max(sums["modules"], 1), 2),
            "entropy_rank": round(sums["entropy_rank"] / max(sums["modules"], 1), 2),
            "damage": rounded((sums["damage"] / sums["answer"]) ** 0.5 if sums["answer"] else 0.0),
        }
        if self.separated:
            row["energy_kept"] = rounded(sums["kept"] / sums["norm"] if sums["norm"] else 1.0)
            length = (sums["kept"] * sums["norm"]) ** 0.5
            row["cosine_with_original"] = rounded(sums["along"] / length if length else 0.0)
        return row


def _loss(row: Mapping[str, Any]) -> str:
    return f"{row['name']} keeps only {row['energy_kept']:.0%} of its energy"


def distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where one model is merged with itself."""
    numbered = [f"{name} ({names[:place].count(name) + 1})" for place, name in enumerate(names)]
    return [new if names.count(name) > 1 else name for name, new in zip(names, numbered, strict=True)]
