"""Place LoRAs in text space from their weights alone: kernel ridge on the Grams of their updates.

For the update X = B·A of one layer the output-side Gram XXᵀ says which outputs it moves; A is
mostly its random start, and XXᵀ does not change under (A, B) → (RA, BR⁻¹). Two LoRAs are compared by
k(i, j) = Σ_l w_l ⟨XᵢXᵢᵀ, XⱼXⱼᵀ⟩, each Gram of norm one, so that strength is no cue. With X = UΣVᵀ and
C = UΣ the inner product is ‖CᵢᵀCⱼ‖², so only the leading columns of C are kept.

Layer weights come from kernel alignment with the label vectors, predictions are kernel ridge with
an intercept, and the regulariser is the one with which models that are left out, alone or with
their whole label, find their label best among all labels (kernels/ridge.py has the closed forms).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from modelgrove_hub.contracts import API, Context, InputModel, Kind, Result
from modelgrove_hub.contracts import Params as BaseParams
from modelgrove_hub.errors import CorruptFileError, DataError, UsageError
from modelgrove_hub.search.cards import label_texts
from pydantic import Field

if TYPE_CHECKING:
    from modelgrove_hub.formats.adapters import Factors
    from modelgrove_hub.search.background import Background
    from modelgrove_kernels.ridge import KernelRidge
    from torch import Tensor

FILE = "expert.safetensors"
FORMAT = "modelgrove.gram-ridge.1"
FEWEST = 8
"""Documented models without which no expert is fitted."""
COPY = 0.999
"""Kernel cosine from which on a model counts as a copy of a training model."""
REGULARISERS = tuple(10 ** (k / 4) for k in range(-16, 5))


class Params(BaseParams):
    """How an expert is fitted."""

    columns: int = Field(4, ge=1, le=64, description="Directions kept of each layer's update.")
    alike: float = Field(0.8, gt=0, le=1, description="Labels with this cosine are one label when it is left out.")


class GramRidge:
    """The embedder plugin."""

    name: ClassVar[str] = "gram-ridge"
    kind: ClassVar[Kind] = Kind.EMBEDDER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Text space from LoRA weights: closed-form kernel ridge on output Grams."
    paper: ClassVar[str] = "after Kahana et al., Learning on Model Weights using Tree Experts, arXiv 2410.13569"
    Params: ClassVar[type[BaseParams]] = Params

    def run(self, context: Context, params: Params) -> Result:
        """Fit an expert on the documented LoRAs among `context.inputs`.

        Raises:
            UsageError: fewer than eight of them can be read, or all have the same label.
        """
        learned, left_aside = _learn(context, params)
        fitted, report = fit(learned, params.alike)
        _save(context, fitted, report)
        return Result(report={**report, "left_aside": left_aside}, artefacts=(FILE,))

    def embed(self, expert: Path, model: InputModel) -> Sequence[float]:
        """The model's vector of length one; a training model (or a copy) is placed as if it had not been there.

        Raises:
            DataError: the model is no LoRA, holds values that are not finite, changes nothing, or
                shares no layer with the expert.
        """
        fitted = _load(expert, expert.stat().st_mtime_ns)
        vector: list[float] = fitted.place(roots_of(model, fitted.columns), model.name).tolist()
        return vector


@dataclass(frozen=True)
class Learned:
    """The training models: `roots` by layer (n, out, k) float32, `labels` (n, d) of length one less the background's mean."""

    names: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    roots: dict[str, Tensor]
    labels: Tensor
    background: Background


@dataclass(frozen=True)
class Fitted:
    """What placing a model needs; `weights` sum to one, `dual` is (n, d), `intercept` (d,), all float32."""

    weights: Mapping[str, float]
    roots: Mapping[str, Tensor]
    dual: Tensor
    intercept: Tensor
    left_out: Tensor
    """(n, d): what each training model is predicted to be by all others, its honest place."""
    columns: int
    ...
