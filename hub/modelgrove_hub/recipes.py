"""How a merge was made, so that it can be made again: in a file's metadata as JSON, for people as YAML.

mergekit's YAML is read too, as far as it says the same: `models`, `base_model`, weights, and the parameters that a
method here has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlmodel import Session, col, select

from modelgrove_hub.errors import DataError, NotFoundError, UsageError
from modelgrove_hub.registry.models import find_revision
from modelgrove_hub.tables import Revision

RECIPE = "modelgrove.merge"
"""Metadata key under which a merged file keeps its recipe."""
MAX_BYTES = 2**20
_MERGEKIT_METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "linear": ("sum", {}),
    "task_arithmetic": ("sum", {}),
    "slerp": ("slerp", {}),
    "model_stock": ("model-stock", {}),
    "ties": ("ties", {"space": "full"}),
    "dare_linear": ("dare", {"space": "full", "elect": False}),
    "dare_ties": ("dare", {"space": "full", "elect": True}),
    "della": ("della", {"space": "full"}),
}
"""mergekit's name → ours, with the parameters that make it the same."""


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

    def inputs(self, session: Session) -> list[int]:
        """The revisions that it was made from: by digest where it has one, whatever they are called now.

        Raises:
            NotFoundError: one is not in this hub.
        """
        return [_revision(session, model) for model in (*self.models, *((self.base,) if self.base else ()))]


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
    method, implied = _MERGEKIT_METHODS[found.merge_method]
    # mergekit lists the base among the models; slerp goes from it to the other one.
    used = [entry for entry in found.models if method == "slerp" or entry.model != found.base_model]
    own = [{name: value for name, value in entry.parameters.items() if name != "weight"} for entry in used]
    if any(values != own[0] for values in own):
        raise UsageError("models with parameters of their own, other than weight, cannot be followed here")
    parameters = {**implied, **found.parameters, **(own[0] if own else {})}
    common = parameters.pop("weight", 1.0)
    weights = [entry.parameters.get("weight", common) for entry in used]
    if "t" in parameters:
        share = parameters.pop("t")
        if len(used) != 2 or not isinstance(share, int | float):
            raise UsageError("slerp of two models with one number t can be followed here, not a gradient of several")
        weights = [1.0 - share, share]
    base = {"name": found.base_model} if found.base_model and method != "slerp" else None
    models = [{"name": entry.model, "weight": weight} for entry, weight in zip(used, weights, strict=True)]
    return _validated(Recipe, {"method": method, "parameters": parameters, "base": base, "models": models}, where)


def _revision(session: Session, model: Ingredient) -> int:
    if model.digest is None:
        found = find_revision(session, model.name).id
    else:
        query = select(Revision.id).where(Revision.digest == model.digest).order_by(col(Revision.id))
        found = session.exec(query).first()
    if found is None:
        raise NotFoundError(f"{model.name}, revision {str(model.digest)[:12]}, is not in this hub: ingest it first")
    return found
