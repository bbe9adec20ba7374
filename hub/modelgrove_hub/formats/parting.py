"""Updates under diffusers' names, where the authors of a denoiser fuse modules or order their rows otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from modelgrove_hub.formats.adapter_keys import DENOISERS
from modelgrove_hub.formats.adapters import Factors, Target
from modelgrove_hub.formats.native_names import Piece, Surroundings, pieces
from modelgrove_hub.formats.sara import SparseChange

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_hub.formats.updates import Update


@dataclass(frozen=True)
class Rows:
    """The share of an update that belongs to one of several modules, which the base's authors fused into one."""

    whole: Update
    piece: Piece
    shape: tuple[int, int]
    component: str = "transformer"
    restored: bool = True
    needs_weight: bool = False

    @property
    def module(self) -> str:
        """As diffusers calls it."""
        return self.piece.module

    @property
    def parameter(self) -> str:
        """As of the whole."""
        return self.whole.parameter

    @property
    def kernel(self) -> tuple[int, ...]:
        """As of the whole."""
        return self.whole.kernel

    @property
    def method(self) -> str:
        """As of the whole."""
        return self.whole.method

    def read(self, weight: Tensor | None = None) -> Factors | Tensor:  # noqa: ARG002  (an `Update`)
        """The factors with those rows of `up`, or the rows of the matrix."""
        found = self.whole.read()
        if isinstance(found, Factors):
            up = self.piece.of(found.up)
            return replace(found, module=self.module, component=self.component, up=up, restored=True)
        return self.piece.of(found[0])[None] if self.shape[0] == 1 else self.piece.of(found)


def parted(update: Update, around: Surroundings) -> Sequence[Update]:
    """The update under diffusers' names, where its authors have other ones.

    One that depends on the base's weight, or was made for it alone, stays whole: it fits a base in the same naming.
    """
    alone = update.needs_weight or isinstance(update, SparseChange)
    if alone or update.shape is None or update.component not in DENOISERS:
        return (update,)
    if isinstance(update, Target):
        return update.parted(around)
    vector = update.shape[0] == 1
    return [
        Rows(update, piece, (1, piece.stop - piece.start) if vector else (piece.stop - piece.start, update.shape[1]))
        for piece in pieces(update.module, update.shape, around)
    ] or (update,)
