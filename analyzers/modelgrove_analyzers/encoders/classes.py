"""Models that are told by several classes each: full fine-tunes whose cards' tags name what they were trained on.

Label vectors that are means of sentences would be alike for all of them. Here the classes C have the text vectors
T (C, d), and a model with the logits z (C) is placed at

    v = z T⁺ᵀ,    so that ⟨v, t_c⟩ = z_c :

in text space, in the direction where searching for a class's name gives its own logit and nothing of the others'. (The
mean of the texts, weighted by probability, is muddled: names of classes are alike, "six" and "seven" have a cosine
of 0.7. For the true digits of a hundred models it finds the right ones with a mean average precision of 0.95 by
name and 0.83 as "the digit seven"; v with 1.00 and 0.92.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from modelgrove_analyzers.encoders.judge import Judge, Placed
from modelgrove_analyzers.encoders.training import unit
from modelgrove_hub.search.cards import content_tags

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_hub.search.background import Background

FEWEST = 2
"""Models that must carry a tag to make it a class."""
_FAINT = 0.05
"""Share of the largest singular value of T under which a direction counts as noise: names that mean the same."""


@dataclass(frozen=True)
class Classes:
    """C classes of n models: `texts` (C, d) of length one, centred, and `carried` (n, C), zeros and ones, float32."""

    texts: Tensor
    carried: Tensor

    @cached_property
    def dual(self) -> Tensor:
        """T⁺ᵀ (C, d)."""
        import torch

        found: Tensor = torch.linalg.pinv(self.texts, rtol=_FAINT).T
        return found

    @cached_property
    def labels(self) -> Tensor:
        """Label vectors (n, d) of length one: zero logits stand for what the models carry on average."""
        return self.place(self.carried - self.carried.mean(0))

    def place(self, logits: Tensor) -> Tensor:
        """Vectors (m, d) of length one for logits (m, C)."""
        return unit(logits @ self.dual)


def find_classes(tags: Sequence[Sequence[str]], background: Background) -> tuple[Classes, list[int]] | None:
    """The classes that tags name, and which models carry one; None where tags are no classes.

    A class is a tag that several models carry and some do not. They are taken as classes where models carry them in
    more combinations than there are: where each model is one thing, its texts say better what.
    """
    import torch

    from modelgrove_hub.search.text import embed_texts

    told = [{tag.lower() for tag in content_tags(own)} for own in tags]
    counts = Counter(tag for own in told for tag in sorted(own))
    names = [tag for tag, count in counts.items() if FEWEST <= count < len(tags)]
    rows = [row for row, own in enumerate(told) if own & set(names)]
    if len({frozenset(told[row] & set(names)) for row in rows}) <= len(names):
        return None
    carried = torch.tensor([[float(name in told[row]) for name in names] for row in rows])
    return Classes(unit(torch.from_numpy(background.centre(embed_texts(names)))), carried), rows


class ClassJudge:
    """Where an encoder puts models that it was not fitted on, `known.vectors` (n, d), and their classes (n, C).

    A model is said to carry a class when its vector's product with the class's text is above zero.
    """

    def __init__(
        self, classes: Classes, carried: Tensor, vectors: Tensor, background: Background, setting: Mapping[str, float]
    ) -> None:
        self.setting = setting
        self._right = (vectors @ classes.texts.T > 0) == (carried > 0)
        rows, own = carried.nonzero().T
        # A search asks for one class: each model stands for each of its own.
        self.known = Placed(vectors, range(len(vectors)))
        self._search = Judge(classes.texts, Placed(vectors[rows], own.tolist()), (), background, setting)

    @property
    def score(self) -> float:
        """The share of right decisions over models and classes."""
        return float(self._right.double().mean())

    @property
    def threshold(self) -> float:
        """As `Judge.threshold`, for searches for one class."""
        return self._search.threshold

    def metrics(self) -> dict[str, float]:
        """Per-class accuracy, and how often the threshold misses a class or lets a prompt pass."""
        searched = self._search.metrics()
        shares = {name: searched[name] for name in ("missed", "false_alarms")}
        return {"classes": self._right.shape[1], **self.setting, "class_accuracy": round(self.score, 3), **shares}
