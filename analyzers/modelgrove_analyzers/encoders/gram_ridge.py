"""Place LoRAs in text space from their weights alone: kernel ridge on the Grams of their updates.

For the update X = B·A of one layer the output-side Gram XXᵀ says which outputs it moves; A is
mostly its random start, and XXᵀ does not change under (A, B) → (RA, BR⁻¹). With X = UΣVᵀ its square
root is (XXᵀ)^½ = UΣUᵀ = CCᵀ, C = UΣ^½, and two LoRAs are compared by
k(i, j) = Σ_l w_l ‖CᵢᵀCⱼ‖², the inner product of these roots, each of norm one, so that strength is no
cue. The root rather than the Gram itself because it hears weak directions better; it is kept to
its leading columns.

Layer weights are half kernel alignment with the label vectors, half uniform. The prediction is
kernel ridge; its regulariser is the one with which models that are left out, alone or with all
that share their label, find that label best among all (closed forms: kernels' `ridge`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from modelgrove_hub.contracts import API, Context, InputModel, Kind, Result
from modelgrove_hub.contracts import Params as BaseParams
from modelgrove_hub.errors import CorruptFileError, DataError, UsageError
from modelgrove_hub.search.cards import label_texts
from pydantic import Field

if TYPE_CHECKING:
    from modelgrove_hub.formats.adapters import Adapter
    from modelgrove_hub.search.background import Background
    from modelgrove_kernels.ridge import KernelRidge
    from torch import Tensor

FILE = "expert.safetensors"
FORMAT = "gram-ridge 1"
FEWEST = 8
"""Documented models without which no expert is fitted."""
COPY = 0.999
"""Kernel cosine from which on two models count as copies of each other."""
REGULARISERS = tuple(10 ** (k / 2) for k in range(-10, 2))


class Params(BaseParams):
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
    reference: Tensor
    """(n, d): where it is put by those with other labels, to tell what a stranger's score is."""

    def place(self, roots: Mapping[str, Tensor]) -> Tensor:
        """Vectors (m, d) of length one for m models with `roots` (m, out, columns) by layer.

        A training model, or a copy of one, is placed by the others: its own label would be an echo.
        """
        import torch

        kernel = mixed(self.weights, roots, self.roots)
        own = sum(w for layer, w in self.weights.items() if layer in roots)
        vectors = unit(kernel @ self.dual)
        likeness, twin = (kernel / max(own, 1e-12)).max(dim=1)
        return torch.where((likeness > COPY)[:, None], unit(self.places[twin]), vectors)


class GramRidge:
    """The embedder plugin: fits on documented LoRAs of one tree, places any LoRA of that tree."""

    name: ClassVar[str] = "gram-ridge"
    kind: ClassVar[Kind] = Kind.EMBEDDER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Text search over LoRA weights: closed-form kernel ridge on the Grams of their updates."
    paper: ClassVar[str] = "after Horwitz et al., Learning on Model Weights using Tree Experts, arXiv 2410.13569"
    Params: ClassVar[type[BaseParams]] = Params

    def run(self, context: Context, params: Params) -> Result:
        """Fit an expert on the documented LoRAs among `context.inputs`; those that cannot be read are named in the report.

        Raises:
            UsageError: fewer than eight are left, or all of them have the same label.
        """
        from modelgrove_hub.search.background import load_background
        from modelgrove_hub.search.text import SPACE

        roots, texts, refused = _read_all(context, params.columns)
        if len(texts) < FEWEST:
            raise UsageError(f"{len(texts)} documented LoRAs can be read, {FEWEST} are needed: {_some(refused)}")
        context.progress(0.8, "fitting")
        background = load_background(context.temp)
        fitted, report = fit(roots, label_vectors(texts, background), background, params.alike)
        _save(context, fitted)
        about = {"text_space": SPACE, "layers": list(fitted.weights), "models": len(texts), "left_aside": refused}
        return Result(report={**about, **report}, artefacts=(FILE,))

    def embed(self, expert: Path, model: InputModel) -> Sequence[float]:
        """The model's vector of length one in the expert's text space.

        Raises:
            UsageError: it is no LoRA.
            DataError: it holds values that are not finite, changes nothing, or shares no layer with the expert.
        """
        from modelgrove_hub.formats.adapters import read_adapter

        fitted = _load(expert, expert.stat().st_mtime_ns)
        roots = roots_of(read_adapter(model), model.name, fitted.columns)
        known = {layer: root[None] for layer, root in roots.items() if layer in fitted.weights}
        if not known:
            raise DataError(f"{model.name} changes none of the expert's layers, such as {next(iter(fitted.weights))}")
        for layer, root in known.items():
            if root.shape[1:] != fitted.roots[layer].shape[1:]:
                raise DataError(
                    f"layer {layer} of {model.name} has {root.shape[1]} outputs, the expert knows "
                    f"{fitted.roots[layer].shape[1]}: it belongs to another base model"
                )
        vector: list[float] = fitted.place(known)[0].tolist()
        return vector


