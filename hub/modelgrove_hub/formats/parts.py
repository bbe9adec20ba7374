"""Divide a listing into the parts that a family or an adapter can be told from, and judge each.

A pipeline folder has its parts in subfolders; a single file keeps them under prefixes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from modelgrove_hub.formats.deltas import Delta, read_delta
from modelgrove_hub.formats.families import Match, match_families
from modelgrove_hub.formats.listing import ListedTensor, Listing
from modelgrove_hub.formats.naming import adapter_names, container_names

MIN_ADAPTER_COVERAGE = 0.9
"""Below this share of adapter tensors a file is a mixture."""


@dataclass(frozen=True)
class Part:
    """The verdict on one part of a model."""

    name: str
    tensors: Mapping[str, ListedTensor]
    match: Match | None = None
    delta: Delta | None = None
    notes: tuple[str, ...] = ()

    def full_name(self, tensor: str) -> str:
        """A tensor's name with its part's."""
        return f"{self.name}/{tensor}" if self.name else tensor

    @cached_property
    def explained(self) -> frozenset[str]:
        """Tensors that the verdict accounts for."""
        found = self.match.explained if self.match else self.delta.explained if self.delta else frozenset[str]()
        return found & self.tensors.keys()


def read_parts(listing: Listing) -> Iterator[Part]:
    """The parts of a model, judged; their tensors together are the model's."""
    for name, tensors in _split(listing):
        yield from _read_part(name, tensors, listing)


def _split(listing: Listing) -> Iterator[tuple[str, dict[str, ListedTensor]]]:
    """The parts of a folder, each with its tensors under their own names."""
    if not listing.parts:
        yield "", dict(listing.tensors)
        return
    parts: dict[str, dict[str, ListedTensor]] = {part: {} for part in listing.parts}
    for name, tensor in listing.tensors.items():
        part, _, inner = name.partition("/")
        parts[part][inner] = tensor
    yield from parts.items()


def _read_part(name: str, tensors: dict[str, ListedTensor], listing: Listing) -> Iterator[Part]:
    """Judge one folder part; a single file may hold several more under prefixes."""
    if listing.format == "onnx":
        # What has no dot is the exporter's: constants and folded weights, not parameters of a module.
        tensors = {key: tensor for key, tensor in tensors.items() if "." in key} or tensors
    whole = _match(name, tensors)
    if whole.match or not tensors:
        yield whole
        return
    delta = None
    if adapter_names().prove_adapter(tensors):
        config = listing.configs.get(f"{name}/adapter_config.json" if name else "adapter_config.json", {})
        scalars = {key.partition("/")[2] if name else key: value for key, value in listing.scalars.items()}
        delta = read_delta(tensors, scalars, config, listing.metadata)
    if delta and len(delta.explained) >= MIN_ADAPTER_COVERAGE * len(tensors):
        yield Part(name, tensors, delta=delta)
        return
    if delta:
        yield from _mixture(name, tensors, delta)
        return
    inside = list(_read_containers(name, tensors))
    yield from inside if any(part.match for part in inside) else [whole]


def _mixture(name: str, tensors: dict[str, ListedTensor], delta: Delta) -> Iterator[Part]:
    """Adapter tensors among others: both are judged, and the file is called what it is."""
    rest = {key: tensor for key, tensor in tensors.items() if key not in delta.explained}
    note = f"mixed file: {len(delta.explained)} adapter tensors ({delta.adapter_type}) beside {len(rest)} others"
    adapter = {key: tensors[key] for key in delta.explained}
    yield Part(f"{name}/adapter".strip("/"), adapter, delta=delta, notes=(note,))
    inside = list(_read_containers(name, rest))
    yield from inside if any(part.match for part in inside) else [_match(name or "others", rest)]


def _read_containers(name: str, tensors: Mapping[str, ListedTensor]) -> Iterator[Part]:
    names = container_names()
    groups: dict[str, dict[str, ListedTensor]] = defaultdict(dict)
    loose: dict[str, ListedTensor] = {}
    for key, tensor in tensors.items():
        if names.is_anywhere(key):
            loose[key] = tensor
            continue
        prefix = names.part_of(key)
        groups[prefix][key.removeprefix(prefix)] = tensor
    parts = [_match(f"{name}/{names.parts.get(p, 'others')}".strip("/"), group) for p, group in groups.items()]
    yield from parts
    if loose and parts:
        yield Part("schedule", {}, notes=(f"{len(loose)} tensors that any checkpoint may carry were passed over",))


def _match(name: str, tensors: Mapping[str, ListedTensor]) -> Part:
    matches = match_families(tensors)
    if len(matches) > 1:
        both = " and ".join(match.signature.name for match in matches)
        return Part(name, tensors, notes=(f"the tensors fit {both} alike",))
    return Part(name, tensors, match=matches[0] if matches else None)
