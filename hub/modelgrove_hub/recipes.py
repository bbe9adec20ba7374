"""How a merge was made, so that it can be made again: in a file's metadata as JSON, for people as YAML.

mergekit's YAML is read too, as far as it says the same: `models`, `base_model`, weights, and the parameters that a
method here has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelgrove_hub.errors import DataError, NotFoundError, UsageError

RECIPE = "modelgrove.merge"
"""Metadata key under which a merged file keeps its recipe."""
MAX_BYTES = 2**20


@dataclass(frozen=True)
class _Counterpart:
    """What a method of mergekit's is here."""

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """What makes it the same, and mergekit's defaults, which a recipe may change."""
    switches: Mapping[str, bool] = field(default_factory=lambda: {"normalize": False})
    """mergekit's switches, as they must stand for that."""
    defaults: Mapping[str, bool] = field(default_factory=dict)
    """How they stand there if a recipe says nothing, where that is different."""
    votes: bool = False
    """mergekit divides by the weights of the models that agree, so that a common factor of all weights is lost."""


_ENTRIES = {"space": "full", "density": 1.0}
_MERGEKIT_METHODS: Mapping[str, _Counterpart] = {
    "linear": _Counterpart("sum", switches={"normalize": True}),
    "task_arithmetic": _Counterpart("sum"),
    "slerp": _Counterpart("slerp", switches={}),
    "model_stock": _Counterpart("model-stock", switches={"filter_wise": False}),
    "breadcrumbs": _Counterpart("breadcrumbs", _ENTRIES, {"normalize": False, "rescale": False}),
    "ties": _Counterpart("ties", _ENTRIES, {"normalize": True, "rescale": False}, votes=True),
    "dare_linear": _Counterpart("dare", {**_ENTRIES, "elect": False}, {"normalize": False, "rescale": True}),
    "dare_ties": _Counterpart(
        "dare", {**_ENTRIES, "elect": True}, {"normalize": True, "rescale": True}, {"normalize": False}, votes=True
    ),
    "della": _Counterpart("della", {**_ENTRIES, "epsilon": 0.15}, {"normalize": True, "rescale": True}, votes=True),
}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Ingredient(_Strict):
    """A model of a recipe: its name, and the digest of its revision, which tells it when it was renamed."""

    name: str
    digest: str | None = None
    weight: float = Field(1.0, allow_inf_nan=False)


class Recipe(_Strict):
    """A merge: a method's name and parameters, what went into it, and the seed of its random numbers."""

    method: str
    parameters: dict[str, Any] = {}
    seed: int | None = Field(None, ge=0)
    base: Ingredient | None = None
    models: tuple[Ingredient, ...] = Field(min_length=1)

    def params(self) -> dict[str, Any]:
        """The merger's parameters; its inputs are `models`, then the base."""
        own: dict[str, Any] = {"weights": [model.weight for model in self.models], "base": self.base is not None}
        return {**self.parameters, **own, **({} if self.seed is None else {"seed": self.seed})}

    def to_yaml(self) -> str:
        """The recipe for people."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)

    def to_metadata(self) -> dict[str, str]:
        """The recipe for a file's metadata, and the names for those who know ModelSpec."""
        names = ", ".join(model.name for model in self.models)
        return {RECIPE: self.model_dump_json(exclude_none=True), "modelspec.merged_from": names}

    def inputs(self) -> list[str]:
        """References of what it was made from: by digest where it has one, whatever that is called now."""
        used = (*self.models, *((self.base,) if self.base else ()))
        return [model.name if model.digest is None else f"@{model.digest}" for model in used]


class _MergekitModel(_Strict):
    model: str
    parameters: dict[str, Any] = {}


class _Mergekit(_Strict):
    """mergekit's simplest form. Its dtype is not looked at: tensors keep that of the base."""

    merge_method: str
    models: tuple[_MergekitModel, ...] = Field(min_length=1)
    base_model: str | None = None
    parameters: dict[str, Any] = {}
    dtype: str | None = None


_Kind = TypeVar("_Kind", bound=_Strict)


