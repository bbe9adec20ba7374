"""Load the signatures: one TOML file a family, described in signatures/README.md."""

from __future__ import annotations

import tomllib
from functools import cache, cached_property
from pathlib import Path
from re import Pattern
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from modelgrove_hub.formats.patterns import any_of, is_literal, module_patterns
from modelgrove_hub.tables import ModelKind

FOLDER = Path(__file__).parent / "signatures"
VOCABULARY = "vocabulary.toml"

Size: TypeAlias = int | str | list[int]
"""One side of a shape: a number, one of several numbers, or "*"; "..." first stands for any sizes."""

Role = Literal[
    "denoiser",
    "encoder",
    "classifier",
    "control",
    "motion",
    "autoencoder",
    "text-encoder",
    "image-encoder",
    "embedding",
]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Marks(_Strict):
    """What the tensors must look like: names that are there, names that are not, sizes."""

    required: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    shapes: dict[str, list[Size]] = {}
    """Tensor (name or pattern) → size. It must be there, and all that fit the pattern agree."""
    dtypes: dict[str, list[str]] = {}
    """Tensor name → its possible dtypes, checked when the tensor is there."""

    @cached_property
    def anchors(self) -> tuple[str, ...]:
        """Plain names that must be present: the quick test."""
        return tuple(name for name in (*self.required, *self.shapes) if is_literal(name))


class Variant(Marks):
    """A refinement within a layout; the first that fits is named."""

    name: str
    bases: tuple[str, ...] = ()


class Layout(Marks):
    """One convention of tensor names in which the family is found."""

    name: str
    role: Role
    kind: ModelKind = ModelKind.COMPONENT
    prefixes: tuple[str, ...] = ("",)
    names: tuple[str, ...]
    """Patterns of all tensor names that belong to the layout; "@x" takes over a shared vocabulary."""
    coverage: float = Field(0.9, gt=0, le=1)
    """The share of tensors that `names` must explain."""
    variants: tuple[Variant, ...] = ()
    bases: tuple[str, ...] = ()
    """For adapters and embeddings: families of the models they go with."""
    adapts: dict[str, list[Size]] = {}
    """Module → (out, in): by these a low-rank adapter's base is told. Empty: not a base for adapters."""

    most: int | None = None
    """The largest number of tensors, for families whose names say little."""

    @model_validator(mode="after")
    def _has_anchor(self) -> Layout:
        if not self.anchors and self.most is None:
            raise ValueError(f"layout {self.name}: one of `required` or `shapes` must be a plain name, or set `most`")
        return self

    @cached_property
    def explains(self) -> Pattern[str]:
        """Fits every tensor name of the layout."""
        return any_of(self.names)

    def modules(self, *, flat: bool) -> Pattern[str]:
        """Fits every module of the layout that has a weight; `flat` for kohya's names."""
        return any_of(module_patterns(self.names), flat=flat)

    def not_modules(self, *, flat: bool) -> Pattern[str]:
        """Fits modules that the family does not have."""
        return any_of(tuple(pattern.removesuffix(".weight") for pattern in self.forbidden), flat=flat)


class ConfigHints(_Strict):
    """What a config.json beside the tensors says when it is this family."""

    class_names: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    """`general.architecture` of GGUF files."""


class Signature(_Strict):
    """All that tells a family from the others."""

    name: str
    title: str
    adapter_type: str | None = None
    family_of_base: bool = False
    """The tensors extend the base rather than being a network of their own: the base gives the family."""
    config: ConfigHints = ConfigHints()
    text_widths: dict[str, int] = {}
    """Width of the family's text encoders, by the adapter section that trains them."""
    declared: tuple[str, ...] = ()
    """Patterns (lower case) of what trainers call this family in their metadata."""
    layouts: tuple[Layout, ...]


@cache
def load_signatures(folder: Path = FOLDER) -> tuple[Signature, ...]:
    """All signatures in `folder`, by name.

    Raises:
        ValueError: a file is not what signatures/README.md describes; the message names it.
    """
    shared = tomllib.loads((folder / VOCABULARY).read_text())
    files = sorted(path for path in folder.glob("*.toml") if path.name != VOCABULARY)
    return tuple(_load(path, shared) for path in files)


def _load(path: Path, shared: dict[str, list[str]]) -> Signature:
    try:
        raw = tomllib.loads(path.read_text())
        for layout in raw.get("layouts", ()):
            layout["names"] = _expand(layout.get("names", []), shared)
        signature = Signature.model_validate(raw)
    except (tomllib.TOMLDecodeError, ValidationError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from error
    if signature.name != path.stem:
        raise ValueError(f"{path}: the name inside is {signature.name!r}, a file is called like its family")
    return signature


def _expand(names: list[Any], shared: dict[str, list[str]]) -> list[str]:
    out: list[str] = []
    for name in names:
        out += _expand(list(shared[name[1:]]), shared) if name.startswith("@") else [name]
    return out
