"""What every encoder's plugin does the same way: read models, fit, save, place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import Field

from modelgrove_analyzers.encoders.expert_file import FILE, Saved, metadata, read_saved, write_tensors
from modelgrove_analyzers.encoders.features import Shape, common_layers, read_layers, require_known, stacked
from modelgrove_analyzers.encoders.judge import Judge
from modelgrove_analyzers.encoders.lesson import Lesson
from modelgrove_analyzers.encoders.training import label_vectors, read_documented
from modelgrove_hub.contracts import API, Context, InputModel, Kind, Result
from modelgrove_hub.contracts import Params as BaseParams
from modelgrove_hub.errors import CorruptFileError
from modelgrove_hub.search.seen import LABELS

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_analyzers.encoders.features import Updates


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


class LoraEmbedder(ABC):
    """An embedder plugin: fits on the documented LoRAs of one tree, places any LoRA of that tree."""

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    kind: ClassVar[Kind] = Kind.EMBEDDER
    api: ClassVar[int] = API
    version: ClassVar[int] = 1
    """Of the format of the expert's file."""
    Params: ClassVar[type[BaseParams]] = Options

    @abstractmethod
    def learn(self, lesson: Lesson, params: Any) -> tuple[Fitted, Judge]:
        """Fit on a lesson; and how good the fit is."""

    @abstractmethod
    def restore(self, saved: Saved) -> Fitted:
        """What `learn` made, from what was saved of it. May raise KeyError or ValueError."""

    def run(self, context: Context, params: Any) -> Result:
        """Fit an expert on the documented LoRAs among `context.inputs`; the report names those left aside.

        Raises:
            UsageError: fewer than eight are left, or all of them have the same label.
        """
        from modelgrove_hub.search.background import load_background
        from modelgrove_hub.search.text import SPACE

        documented = read_documented(context, 0.4)
        models = []
        for name, adapter in zip(documented.names, documented.adapters, strict=True):
            models.append(read_layers(adapter, params.columns))
            context.progress(0.4 + 0.2 * len(models) / len(documented.names), name)
        background = load_background()
        lesson = Lesson(
            stacked(models, common_layers(models)),
            label_vectors(documented.texts, background),
            background,
            params.alike,
            context.generator(),
            lambda done, message: context.progress(0.6 + 0.4 * done, message),
            next((model.base for model in context.inputs if model.base), None),
            context.log,
        )
        fitted, judge = self.learn(lesson, params)
        saved = Saved(params.columns, fitted.shapes, {**fitted.tensors(), LABELS: lesson.texts})
        write_tensors(saved, context.writer(FILE, metadata(self._form, saved)))
        report = {
            "text_space": SPACE,
            "models": len(models),
            "left_aside": documented.left_aside,
            "layers": list(fitted.shapes),
            "calibration": {"threshold": judge.threshold},
            "metrics": judge.metrics(),
        }
        return Result(report=report, artefacts=(FILE,))

    def embed(self, expert: Path, model: InputModel) -> Sequence[float]:
        """The model's vector of length one in the expert's text space.

        Raises:
            UsageError: it is no LoRA.
            DataError: it holds values that are not finite, changes nothing that the expert knows, or
                belongs to a base of other sizes.
            CorruptFileError: `expert` is no file of this encoder.
        """
        from modelgrove_hub.formats.adapters import read_adapter

        columns, fitted = _load(type(self), expert, expert.stat().st_mtime_ns)
        layers = read_layers(read_adapter(model), columns)
        require_known(model.name, layers, fitted.shapes)
        vector: list[float] = fitted.place(stacked([layers], fitted.shapes))[0].tolist()
        return vector

    @property
    def _form(self) -> str:
        return f"{self.name} {self.version}"


@lru_cache(maxsize=4)
def _load(encoder: type[LoraEmbedder], path: Path, _changed: int) -> tuple[int, Fitted]:
    plugin = encoder()
    saved = read_saved(path, plugin._form)
    try:
        return saved.columns, plugin.restore(saved)
    except (KeyError, ValueError) as error:
        raise CorruptFileError(f"{path} is no expert of {plugin.name}: {error!r}") from error