def roots_of(adapter: Adapter, name: str, columns: int) -> dict[str, Tensor]:
    """C (out, columns) by layer, float32, with ‖CᵀC‖ = 1; layers that the adapter leaves as they are do not occur.

    Raises:
        DataError: the adapter changes nothing.
    """
    import torch
    from modelgrove_kernels.lowrank import LowRank, canonical

    roots = {}
    for module, factors in adapter.modules.items():
        leading = canonical(LowRank(factors.up, factors.down)).first(columns)
        if leading.norm > 0:
            root = leading.U * (leading.S / leading.norm).sqrt()
            # Kohya's flat names do not always get their dots back.
            roots[module.replace(".", "_")] = torch.nn.functional.pad(root, (0, columns - root.shape[1]))
    if not roots:
        raise DataError(f"{name} changes nothing: all its updates are zero")
    return roots


def label_vectors(texts: Sequence[Sequence[str]], background: Background) -> Tensor:
    """For each model the mean direction of its texts, less what all texts share: (n, d) of length one, float32."""
    import numpy as np
    import torch
    from modelgrove_hub.search.text import embed_texts

    counts = [len(several) for several in texts]
    vectors = background.centre(embed_texts([text for several in texts for text in several]))
    means = np.add.reduceat(vectors, np.cumsum([0, *counts[:-1]]), axis=0)
    return unit(torch.from_numpy(means))


def fit(
    roots: Mapping[str, Tensor], labels: Tensor, background: Background, alike: float
) -> tuple[Fitted, dict[str, Any]]:
    """Fit on n models: `roots` (n, out, columns) by layer, `labels` (n, d). Returns the fit, and calibration and metrics.

    Raises:
        UsageError: all labels are the same.
    """
    import torch
    from modelgrove_kernels.ridge import align, fit_ridge

    names = groups(labels @ labels.T, alike)
    if len(set(names)) < 2:
        raise UsageError("all documented LoRAs have the same label: there is nothing to tell apart")
    grams = torch.stack([crossed(root, root) for root in roots.values()])
    aligned = align(grams, labels @ labels.T).float()
    weights = dict(zip(roots, ((aligned + 1 / len(grams)) / (aligned.sum() + 1)).tolist(), strict=True))
    kernel = mixed(weights, roots, roots)
    copies = groups(kernel, COPY)
    trials = [_Trial(fit_ridge(kernel, labels, r), labels, names, copies, background) for r in REGULARISERS]
    best = max(trials, key=lambda trial: trial.score)
    fitted = Fitted(
        columns=next(iter(roots.values())).shape[2],
        weights=weights, roots=roots, dual=best.ridge.dual.float(), places=best.places, reference=best.reference,
    )  # fmt: skip
    regulariser = REGULARISERS[trials.index(best)]
    metrics = {"labels": len(set(names)), "regulariser": regulariser, **best.metrics()}
    return fitted, {"calibration": {"threshold": best.threshold()}, "metrics": metrics}


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


def groups(likeness: Tensor, threshold: float) -> list[int]:
    """A group number for each of n things: that of the first one it is alike, by an (n, n) matrix."""
    leaders: list[int] = []
    found = []
    for i, row in enumerate((likeness >= threshold).tolist()):
        leader = next((leader for leader in leaders if row[leader]), None)
        if leader is None:
            leaders.append(i)
        found.append(leaders.index(i if leader is None else leader))
    return found


