"""Place LoRAs in text space from their weights alone: kernel ridge on the Grams of their updates.

For the update X = B·A of one layer the output-side Gram XXᵀ says which outputs it moves; A is
mostly its random start, and XXᵀ does not change under (A, B) → (RA, BR⁻¹). With X = UΣVᵀ its square
root is (XXᵀ)^½ = UΣUᵀ = CCᵀ, C = UΣ^½, and two LoRAs are compared by
k(i, j) = Σ_l w_l ‖CᵢᵀCⱼ‖², the inner product of these roots, each of norm one, so that strength is no
cue. It is the root and not the Gram itself because the root hears weak directions better; only its
leading columns are kept.

Layer weights are half kernel alignment with the label vectors, half uniform. The prediction is
kernel ridge; its regulariser is the one with which models that are left out, alone or with all
that share their label, find that label best among all (closed forms: `ridge` in kernels).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from modelgrove_analyzers.encoders.judge import Judge
from modelgrove_analyzers.encoders.training import group_alike, label_vectors, read_documented, unit
from modelgrove_hub.contracts import API, Context, InputModel, Kind, Result
from modelgrove_hub.contracts import Params as BaseParams
from modelgrove_hub.errors import CorruptFileError, DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_hub.formats.adapters import Adapter
    from modelgrove_hub.search.background import Background

FILE = "expert.safetensors"
FORMAT = "gram-ridge 1"
COPY = 0.999
"""Kernel cosine from which on two models count as copies of each other."""
REGULARISERS = tuple(10 ** (k / 2) for k in range(-10, 2))


class Options(BaseParams):
    """How an expert is fitted."""

    columns: int = Field(4, ge=1, le=64, description="Directions kept of each layer's update.")
    alike: float = Field(0.8, gt=0, le=1, description="Labels with this cosine count as the same.")


@dataclass(frozen=True)
class Fitted:
    """What placing a model needs: n training models, vectors of d numbers, all float32."""

    columns: int
    weights: Mapping[str, float]
    """By layer; they sum to one."""
    roots: Mapping[str, Tensor]
    """By layer, C of every training model: (n, out, columns)."""
    dual: Tensor
    """(n, d): a model's vector is its kernel values with the training models times this."""
    places: Tensor
    """(n, d): where each training model is put by the others."""

    def place(self, roots: Mapping[str, Tensor]) -> Tensor:
        """Vectors (m, d) of length one for m models, from their `roots` (m, out, columns) by layer.

        A training model, or a copy of one, is placed by the others: its own label would be an echo.
        """
        import torch

        kernel = mixed(self.weights, roots, self.roots)
        most = sum(weight for layer, weight in self.weights.items() if layer in roots)
        likeness, twin = (kernel / most).max(dim=1)
        return torch.where((likeness > COPY)[:, None], unit(self.places[twin]), unit(kernel @ self.dual))