def read_recipe(path: Path) -> Recipe:
    """A recipe in YAML, ours or mergekit's.

    Raises:
        NotFoundError: there is no such file, or it cannot be read.
        DataError: it is no YAML, or says what is not understood; the message names the field.
        UsageError: it asks for what mergekit can do and modelgrove cannot.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise NotFoundError(f"{path}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise DataError(f"{path} is larger than {MAX_BYTES} bytes: that is no recipe")
    try:
        fields = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise DataError(f"{path} is no recipe: it needs `method` and `models`")
    return _from_mergekit(fields, str(path)) if "merge_method" in fields else _validated(Recipe, fields, str(path))


def recipe_of(metadata: Mapping[str, str], name: str) -> Recipe:
    """The recipe that a merged model keeps.

    Raises:
        NotFoundError: it has none.
        DataError: it is broken.
    """
    if RECIPE not in metadata:
        raise NotFoundError(f"model {name} keeps no recipe: it was not merged by modelgrove")
    try:
        fields = json.loads(metadata[RECIPE])
    except (ValueError, RecursionError) as error:
        raise DataError(f"the recipe of model {name} is no JSON") from error
    return _validated(Recipe, fields, f"the recipe of model {name}")


def _validated(kind: type[_Kind], fields: Any, where: str) -> _Kind:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise DataError(f"{where}: {'.'.join(map(str, fault['loc'])) or 'it'}: {fault['msg']}") from error


def _from_mergekit(fields: Mapping[str, Any], where: str) -> Recipe:
    found = _validated(_Mergekit, fields, where)
    if found.merge_method not in _MERGEKIT_METHODS:
        known = ", ".join(_MERGEKIT_METHODS)
        raise UsageError(f"mergekit's method {found.merge_method!r} has no counterpart here; these have: {known}")
    counterpart = _MERGEKIT_METHODS[found.merge_method]
    used, base = _roles(found)
    own = [{name: value for name, value in entry.parameters.items() if name != "weight"} for entry in used]
    if any(values != own[0] for values in own):
        raise UsageError("models with parameters of their own, other than weight, cannot be followed here")
    parameters = {**counterpart.parameters, **found.parameters, **(own[0] if own else {})}
    common = parameters.pop("weight", 1.0)
    weights = [entry.parameters.get("weight", common) for entry in used]
    if "t" in parameters:
        share = parameters.pop("t")
        if len(used) != 2 or not isinstance(share, int | float):
            raise UsageError("slerp of two models with one number t can be followed here, not a gradient of several")
        weights = [1.0 - share, share]
    _translate(found.merge_method, counterpart, parameters)
    if len(used) < 2 and parameters.get("density", 1.0) != 1.0:
        raise UsageError(f"mergekit's {found.merge_method} thins out a single model too, which is only weighted here")
    if counterpart.votes:
        if any(weight != weights[0] for weight in weights) or not weights[0]:
            raise UsageError(
                f"mergekit's {found.merge_method} is followed where all models have the same weight: there weights are "
                "shares of a mean, here strengths"
            )
        weights = [1.0] * len(weights)
    models = [{"name": entry.model, "weight": weight} for entry, weight in zip(used, weights, strict=True)]
    fields = {"method": counterpart.method, "parameters": parameters, "base": base, "models": models}
    return _validated(Recipe, fields, where)


def _roles(found: _Mergekit) -> tuple[list[_MergekitModel], dict[str, str] | None]:
    """The models, and the base; mergekit lists it among the models, or not."""
    others = [entry for entry in found.models if entry.model != found.base_model]
    if found.merge_method == "linear":  # which has no base: all are averaged
        if found.base_model and len(others) == len(found.models):
            raise UsageError(
                f"mergekit's linear has no base: list {found.base_model} among the models, or leave it out"
            )
        return list(found.models), None
    if found.base_model is None:
        return others, None
    if found.merge_method == "slerp":  # which goes from it to the other one
        first = [entry for entry in found.models if entry.model == found.base_model]
        return [*(first or [_MergekitModel(model=found.base_model)]), *others], None
    return others, {"name": found.base_model}


def _translate(name: str, counterpart: _Counterpart, parameters: dict[str, Any]) -> None:
    """mergekit's names and units become ours, in place.

    Raises:
        UsageError: a switch stands otherwise than here.
    """
    parameters.pop("int8_mask", None)  # how it stores its masks, which the result does not depend on
    for switch, wanted in counterpart.switches.items():
        if parameters.pop(switch, counterpart.defaults.get(switch, wanted)) is not wanted:
            raise UsageError(f"mergekit's {name} is followed with `{switch}: {str(wanted).lower()}` only")
    if "gamma" in parameters:
        parameters["outliers"] = parameters.pop("gamma")
    if "epsilon" in parameters:  # there half of what it is here, and nothing is dropped at a density of one
        try:
            parameters["epsilon"] = 0.0 if parameters["density"] >= 1 else 2.0 * parameters["epsilon"]
        except TypeError as error:
            raise UsageError(f"mergekit's {name} with single numbers can be followed here, not gradients") from error