def unit(vectors: Tensor) -> Tensor:
    """Rows of length one."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12)


class _Trial:
    """One regulariser, judged by what the fit predicts for models that it did not see."""

    def __init__(
        self, ridge: KernelRidge, labels: Tensor, names: Sequence[int], copies: Sequence[int], background: Background
    ) -> None:
        import torch

        self.ridge = ridge
        self.places = unit(ridge.left_out(copies) - ridge.intercept).float()
        self.reference = unit(ridge.left_out(names) - ridge.intercept).float()
        self.names = torch.tensor(names)
        texts = labels[[names.index(name) for name in range(max(names) + 1)]].numpy()
        strangers = self.reference.numpy()
        # (n, labels): how well each model fits each label, known to the others or not.
        self.known = torch.from_numpy(background.scores(self.places.numpy(), texts, strangers))
        self.unknown = torch.from_numpy(background.scores(strangers, texts, strangers))

    @property
    def score(self) -> float:
        """Mean reciprocal rank of a model's label among all labels, known and unknown labels counting the same."""
        return float((1 / self._ranks(self.known)).mean() + (1 / self._ranks(self.unknown)).mean()) / 2

    def threshold(self) -> float:
        """The score that best tells the best model for an unknown label from the best stranger, errors weighed equally."""
        import torch

        right, wrong = self._best()
        candidates = torch.cat([right, wrong]).sort().values
        errors = (right < candidates[:, None]).double().mean(1) + (wrong >= candidates[:, None]).double().mean(1)
        return round(float(candidates[errors.argmin()]), 3)

    def metrics(self) -> dict[str, float]:
        """Top-1 accuracies among all labels, and how often the threshold misses or cries wolf."""
        right, wrong = self._best()
        threshold = self.threshold()
        shares = {
            "top1_known": self._ranks(self.known) == 1,
            "top1_unknown": self._ranks(self.unknown) == 1,
            "missed": right < threshold,
            "false_alarms": wrong >= threshold,
        }
        return {name: round(float(share.double().mean()), 3) for name, share in shares.items()}

    def _ranks(self, scores: Tensor) -> Tensor:
        own = scores.gather(1, self.names[:, None])
        return (scores >= own).sum(1)

    def _best(self) -> tuple[Tensor, Tensor]:
        """For each label the best score of its models when it is unknown, and of all other models."""
        import torch

        own = torch.nn.functional.one_hot(self.names).bool()
        right = self.unknown.masked_fill(~own, -torch.inf).max(0).values
        return right, self.known.masked_fill(own, -torch.inf).max(0).values


def _read_all(context: Context, columns: int) -> tuple[dict[str, Tensor], list[tuple[str, ...]], dict[str, str]]:
    """Roots (n, out, columns) by layer and texts of the documented LoRAs, and why others were left aside."""
    from modelgrove_hub.formats.adapters import read_adapter

    models: list[dict[str, Tensor]] = []
    texts: list[tuple[str, ...]] = []
    refused: dict[str, str] = {}
    for number, model in enumerate(context.inputs):
        context.progress(0.8 * number / len(context.inputs), model.name)
        told = label_texts(model.card, model.tags, model.summary.get("metadata", {}))
        try:
            roots = roots_of(read_adapter(model), model.name, columns) if told else {}
        except (DataError, UsageError) as error:
            refused[model.name] = str(error)
            continue
        if told:
            models.append(roots)
            texts.append(told)
        else:
            refused[model.name] = "no card, tag or caption says what it does"
    return stacked(models), texts, refused


def stacked(models: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Roots of n models by layer, (n, out, k), zero where a model lacks the layer.

    Layers that fewer than half of the models have are left out; of a layer with several shapes the
    commonest counts.
    """
    import torch

    shapes: dict[str, Counter[torch.Size]] = {}
    for model in models:
        for layer, root in model.items():
            shapes.setdefault(layer, Counter())[root.shape] += 1
    layers = {layer: found.most_common(1)[0] for layer, found in shapes.items()}
    blank = {layer: torch.zeros(shape) for layer, (shape, count) in layers.items() if 2 * count >= len(models)}
    return {
        layer: torch.stack([m[layer] if layer in m and m[layer].shape == zero.shape else zero for m in models])
        for layer, zero in sorted(blank.items())
    }


def _some(refused: Mapping[str, str]) -> str:
    lines = [f"{name}: {reason}" for name, reason in list(refused.items())[:3]]
    return "; ".join(lines) or "give more LoRAs a card, tags or captions that say what they do"


def _save(context: Context, fitted: Fitted) -> None:
    about = {"format": FORMAT, "columns": fitted.columns, "weights": dict(fitted.weights)}
    writer = context.writer(FILE, {"modelgrove.expert": json.dumps(about)})
    for layer, root in fitted.roots.items():
        writer.add(f"roots.{layer}", root.half())
    writer.add("dual", fitted.dual)
    writer.add("places", fitted.places.half())
    writer.add("reference", fitted.reference.half())


@lru_cache(maxsize=4)
def _load(path: Path, _changed: int) -> Fitted:
    from modelgrove_hub.store.header import read_header
    from modelgrove_hub.store.tensors import tensors_of

    try:
        about = json.loads(read_header(path).metadata["modelgrove.expert"])
        tensors = {tensor.name: tensor.read().float() for tensor in tensors_of(path)}
        if about.get("format") != FORMAT:
            raise CorruptFileError(f"{path} is an expert of format {about.get('format')!r}, this needs {FORMAT!r}: fit again")
        return Fitted(
            columns=about["columns"], weights=about["weights"],
            roots={layer: tensors[f"roots.{layer}"] for layer in about["weights"]},
            dual=tensors["dual"], places=tensors["places"], reference=tensors["reference"],
        )  # fmt: skip
    except (KeyError, ValueError, AttributeError) as error:
        raise CorruptFileError(f"{path} is no expert of gram-ridge: {error!r}") from error