class GramRidge:
    """The embedder plugin: fits on the documented LoRAs of one tree, places any LoRA of that tree."""

    name: ClassVar[str] = "gram-ridge"
    kind: ClassVar[Kind] = Kind.EMBEDDER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Text search over LoRA weights: closed-form kernel ridge on the Grams of their updates."
    paper: ClassVar[str] = "after Horwitz et al., Learning on Model Weights using Tree Experts, arXiv 2410.13569"
    Params: ClassVar[type[BaseParams]] = Options

    def run(self, context: Context, params: Options) -> Result:
        """Fit an expert on the documented LoRAs among `context.inputs`; the report names those left aside.

        Raises:
            UsageError: fewer than eight are left, or all of them have the same label.
        """
        from modelgrove_hub.search.background import load_background
        from modelgrove_hub.search.text import SPACE

        documented = read_documented(context, 0.5)
        models: list[dict[str, Tensor]] = []
        for name, adapter in zip(documented.names, documented.adapters, strict=True):
            models.append(roots_of(adapter, params.columns))
            context.progress(0.5 + 0.4 * len(models) / len(documented.names), name)
        background = load_background()
        fitted, judge = fit(stacked(models), label_vectors(documented.texts, background), background, params.alike)
        _save(context, fitted)
        report = {
            "text_space": SPACE,
            "models": len(models),
            "left_aside": documented.left_aside,
            "layers": list(fitted.weights),
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
        """
        from modelgrove_hub.formats.adapters import read_adapter

        fitted = _load(expert, expert.stat().st_mtime_ns)
        roots = roots_of(read_adapter(model), fitted.columns)
        known = {layer: root[None] for layer, root in roots.items() if layer in fitted.weights}
        if not known:
            raise DataError(f"{model.name} changes none of the expert's layers, such as {next(iter(fitted.weights))}")
        for layer, root in known.items():
            if root.shape[1:] != fitted.roots[layer].shape[1:]:
                sizes = f"{root.shape[1]} outputs, the expert knows {fitted.roots[layer].shape[1]}"
                raise DataError(f"layer {layer} of {model.name} has {sizes}: it belongs to another base model")
        vector: list[float] = fitted.place(known)[0].tolist()
        return vector


def roots_of(adapter: Adapter, columns: int) -> dict[str, Tensor]:
    """C (out, columns) by layer, float32, with ‖CᵀC‖ = 1; layers that the adapter leaves as they are do not occur."""
    import torch

    from modelgrove_kernels.lowrank import LowRank, canonical

    roots = {}
    for module, factors in adapter.modules.items():
        leading = canonical(LowRank(factors.up, factors.down)).first(columns)
        if leading.norm > 0:
            root = leading.U * (leading.S / leading.norm).sqrt()
            # Kohya's flat names do not always get their dots back.
            roots[module.replace(".", "_")] = torch.nn.functional.pad(root, (0, columns - root.shape[1]))
    return roots


def stacked(models: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Roots of n models by layer, (n, out, k), zero where a model lacks the layer.

    Layers that fewer than half of the models have are left out; of several shapes the commonest counts.
    """
    import torch

    shapes: dict[str, Counter[torch.Size]] = {}
    for model in models:
        for layer, root in model.items():
            shapes.setdefault(layer, Counter())[root.shape] += 1
    found = {layer: counts.most_common(1)[0] for layer, counts in sorted(shapes.items())}
    blank = {layer: torch.zeros(shape) for layer, (shape, count) in found.items() if 2 * count >= len(models)}
    return {
        layer: torch.stack([m[layer] if layer in m and m[layer].shape == zero.shape else zero for m in models])
        for layer, zero in blank.items()
    }


def crossed(rows: Tensor, columns: Tensor) -> Tensor:
    """‖CᵢᵀCⱼ‖² for all pairs: (n, out, k), (m, out, k) → (n, m)."""
    n, out, k = rows.shape
    flat = rows.transpose(1, 2).reshape(n * k, out) @ columns.transpose(0, 1).reshape(out, -1)
    return flat.square().view(n, k, len(columns), k).sum((1, 3))


def mixed(weights: Mapping[str, float], rows: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> Tensor:
    """The kernel (n, m): the weighted sum over the layers that both have."""
    import torch

    layers = [layer for layer in weights if layer in rows and layer in columns]
    return torch.stack([weights[layer] * crossed(rows[layer], columns[layer]) for layer in layers]).sum(0)


def fit(roots: Mapping[str, Tensor], labels: Tensor, background: Background, alike: float) -> tuple[Fitted, Judge]:
    """Fit on n models, `roots` (n, out, columns) by layer and `labels` (n, d); and how good the fit is.

    Raises:
        UsageError: all labels are the same, or the models have no layers in common.
    """
    import torch

    from modelgrove_kernels.ridge import align, fit_ridge

    names = group_alike(labels @ labels.T, alike)
    if not roots or len(set(names)) < 2:
        raise UsageError(f"{len(labels)} LoRAs with {len(set(names))} labels and {len(roots)} layers in common")
    grams = torch.stack([crossed(root, root) for root in roots.values()])
    weights = (align(grams, labels @ labels.T) + 1 / len(grams)).float()
    weights /= weights.sum()
    kernel = (weights[:, None, None] * grams).sum(0)
    copies = group_alike(kernel, COPY)

    def attempt(regulariser: float) -> tuple[Judge, Tensor]:
        ridge = fit_ridge(kernel, labels, regulariser)
        # The intercept says what the tree's models have in common: nothing that tells them apart.
        known, unknown = (unit(ridge.left_out(sets) - ridge.intercept).float() for sets in (copies, names))
        return Judge(known, unknown, labels, names, background, regulariser), ridge.dual.float()

    judge, dual = max((attempt(regulariser) for regulariser in REGULARISERS), key=lambda trial: trial[0].score)
    by_layer = dict(zip(roots, weights.tolist(), strict=True))
    return Fitted(next(iter(roots.values())).shape[2], by_layer, roots, dual, judge.known), judge


def _save(context: Context, fitted: Fitted) -> None:
    about = {"format": FORMAT, "columns": fitted.columns, "weights": dict(fitted.weights)}
    writer = context.writer(FILE, {"modelgrove.expert": json.dumps(about)})
    for layer, root in fitted.roots.items():
        writer.add(f"roots.{layer}", root.half())
    writer.add("dual", fitted.dual)
    writer.add("places", fitted.places.half())


@lru_cache(maxsize=4)
def _load(path: Path, _changed: int) -> Fitted:
    from modelgrove_hub.store.header import read_header
    from modelgrove_hub.store.tensors import tensors_of

    try:
        about = json.loads(read_header(path).metadata["modelgrove.expert"])
        tensors = {tensor.name: tensor.read().float() for tensor in tensors_of(path)}
        if about["format"] != FORMAT:
            raise CorruptFileError(f"{path}: an expert of format {about['format']!r}, not {FORMAT!r}: fit it again")
        roots = {layer: tensors[f"roots.{layer}"] for layer in about["weights"]}
        return Fitted(about["columns"], about["weights"], roots, tensors["dual"], tensors["places"])
    except (KeyError, ValueError, TypeError) as error:
        raise CorruptFileError(f"{path} is no expert of gram-ridge: {error!r}") from error
