"""Previews through diffusers: a model, its adapters and some prompts become one PNG grid.

The grid has a row for each prompt and a column for each seed. Noise depends on the seed alone,
so a column shows the same noise under every prompt, and two previews with the same seeds show
what an adapter or a compression changed. The recipe is written into the PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from modelgrove_hub.contracts import API, Context, InputModel, Kind, Params, Result
from modelgrove_hub.errors import UsageError

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path

    from PIL.Image import Image

    from modelgrove_plugins.preview.painter import Painter
    from modelgrove_plugins.preview.warm import Loaded

PICTURE = "preview.png"
_ZOO = "ZooPipeline"


class PreviewParams(Params):
    """What to paint and how."""

    prompts: tuple[str, ...] = Field(min_length=1, max_length=64, description="What to paint, a row for each.")
    negative_prompt: str = Field("", description="What to stay away from.")
    steps: int = Field(8, ge=1, le=200, description="Denoising steps.")
    guidance_scale: float = Field(2.0, ge=0, le=50, description="How closely to follow the prompt; 1 is unguided.")
    seed: int = Field(0, ge=0, lt=2**62, description="Seed of the first column; the next columns count up.")
    images: int = Field(1, ge=1, le=64, description="Pictures for each prompt.")
    lora_weights: tuple[float, ...] = Field((), description="Weight of each adapter, in order; 1 when not given.")
    sampler: Literal["dpm++2m", "ddim"] = Field("dpm++2m", description="DPM-Solver++(2M) or DDIM, trailing steps.")
    quant: Literal["none", "packed", "w8a8", "w4a8"] = Field(
        "none", description="Compute on 8-bit activations and weights that are packed, or rounded now to 8 or 4 bits."
    )
    side: int = Field(0, ge=0, le=4096, description="Height and width in pixels; 0 is the model's own.")
    scale: int = Field(0, ge=0, le=32, description="Each pixel becomes scale × scale; 0 enlarges small pictures.")


class DiffusersPreviewer:
    """Paint with a diffusers folder (inputs[0]) and adapters (the rest)."""

    name: ClassVar[str] = "diffusers"
    kind: ClassVar[Kind] = Kind.PREVIEWER
    api: ClassVar[int] = API
    summary: ClassVar[str] = (
        "A PNG grid of pictures by a diffusers model with adapters, seeded; in full precision or on quantized kernels."
    )
    paper: ClassVar[str] = "Lu et al., DPM-Solver++ (arXiv 2211.01095); Ho & Salimans, guidance (arXiv 2207.12598)"
    Params: ClassVar[type[Params]] = PreviewParams

    def run(self, context: Context, params: PreviewParams) -> Result:
        """Paint the grid and keep it as an artefact; the report says what fitted and how it was made."""
        from modelgrove_plugins.preview.folder import content_hash
        from modelgrove_plugins.preview.picture import arrange, enlarge, save
        from modelgrove_plugins.preview.warm import borrowed

        if not context.inputs:
            raise UsageError("a preview needs a model to paint with")
        weights = _weights(context.inputs[1:], params)
        context.progress(0.0, "loading")
        base, *adapters = context.inputs
        load = partial(_load, base, context.temp / "pipeline", params.quant)
        with borrowed(f"{content_hash(base)} {params.quant}", load) as ((painter, quantized), undo):
            coverage = [_fuse(painter, base, *one, undo) for one in zip(adapters, weights, strict=True)]
            for line in coverage:
                context.log(
                    f"{line['adapter']} × {line['weight']:g}: {line['matched']} of {line['modules']} modules matched"
                )
            pictures = _paint(context, painter, params)
            recipe = _recipe(context.inputs, weights, params, painter)
        rows = [pictures[i : i + params.images] for i in range(0, len(pictures), params.images)]
        save(arrange([[enlarge(p, params.scale) for p in row] for row in rows]), context.path(PICTURE), recipe)
        context.progress(1.0, "painted")
        report = {"adapters": coverage, "recipe": recipe, **({"quantized": quantized} if quantized else {})}
        return Result(report=report, artefacts=(PICTURE,))


def _weights(adapters: Sequence[InputModel], params: PreviewParams) -> list[float]:
    if len(params.lora_weights) > len(adapters):
        raise UsageError(f"lora_weights: {len(params.lora_weights)} weights for {len(adapters)} adapters")
    return [*params.lora_weights, *(1.0 for _ in adapters[len(params.lora_weights) :])]


def open_painter(model: InputModel, folder: Path) -> Painter:
    """The painter of the model's pipeline class, from its files laid out in `folder`.

    Raises:
        UsageError: it is no diffusers folder, or of a class that is not known.
        DataError: a part of it is missing or broken.
    """
    from modelgrove_plugins.preview.folder import lay_out, read_index

    index = read_index(lay_out(model, folder), model.name)
    if index["_class_name"] == _ZOO:
        from modelgrove_plugins.preview.zoo import ZooPainter

        return ZooPainter.load(folder, index)
    from modelgrove_plugins.preview.standard import StandardPainter

    return StandardPainter.load(folder, index)


def _load(model: InputModel, folder: Path, quant: str) -> Loaded:
    from modelgrove_plugins.preview.quantized import quantize_painter

    painter = open_painter(model, folder)
    return painter, {} if quant == "none" else quantize_painter(painter, model, quant)


def _fuse(
    painter: Painter, base: InputModel, model: InputModel, weight: float, undo: ExitStack | None
) -> dict[str, Any]:
    from modelgrove_hub.formats.sara import check_base
    from modelgrove_hub.formats.updates import open_updates
    from modelgrove_plugins.preview.fusing import fuse

    adapter = open_updates(model)
    check_base(adapter, base)
    coverage = fuse(painter.networks, adapter, weight, undo)
    tokens = _teach(painter, model, undo)
    coverage["tensors_not_understood"] -= len(tokens)
    return {"adapter": model.name, "weight": weight, **coverage, **({"style_tokens": tokens} if tokens else {})}


def _teach(painter: Painter, model: InputModel, undo: ExitStack | None) -> list[str]:
    """Make the adapter's style tokens known to the painter; returns how prompts write them."""
    from modelgrove_hub.formats.style_tokens import read_museum

    read = read_museum(model)
    if read is None:
        return []
    _, rows = read
    taken = [name for name, row in rows.items() if not row.equal(painter.tokens.get(name, row))]
    if taken:  # versions of one museum share their tokens bit by bit
        raise UsageError(f"two adapters mean different styles by the token <{taken[0]}>: preview one at a time")
    painter.tokens.update(rows)
    if undo is not None:
        undo.callback(painter.tokens.clear)
    return [f"<{name}>" for name in rows]


def _paint(context: Context, painter: Painter, params: PreviewParams) -> list[Image]:
    wishes = [(prompt, params.seed + column) for prompt in params.prompts for column in range(params.images)]
    total = len(wishes)

    def report(done: float) -> None:
        context.progress(0.1 + 0.85 * done, f"{int(done * total)} of {total} pictures")

    return painter.paint(wishes, params, report)


def _recipe(
    models: Sequence[InputModel], weights: Sequence[float], params: PreviewParams, painter: Painter
) -> dict[str, Any]:
    """All that decides the picture: models by content, parameters, versions."""
    from importlib.metadata import version

    import torch

    from modelgrove_plugins.preview.folder import content_hash

    base, *adapters = models
    return {
        "made_by": "modelgrove previewer.diffusers",
        "model": {"name": base.name, "sha256": content_hash(base)},
        "adapters": [
            {"name": model.name, "sha256": content_hash(model), "weight": weight}
            for model, weight in zip(adapters, weights, strict=True)
        ],
        "params": params.model_dump(mode="json"),
        "pipeline": painter.pipeline,
        "scheduler": painter.scheduler,
        "versions": {package: version(package) for package in ("modelgrove", "torch", "diffusers", "transformers")},
        "threads": torch.get_num_threads(),
    }
