"""What an encoder learns from: models with their features and labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from modelgrove_analyzers.encoders.training import group_alike
from modelgrove_hub.errors import UsageError
from modelgrove_hub.search.words import words

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from modelgrove_analyzers.encoders.classes import Classes
    from modelgrove_analyzers.encoders.features import Updates
    from modelgrove_hub.contracts import InputModel
    from modelgrove_hub.search.background import Background


@dataclass(frozen=True)
class Lesson:
    """n models: `updates` by layer, `labels` (n, d) of length one, the text space's background.

    Labels whose cosine is at least `alike` count as the same.

    Raises:
        UsageError: all labels are the same, or the models have no layers in common.
    """

    updates: Mapping[str, Updates]
    labels: Tensor
    background: Background
    alike: float
    generator: Generator
    progress: Callable[[float, str], None] = lambda _done, _message: None
    base: InputModel | None = None
    """What the models were made from, where it is registered."""
    log: Callable[[str], None] = lambda _line: None
    classes: Classes | None = None
    """Where models carry several labels each; `labels` are theirs then."""
    words: Sequence[str] = field(default_factory=words)
    """What a base may be asked for."""

    def __post_init__(self) -> None:
        if not self.updates or len(set(self.names)) < 2:
            counts = f"{len(set(self.names))} labels and {len(self.updates)} layers in common"
            raise UsageError(f"{len(self.labels)} models with {counts}: nothing can be learned")

    @cached_property
    def names(self) -> list[int]:
        """The number of each model's label, from 0."""
        return group_alike(self.labels @ self.labels.T, self.alike)

    @cached_property
    def texts(self) -> Tensor:
        """The vector of each label, (labels, d), or of each class."""
        if self.classes is not None:
            return self.classes.texts
        return self.labels[[self.names.index(name) for name in range(max(self.names) + 1)]]
