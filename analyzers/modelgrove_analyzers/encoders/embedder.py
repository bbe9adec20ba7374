"""What every encoder's plugin does the same way: read models, fit, save, place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import Field

from modelgrove_analyzers.encoders.classes import Classes, ClassJudge, find_classes
from modelgrove_analyzers.encoders.deltas import read_model, used_of
from modelgrove_analyzers.encoders.expert_file import FILE, Saved, metadata, read_saved, write_tensors
from modelgrove_analyzers.encoders.features import Shape, common_layers, require_known, stacked
from modelgrove_analyzers.encoders.judge import Judge
from modelgrove_analyzers.encoders.lesson import Lesson
from modelgrove_analyzers.encoders.training import Documented, label_vectors, read_documented
from modelgrove_hub.contracts import API, Context, InputModel, Kind, Result
from modelgrove_hub.contracts import Params as BaseParams
from modelgrove_hub.errors import CorruptFileError
from modelgrove_hub.search.seen import LABELS

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_analyzers.encoders.features import Updates
    from modelgrove_hub.search.background import Background
    from modelgrove_kernels.lowrank import Canonical


class Options(BaseParams):
    """How an expert is fitted."""

    columns: int = Field(16, ge=1, le=64, description="Directions kept of each layer's update.")
    alike: float = Field(0.8, gt=0, le=1, description="Labels with this cosine count as the same.")


class Fitted(Protocol):
    """An encoder that has learned."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """The layers that it looks at."""

    def place(self, updates: Mapping[str, Updates]) -> Tensor:
        """Vectors (m, d) of length one for m models, from the updates of all layers in `shapes`."""

    def tensors(self) -> dict[str, Tensor]:
        """What was learned."""


class WeightsEmbedder(ABC):
    """An embedder plugin: fits on the documented LoRAs, or full fine-tunes, of one tree, places any of that tree."""

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    kind: ClassVar[Kind] = Kind.EMBEDDER
    api: ClassVar[int] = API
    version: ClassVar[int] = 1
    """Of the format of the expert's file."""
    Params: ClassVar[type[BaseParams]] = Options

    @abstractmethod
    def learn(self, lesson: Lesson, params: Any) -> tuple[Fitted, Judge | ClassJudge]:
        """Fit on a lesson; and how good the fit is."""

    @abstractmethod
    def restore(self, saved: Saved) -> Fitted:
        """What `learn` made, from what was saved of it. May raise KeyError or ValueError."""

    def run(self, context: Context, params: Any) -> Result:
        """Fit an expert on the documented models among `context.inputs`; the report names those left aside.

        Raises:
            UsageError: fewer than eight are left, or all of them have the same label.
        """
        from modelgrove_hub.search.background import load_background
        from modelgrove_hub.search.text import text_space

        documented = read_documented(context, params.columns, 0.6)
        background = load_background()
        layers, labels, classes = _labelled(documented, background)
        lesson = Lesson(
            stacked(layers, common_layers(layers)),
            labels,
            background,
            params.alike,
            context.generator(),
            lambda done, message: context.progress(0.6 + 0.4 * done, message),
            next((model.base for model in context.inputs if model.base), None),
            context.log,
            classes,
        )
        fitted, judge = self.learn(lesson, params)
        tensors = {**fitted.tensors(), LABELS: lesson.texts}
        saved = Saved(params.columns, fitted.shapes, tensors, used_of(documented.reference, fitted.shapes))
        write_tensors(saved, context.writer(FILE, metadata(self._form, saved)))
        report = {
            "text_space": text_space(),
            "models": len(layers),
            "left_aside": documented.left_aside,
            "layers": list(fitted.shapes),
            "calibration": {"threshold": judge.threshold},
            "metrics": judge.metrics(),
        }
        return Result(report=report, artefacts=(FILE,))

    def embed(self, expert: Path, model: InputModel) -> Sequence[float]:
        """The model's vector of length one in the expert's text space.

        Raises:
            UsageError: it is no LoRA, and the expert is one of LoRAs.
            DataError: it holds values that are not finite, changes nothing that the expert knows, or
                belongs to a base of other sizes.
            CorruptFileError: `expert` is no file of this encoder.
        """
        columns, reference, fitted = _load(type(self), expert, expert.stat().st_mtime_ns)
        layers = read_model(model, reference, columns)
        require_known(model.name, layers, fitted.shapes)
        vector: list[float] = fitted.place(stacked([layers], fitted.shapes))[0].tolist()
        return vector

    @property
    def _form(self) -> str:
        return f"{self.name} {self.version}"


def _labelled(
    documented: Documented, background: Background
) -> tuple[list[Mapping[str, Canonical]], Tensor, Classes | None]:
    """The models' layers and label vectors; of full fine-tunes that classes tell best, only those that carry any."""
    told = documented.reference is not None and find_classes([m.tags for m in documented.models], background)
    if not told:
        return list(documented.layers), label_vectors(documented.texts, background), None
    classes, rows = told
    return [documented.layers[row] for row in rows], classes.labels, classes


@lru_cache(maxsize=4)
def _load(encoder: type[WeightsEmbedder], path: Path, _changed: int) -> tuple[int, Mapping[str, Tensor] | None, Fitted]:
    plugin = encoder()
    saved = read_saved(path, plugin._form)
    try:
        return saved.columns, saved.reference, plugin.restore(saved)
    except (KeyError, ValueError) as error:
        raise CorruptFileError(f"{path} is no expert of {plugin.name}: {error!r}") from error
