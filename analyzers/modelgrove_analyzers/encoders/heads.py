"""What a trained encoder's encoding e (r_T) is compared with, and where it puts a model in text space.

Texts (ProbeX, section 4.3; one thing a model): a learned linear map gives each label's text t the length of e, and

    logit(model, label) = cos(e, T t + c) · τ,    loss = cross-entropy over all training labels

with τ = 1 as in the paper's code, or learned (CLIP, arXiv 2103.00020, section 2.3). All trees share one frozen text
space, so a model's vector must lie there and not behind T. For one text q the logits rank models by
⟨e/|e|, T q + c⟩ = ⟨Tᵀe/|e|, q⟩ + ⟨e/|e|, c⟩: therefore v = Tᵀe is the model's vector. The hub's z-scores divide its
length away and take off what does not depend on q.

Classes (section 4.2; several a model): logits z = H e + h, loss = binary cross-entropy, and v is where the classes'
texts have these logits (`classes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import TYPE_CHECKING, Protocol

from modelgrove_analyzers.encoders.classes import Classes, ClassJudge
from modelgrove_analyzers.encoders.judge import Judge, Placed
from modelgrove_analyzers.encoders.training import unit

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from modelgrove_analyzers.encoders.lesson import Lesson

Parameters = Mapping[str, "Tensor"]
CLASSES = "classes."
_FIRST_TEMPERATURE = 1 / 0.07
_VALIDATION = 8
"""One model in so many is kept for validation of classes."""


class Head(Protocol):
    """How one kind of head starts, is trained and judged. Rows are places of models in the lesson."""

    def start(self) -> dict[str, Tensor]:
        """The head's parameters to be trained, by names that no encoder uses."""

    def validation(self) -> Tensor:
        """Rows (v,) of the models that are not trained on."""

    def loss(self, parameters: Parameters, encoded: Tensor, rows: Tensor) -> Tensor:
        """The mean loss of the models in `rows`, whose encodings are (m, r_T)."""

    def judge(self, vectors: Tensor, rows: Tensor, epoch: int) -> Judge | ClassJudge:
        """How good the vectors (v, d) of validation models are."""

    def fixed(self) -> dict[str, Tensor]:
        """What `place` needs and is not trained."""


class TextHead:
    """One label a model."""

    def __init__(self, lesson: Lesson, rank: int, temperature: bool) -> None:
        import torch

        self._lesson, self._rank, self._temperature = lesson, rank, temperature
        self._names = torch.tensor(lesson.names)

    def start(self) -> dict[str, Tensor]:
        """T (r_T, d), c and log τ."""
        import torch

        width, generator = self._lesson.texts.shape[1], self._lesson.generator
        head = {
            "head.weight": uniform((self._rank, width), width, generator),
            "head.bias": uniform((self._rank,), width, generator),
        }
        if self._temperature:
            head["temperature"] = torch.tensor(_FIRST_TEMPERATURE).log()
        return head

    def validation(self) -> Tensor:
        """One model of each label that has others."""
        return validation_models(self._lesson.names, self._lesson.generator)

    def loss(self, parameters: Parameters, encoded: Tensor, rows: Tensor) -> Tensor:
        """Cross-entropy over all labels."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits(parameters, encoded, self._lesson.texts), self._names[rows])

    def judge(self, vectors: Tensor, rows: Tensor, epoch: int) -> Judge:
        """By the ranks of labels."""
        placed = Placed(vectors, self._names[rows].tolist())
        return Judge(self._lesson.texts, placed, (), self._lesson.background, {"epoch": epoch})

    def fixed(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}


class ClassHead:
    """Several classes a model."""

    def __init__(self, lesson: Lesson, classes: Classes, rank: int) -> None:
        self._lesson, self._classes, self._rank = lesson, classes, rank

    def start(self) -> dict[str, Tensor]:
        """H (C, r_T) and h."""
        count, generator = len(self._classes.texts), self._lesson.generator
        return {
            CLASSES + "weight": uniform((count, self._rank), self._rank, generator),
            CLASSES + "bias": uniform((count,), self._rank, generator),
        }

    def validation(self) -> Tensor:
        """An eighth of the models."""
        import torch

        count = len(self._classes.carried)
        return torch.randperm(count, generator=self._lesson.generator)[: max(1, count // _VALIDATION)].sort().values

    def loss(self, parameters: Parameters, encoded: Tensor, rows: Tensor) -> Tensor:
        """Binary cross-entropy, the mean over models and classes."""
        from torch.nn.functional import binary_cross_entropy_with_logits

        return binary_cross_entropy_with_logits(class_logits(parameters, encoded), self._classes.carried[rows])

    def judge(self, vectors: Tensor, rows: Tensor, epoch: int) -> ClassJudge:
        """By the share of right decisions."""
        carried = self._classes.carried[rows]
        return ClassJudge(self._classes, carried, vectors, self._lesson.background, {"epoch": epoch})

    def fixed(self) -> dict[str, Tensor]:
        """T⁺ᵀ (C, d)."""
        return {CLASSES + "dual": self._classes.dual}


def placed(parameters: Parameters, encoded: Tensor) -> Tensor:
    """Vectors (m, d) of length one in text space for encodings (m, r_T), by the head whose parameters are there."""
    if CLASSES + "dual" in parameters:
        return unit(class_logits(parameters, encoded) @ parameters[CLASSES + "dual"])
    return unit(encoded @ parameters["head.weight"])


def class_logits(parameters: Parameters, encoded: Tensor) -> Tensor:
    """z (m, C)."""
    found: Tensor = encoded @ parameters[CLASSES + "weight"].T + parameters[CLASSES + "bias"]
    return found


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


def uniform(shape: tuple[int, ...], width: int, generator: Generator) -> Tensor:
    """Entries uniform in ±1/√width, as torch starts a linear layer of that many inputs."""
    import torch

    return torch.empty(shape).uniform_(-1 / sqrt(width), 1 / sqrt(width), generator=generator)
