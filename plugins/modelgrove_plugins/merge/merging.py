"""One entrance for every merger: adapters into an adapter or a base, checkpoints into a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from modelgrove_hub.contracts import Context, InputModel, Result
from modelgrove_hub.errors import UsageError
from modelgrove_hub.recipes import Ingredient, Recipe
from modelgrove_hub.registry.digest import digest_of
from modelgrove_plugins.merge.baking import bake
from modelgrove_plugins.merge.joining import join
from modelgrove_plugins.merge.methods import Method
from modelgrove_plugins.merge.mixing import mix
from modelgrove_plugins.merge.params import MergeParams


def merge(context: Context, method: Method, params: MergeParams) -> Result:
    """Merge the job's inputs by `method`, and log the warnings of the report.

    Adapters become one adapter, or with `params.base` a copy of the base that contains them; checkpoints become a
    checkpoint, by their differences from the base if there is one.

    Raises:
        UsageError: the inputs do not belong together, or the weights do not fit.
        DataError: a file is broken; the message names the tensor.
    """
    models, base = _inputs(context.inputs, params)
    weights = params.weights or (1.0,) * len(models)
    if len(weights) != len(models):
        raise UsageError(f"{len(models)} models need as many weights, not {len(weights)}")
    seed = context.seed if params.seed is None else params.seed
    result = _merged(context, method, params, models, base, weights, seed)
    warnings = list(result.report["warnings"])
    if len(models) == 1 and method.rule is not None:
        warnings.append(
            f"{method.name} settles what several models change; {models[0].name} is alone and was only weighted"
        )
    for warning in warnings:
        context.log(f"warning: {warning}")
    return replace(result, report={**result.report, "warnings": warnings})


def _merged(
    context: Context, method: Method, params: MergeParams, models: Sequence[InputModel], base: InputModel | None,
    weights: Sequence[float], seed: int,
) -> Result:  # fmt: skip
    metadata = _recipe(method, params, models, base, weights, seed).to_metadata()
    adapters = [model for model in models if _is_adapter(model)]
    if len(adapters) == len(models):
        if base is None:
            return join(context, method, params, models, weights, metadata, seed)
        return bake(context, method, params, models, base, weights, metadata, seed)
    if adapters:
        whole = next(model for model in models if not _is_adapter(model))
        raise UsageError(
            f"{adapters[0].name} is an adapter and {whole.name} is none: "
            f"to put adapters into a checkpoint, merge the adapters with --base {whole.name}"
        )
    return mix(context, method, params, models, base, weights, metadata, seed)


def parted(inputs: Sequence[InputModel], *, based: bool) -> tuple[Sequence[InputModel], InputModel | None]:
    """A job's inputs → the models, and the base if it is the last of them."""
    return (inputs[:-1], inputs[-1]) if based and inputs else (inputs, None)


def _inputs(inputs: Sequence[InputModel], params: MergeParams) -> tuple[Sequence[InputModel], InputModel | None]:
    models, base = parted(inputs, based=params.base)
    if not models:
        raise UsageError("there is nothing to merge: name one adapter or more")
    if base is not None and _is_adapter(base):
        raise UsageError(f"{base.name} is an adapter ({base.adapter_type}), which is no base")
    return models, base


def _is_adapter(model: InputModel) -> bool:
    return model.adapter_type is not None


def _recipe(
    method: Method, params: MergeParams, models: Sequence[InputModel], base: InputModel | None,
    weights: Sequence[float], seed: int,
) -> Recipe:  # fmt: skip
    return Recipe(
        method=method.name,
        parameters=params.model_dump(mode="json", exclude=set(params.unrecorded), exclude_none=True),
        seed=seed,
        base=_ingredient(base) if base is not None else None,
        models=tuple(_ingredient(model, weight) for model, weight in zip(models, weights, strict=True)),
    )


def _ingredient(model: InputModel, weight: float = 1.0) -> Ingredient:
    return Ingredient(
        name=model.name, digest=digest_of({path: model.sha256(path) for path in model.files()}), weight=weight
    )
