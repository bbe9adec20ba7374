"""Modules as Flux's, Stable Diffusion 3's and OpenCLIP's authors name them → as diffusers does, by naming/native.toml.

The authors fuse matrices that diffusers keeps apart (queries, keys and values), so a module may become several, each
with its rows. Where the authors' shift comes before the scale, diffusers has it behind: halves of the rows are swapped.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

from modelgrove_hub.formats.naming import FOLDER

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a module's matrix belong to the module that diffusers calls `module`."""

    module: str
    start: int
    stop: int
    swapped: bool = False
    """diffusers has the second half of them first."""

    def of(self, values: Tensor) -> Tensor:
        """Its rows of a matrix or its numbers of a vector (n,): a view, or a copy where halves are swapped."""
        return swap_halves(values[self.start : self.stop]) if self.swapped else values[self.start : self.stop]


@dataclass(frozen=True)
class Surroundings:
    """What else is in a module's file: its name or its shape alone may not tell what it is."""

    roots: frozenset[str] = frozenset()
    """First words of all modules' names."""
    width: int | None = None
    """Columns of the module's matrix, for its bias."""

    @classmethod
    def of(cls, modules: Iterable[str]) -> Surroundings:
        """Those of a file with these modules."""
        return cls(frozenset(module.split(".", 1)[0] for module in modules))


@dataclass(frozen=True)
class _Rule:
    pattern: re.Pattern[str]
    targets: tuple[str, ...]
    widths: bool
    times: int | None
    swapped: bool
    beside: frozenset[str]

    def bounds(self, rows: int, width: int) -> list[int]:
        share = width if self.widths else rows // len(self.targets)
        return [*(share * place for place in range(len(self.targets))), rows]

    def fits(self, rows: int, width: int | None, roots: frozenset[str]) -> bool:
        told = self.times is None or (width is not None and rows == self.times * width)
        return told and (not self.beside or not self.beside.isdisjoint(roots))


def pieces(module: str, shape: tuple[int, int], around: Surroundings | None = None) -> tuple[Piece, ...]:
    """What diffusers calls the module of a matrix (out, in·kernel) or of a vector (1, n); nothing if it is not known.

    Nor if its rows cannot be shared out. Of a vector (a bias) whose matrix is not known, the n numbers are shared out
    as the rows of a square block's matrix are.
    """
    around = around or Surroundings()
    rows, width = (shape[1], around.width) if shape[0] == 1 else shape
    for rule in _rules():
        match = rule.pattern.fullmatch(module)
        if match and rule.fits(rows, width, around.roots):
            # Flux: three times the width, and an inner layer of four times the width.
            bounds = rule.bounds(rows, rows // 7 if width is None else width)
            uneven = (not rule.widths and rows % len(rule.targets)) or (rule.swapped and rows % 2)
            if uneven or any(a >= b for a, b in pairwise(bounds)):
                return ()
            names = [target.replace("#", match[1] if match.groups() else "") for target in rule.targets]
            return tuple(
                Piece(name, start, stop, rule.swapped)
                for name, start, stop in zip(names, bounds, bounds[1:], strict=False)
            )
    return ()


def swap_halves(values: Tensor) -> Tensor:
    """The second half of the rows before the first one, as a copy; twice is nothing."""
    return values.roll(values.shape[0] // 2, 0)


@cache
def _rules() -> tuple[_Rule, ...]:
    table = tomllib.loads((FOLDER / "native.toml").read_text("utf-8"))
    return tuple(
        _Rule(
            _compiled(rule["from"]), tuple(rule["to"]), rule.get("widths", False), rule.get("times"),
            rule.get("swapped", False), frozenset(rule.get("beside", ())),
        )
        for rule in table["modules"]
    )  # fmt: skip


def _compiled(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\#", r"(\d{1,3})"))
