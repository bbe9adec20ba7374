"""Train an encoder of one layer against texts, as ProbeX does, and place models with what was learned.

An encoder gives e (r_T) for a model. A learned text head T gives each label's text t the same length, and

    logit(model, label) = cos(e, T t + c) · τ,    loss = cross-entropy over all training labels

with τ = 1 as in the paper's code, or learned (CLIP, arXiv 2103.00020, section 2.3). Adam; one model of
each label that has others is kept for validation, the epoch is taken that places these best, and training
ends when fifty more have not placed them better.

All trees share one frozen text space, so a model's vector must lie there and not behind T. For one text q
the logits rank models by ⟨e/|e|, T q + c⟩ = ⟨Tᵀe/|e|, q⟩ + ⟨e/|e|, c⟩: therefore v = Tᵀe is the model's
vector. The hub's z-scores divide its length away and take off what does not depend on q.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from modelgrove_analyzers.encoders.closed_form import best_layer
from modelgrove_analyzers.encoders.embedder import LoraEmbedder, Options
from modelgrove_analyzers.encoders.expert_file import Saved
from modelgrove_analyzers.encoders.features import Shape
from modelgrove_analyzers.encoders.judge import Judge, Placed
from modelgrove_analyzers.encoders.training import unit
from modelgrove_hub.contracts import Params as BaseParams

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from modelgrove_analyzers.encoders.features import Updates
    from modelgrove_analyzers.encoders.lesson import Lesson

Parameters = Mapping[str, "Tensor"]
BATCH = 128
EPOCHS_BETWEEN = 10
PATIENCE = 50
"""Epochs without a better one after which training ends."""
_FIRST_TEMPERATURE = 1 / 0.07


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
    """A trained encoder of one layer. Training models are placed like others: their labels are an echo."""

    layer: str
    shape: Shape
    encoder: Encoder
    parameters: Parameters

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """The one layer."""
        return {self.layer: self.shape}

    def place(self, updates: Mapping[str, Updates]) -> Tensor:
        """v = Tᵀe, (m, d) of length one for m models."""
        return place(self.encoder, self.parameters, updates[self.layer])

    def tensors(self) -> dict[str, Tensor]:
        """All parameters."""
        return dict(self.parameters)


class TrainedEmbedder(LoraEmbedder):
    """A plugin that trains its `encoder` on one layer."""

    encoder: ClassVar[Encoder]
    Params: ClassVar[type[BaseParams]] = TrainedOptions

    def learn(self, lesson: Lesson, params: TrainedOptions) -> tuple[TrainedFitted, Judge]:
        """Train on the layer that says most."""
        return train(self.encoder, lesson, params)

    def restore(self, saved: Saved) -> TrainedFitted:
        """The expert from what was saved of it."""
        [(layer, shape)] = saved.shapes.items()
        return TrainedFitted(layer, shape, self.encoder, saved.tensors)


def uniform(shape: tuple[int, ...], width: int, generator: Generator) -> Tensor:
    """Entries uniform in ±1/√width, as torch starts a linear layer of that many inputs."""
    import torch

    return torch.empty(shape).uniform_(-1 / sqrt(width), 1 / sqrt(width), generator=generator)


def place(encoder: Encoder, parameters: Parameters, updates: Updates) -> Tensor:
    """Vectors (m, d) of length one in the text space."""
    import torch

    with torch.no_grad():
        parts = [encoder.encode(parameters, updates.rows(slice(i, i + BATCH))) for i in range(0, len(updates.S), BATCH)]
        found: Tensor = torch.cat(parts) @ parameters["head.weight"]
        return unit(found)


def train(encoder: Encoder, lesson: Lesson, options: TrainedOptions) -> tuple[TrainedFitted, Judge]:
    """Choose a layer, train on it, keep the best epoch; and how well validation models are placed."""
    import torch
    from torch.nn.functional import cross_entropy

    layer = best_layer(lesson)
    updates = lesson.updates[layer]
    kept = validation_models(lesson.names, lesson.generator)
    training = torch.tensor([i for i in range(len(lesson.names)) if i not in set(kept)])
    names = torch.tensor(lesson.names)
    parameters = encoder.start(updates.shape, options.rank, lesson.generator) | _head(lesson, options)
    for parameter in parameters.values():
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(parameters.values(), options.learning_rate)
    best: tuple[Judge, dict[str, Tensor]] | None = None
    for epoch in range(1, options.epochs + 1):
        order = training[torch.randperm(len(training), generator=lesson.generator)]
        for batch in torch.split(order, BATCH):
            loss = cross_entropy(
                logits(parameters, encoder.encode(parameters, updates.rows(batch)), lesson.texts), names[batch]
            )
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
        lesson.progress(epoch / options.epochs, f"{layer}, epoch {epoch}, loss {float(loss.detach()):.3f}")
        if epoch % EPOCHS_BETWEEN == 0 or epoch == options.epochs:
            placed = Placed(place(encoder, parameters, updates.rows(kept)), names[kept].tolist())
            judge = Judge(lesson.texts, placed, (), lesson.background, {"epoch": epoch})
            if best is None or judge.score > best[0].score:
                best = judge, {name: p.detach().clone() for name, p in parameters.items()}
            elif epoch - best[0].setting["epoch"] >= PATIENCE:
                break
    assert best is not None  # noqa: S101  (the last epoch is always judged)
    return TrainedFitted(layer, updates.shape, encoder, best[1]), best[0]


def logits(parameters: Parameters, encoded: Tensor, texts: Tensor) -> Tensor:
    """(n, labels) for encodings (n, r_T) and texts (labels, d)."""
    heads = texts @ parameters["head.weight"].T + parameters["head.bias"]
    found: Tensor = unit(encoded) @ unit(heads).T
    return found * parameters["temperature"].exp() if "temperature" in parameters else found


def validation_models(names: list[int], generator: Generator) -> Tensor:
    """The places (v,) of one model of each label that has others; of one of any label when none has."""
    import torch

    order = torch.randperm(len(names), generator=generator).tolist()
    last = {names[i]: i for i in order}
    several = sorted(i for name, i in last.items() if names.count(name) > 1)
    return torch.tensor(several or order[: max(1, len(order) // 10)])


def _head(lesson: Lesson, options: TrainedOptions) -> dict[str, Tensor]:
    import torch

    width = lesson.texts.shape[1]
    head = {
        "head.weight": uniform((options.rank, width), width, lesson.generator),
        "head.bias": uniform((options.rank,), width, lesson.generator),
    }
    if options.temperature:
        head["temperature"] = torch.tensor(_FIRST_TEMPERATURE).log()
    return head
