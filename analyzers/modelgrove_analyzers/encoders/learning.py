"""Train an encoder of one layer, as ProbeX does, and place models with what was learned.

An encoder gives e (r_T) for a model, a head (`heads`) compares it with texts or tells classes. Adam; some models are
kept for validation, the epoch is taken that places these best, and training ends when fifty more have not placed
them better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from modelgrove_analyzers.encoders.closed_form import best_layer
from modelgrove_analyzers.encoders.embedder import Options, WeightsEmbedder
from modelgrove_analyzers.encoders.expert_file import Saved
from modelgrove_analyzers.encoders.features import Shape
from modelgrove_analyzers.encoders.heads import ClassHead, Head, Parameters, TextHead, placed
from modelgrove_hub.contracts import Params as BaseParams

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from modelgrove_analyzers.encoders.classes import ClassJudge
    from modelgrove_analyzers.encoders.features import Updates
    from modelgrove_analyzers.encoders.judge import Judge
    from modelgrove_analyzers.encoders.lesson import Lesson

BATCH = 128
EPOCHS_BETWEEN = 10
PATIENCE = 50
"""Epochs without a better one after which training ends."""


class TrainedOptions(Options):
    """How an expert is trained."""

    rank: int = Field(128, ge=1, le=1024, description="Length of the encoding, and number of probes if there are any.")
    epochs: int = Field(200, ge=1, le=10_000, description="Most epochs; the best on validation models is kept.")
    learning_rate: float = Field(2e-3, gt=0, le=1, description="Of Adam.")
    temperature: bool = Field(False, description="Learn the temperature of the loss instead of none.")


@dataclass(frozen=True)
class Encoder:
    """How an encoder starts, and e (n, r_T) for the updates of n models: `encode` reads the parameters only."""

    start: Callable[[Shape, int, Generator], dict[str, Tensor]]
    encode: Callable[[Parameters, Updates], Tensor]


@dataclass(frozen=True)
class TrainedFitted:
    """A trained encoder of one layer and its head. Training models are placed like others: their labels are an echo."""

    layer: str
    shape: Shape
    encoder: Encoder
    parameters: Parameters

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """The one layer."""
        return {self.layer: self.shape}

    def place(self, updates: Mapping[str, Updates]) -> Tensor:
        """Vectors (m, d) of length one for m models."""
        return place(self.encoder, self.parameters, updates[self.layer])

    def tensors(self) -> dict[str, Tensor]:
        """All parameters."""
        return dict(self.parameters)


class TrainedEmbedder(WeightsEmbedder):
    """A plugin that trains its `encoder` on one layer."""

    encoder: ClassVar[Encoder]
    Params: ClassVar[type[BaseParams]] = TrainedOptions

    def learn(self, lesson: Lesson, params: TrainedOptions) -> tuple[TrainedFitted, Judge | ClassJudge]:
        """Train on the layer that says most."""
        return train(self.encoder, lesson, params)

    def restore(self, saved: Saved) -> TrainedFitted:
        """The expert from what was saved of it."""
        [(layer, shape)] = saved.shapes.items()
        return TrainedFitted(layer, shape, self.encoder, saved.tensors)


def place(encoder: Encoder, parameters: Parameters, updates: Updates) -> Tensor:
    """Vectors (m, d) of length one in the text space."""
    import torch

    with torch.no_grad():
        parts = [encoder.encode(parameters, updates.rows(slice(i, i + BATCH))) for i in range(0, len(updates.S), BATCH)]
        return placed(parameters, torch.cat(parts))


def train(encoder: Encoder, lesson: Lesson, options: TrainedOptions) -> tuple[TrainedFitted, Judge | ClassJudge]:
    """Choose a layer, train on it, keep the best epoch; and how well validation models are placed."""
    import torch

    layer = best_layer(lesson)
    updates = lesson.updates[layer]
    head: Head = TextHead(lesson, options.rank, options.temperature)
    if lesson.classes is not None:
        head = ClassHead(lesson, lesson.classes, options.rank)
    kept = head.validation()
    training = torch.arange(len(updates.S))
    training = training[~torch.isin(training, kept)]
    trained = encoder.start(updates.shape, options.rank, lesson.generator) | head.start()
    parameters = {**trained, **head.fixed()}
    for parameter in trained.values():
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(trained.values(), options.learning_rate)
    best: tuple[Judge | ClassJudge, dict[str, Tensor]] | None = None
    for epoch in range(1, options.epochs + 1):
        order = training[torch.randperm(len(training), generator=lesson.generator)]
        for batch in torch.split(order, BATCH):
            loss = head.loss(parameters, encoder.encode(parameters, updates.rows(batch)), batch)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
        lesson.progress(epoch / options.epochs, f"{layer}, epoch {epoch}, loss {float(loss.detach()):.3f}")
        if epoch % EPOCHS_BETWEEN == 0 or epoch == options.epochs:
            judge = head.judge(place(encoder, parameters, updates.rows(kept)), kept, epoch)
            if best is None or judge.score > best[0].score:
                best = judge, {name: p.detach().clone() for name, p in parameters.items()}
            elif epoch - best[0].setting["epoch"] >= PATIENCE:
                break
    assert best is not None  # noqa: S101  (the last epoch is always judged)
    return TrainedFitted(layer, updates.shape, encoder, best[1]), best[0]
