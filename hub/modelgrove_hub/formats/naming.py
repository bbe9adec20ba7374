"""How files name tensors: the suffixes of adapter methods, and the prefixes of parts. Data in naming/*.toml."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from modelgrove_hub.formats.patterns import any_of

FOLDER = Path(__file__).parent / "naming"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AdapterKind(_Strict):
    """A method's tensor suffixes, and which part of its formula each holds."""

    name: str
    core: dict[str, str]
    """Suffixes that prove the method."""
    extra: dict[str, str] = {}
    """Suffixes that only go with the core ones."""
    mark: bool = False
    """It refines another kind in the same module."""
    company: bool = False
    """It may stand beside another kind without making the file a mixture."""


class Prefix(_Strict):
    """How a convention begins a module's name, and the network the module is in."""

    prefix: str
    section: str
    convention: str
    flat: bool = False
    """Dots have become underscores."""


class Targets(_Strict):
    """Ends of module names that say what the module does."""

    names: tuple[str, ...]


class Spelling(_Strict):
    """A regular expression of whole names, and what they are to be read as."""

    expression: str = Field(alias="from")
    to: str


class Special(_Strict):
    """An adapter known by a pattern of its names alone."""

    adapter_type: str
    pattern: str
    reason: str


class Brought(_Strict):
    """A kind of file that is told from tensors that stand beside a LoRA's factors."""

    adapter_type: str
    patterns: tuple[str, ...]
    reason: str

    def fits(self, name: str) -> bool:
        """Whether a tensor of this name is such a one."""
        return any_of(self.patterns).fullmatch(name) is not None


class AdapterNames(_Strict):
    """naming/adapters.toml."""

    kinds: tuple[AdapterKind, ...]
    spellings: tuple[Spelling, ...]
    prefixes: tuple[Prefix, ...]
    targets: Targets
    special: tuple[Special, ...]
    brought: tuple[Brought, ...]
    marks: dict[str, tuple[str, ...]]
    """Method → words between the dots of its tensors' names, for methods that are told and no more."""

    @cached_property
    def _suffix(self) -> re.Pattern[str]:
        suffixes = {suffix for kind in self.kinds for suffix in (*kind.core, *kind.extra)}
        # The module is matched lazily, so that the longest suffix that fits is split off.
        return re.compile(f"(.+?)({'|'.join(map(re.escape, sorted(suffixes)))})")

    @cached_property
    def _spellings(self) -> tuple[tuple[re.Pattern[str], str], ...]:
        return tuple((re.compile(spelling.expression), spelling.to) for spelling in self.spellings)

    def _spelled(self, name: str) -> str:
        found = ((expression.fullmatch(name), to) for expression, to in self._spellings)
        return next((match.expand(to) for match, to in found if match), name)

    @cached_property
    def _core(self) -> tuple[str, ...]:
        return tuple(suffix for kind in self.kinds for suffix in kind.core)

    @cached_property
    def _methods(self) -> dict[str, str]:
        return {word: method for method, words in self.marks.items() for word in words}

    @cached_property
    def _mark(self) -> re.Pattern[str]:
        return re.compile(rf"(?:^|\.)({'|'.join(map(re.escape, self._methods))})(?=\.|$)")

    @cached_property
    def _flat_targets(self) -> tuple[tuple[str, str], ...]:
        return tuple((name, name.replace(".", "_")) for name in self.targets.names)

    def split(self, name: str) -> tuple[str, str] | None:
        """A tensor's name → (module, suffix), or None when it ends like no adapter's."""
        match = self._suffix.fullmatch(self._spelled(name))
        return (match[1], match[2]) if match else None

    def marked(self, name: str) -> tuple[str, str] | None:
        """A tensor's name → (module, method), or None when no word of `marks` is in it."""
        match = self._mark.search(name)
        return (name[: match.start()], self._methods[match[1]]) if match else None

    def prove_adapter(self, names: Iterable[str]) -> bool:
        """Whether any of the names is only an adapter's."""
        special = any_of(tuple(special.pattern for special in self.special))
        return any(
            self._spelled(name).endswith(self._core) or special.fullmatch(name) or self.marked(name) for name in names
        )

    def target(self, module: str, *, flat: bool) -> str:
        """What the module does: "attn2.to_k", "conv1"."""
        for name, flattened in self._flat_targets:
            end = flattened if flat else name
            if module == end or module.endswith(("_" if flat else ".") + end):
                return name
        return module if flat else module.rpartition(".")[2]


class ContainerNames(_Strict):
    """naming/containers.toml."""

    parts: dict[str, str]
    anywhere: Targets
    packed: dict[str, tuple[str, ...]]

    @cached_property
    def _by_length(self) -> tuple[str, ...]:
        return tuple(sorted(self.parts, key=len, reverse=True))

    def part_of(self, name: str) -> str:
        """The prefix under which the tensor's part of the model is kept; "" for none."""
        return next((prefix for prefix in self._by_length if name.startswith(prefix)), "")

    def place_of(self, path: str, name: str) -> str:
        """The part of a model that the tensor `name` of the file `path` is in, as `summary["parts"]` calls it."""
        folder, prefix = path.rpartition("/")[0], self.part_of(name)
        return f"{folder}/{self.parts[prefix]}".strip("/") if prefix else folder or "whole"

    def is_anywhere(self, name: str) -> bool:
        """Whether any checkpoint may carry this tensor."""
        return any_of(self.anywhere.names).fullmatch(name) is not None

    def is_packing(self, name: str) -> bool:
        """Whether the tensor belongs to a quantizer rather than to the network."""
        return name.endswith(self.packed["suffixes"]) or name in self.packed["alone"]


@cache
def adapter_names() -> AdapterNames:
    """The adapters' table."""
    return AdapterNames.model_validate(tomllib.loads((FOLDER / "adapters.toml").read_text()))


@cache
def container_names() -> ContainerNames:
    """The containers' table."""
    return ContainerNames.model_validate(tomllib.loads((FOLDER / "containers.toml").read_text()))
