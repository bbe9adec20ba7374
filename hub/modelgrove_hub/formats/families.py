"""Match a set of tensors with the signatures. The families are data; no family's name is in this code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from modelgrove_hub.formats.listing import ListedTensor
from modelgrove_hub.formats.naming import container_names
from modelgrove_hub.formats.patterns import any_of, is_literal
from modelgrove_hub.formats.signature import Layout, Marks, Signature, Size, Variant, load_signatures

Tensors = Mapping[str, ListedTensor]


@dataclass(frozen=True)
class Match:
    """A signature that fits, and how much of the tensors it explains."""

    signature: Signature
    layout: Layout
    variant: Variant | None
    explained: frozenset[str]
    total: int
    packed: bool
    """A quantizer's companions are there, so that packed sizes could not be compared."""

    @property
    def coverage(self) -> float:
        """Share of the tensors whose names belong to the layout."""
        return len(self.explained) / self.total

    @property
    def bases(self) -> tuple[str, ...]:
        """Families it goes with, when it is an adapter."""
        return self.variant.bases if self.variant and self.variant.bases else self.layout.bases


def match_families(tensors: Tensors, signatures: Sequence[Signature] | None = None) -> list[Match]:
    """All signatures whose marks the tensors bear and that explain enough of them, best coverage first.

    One is a verdict, none or several are not.
    """
    found: dict[str, Match] = {}
    network, companions = _without_packing(tensors)
    for signature in load_signatures() if signatures is None else signatures:
        for layout in signature.layouts:
            match = _match_layout(signature, layout, network, companions)
            if match and match.coverage >= layout.coverage:
                best = found.get(signature.name)
                if best is None or match.coverage > best.coverage:
                    found[signature.name] = match
    return sorted(found.values(), key=lambda match: -match.coverage)


def nearest_family(tensors: Tensors) -> Match | None:
    """The signature whose marks the tensors bear, though too many of them are strange to it."""
    network, companions = _without_packing(tensors)
    candidates = (
        _match_layout(signature, layout, network, companions)
        for signature in load_signatures()
        for layout in signature.layouts
    )
    return max((match for match in candidates if match), key=lambda match: match.coverage, default=None)


def size_fits(actual: Sequence[int | None], wanted: Sequence[Size]) -> bool:
    """Whether a shape is one of those a signature allows; None in `actual` is unknown and fits all."""
    if wanted and wanted[0] == "...":
        wanted = wanted[1:]
        if len(actual) < len(wanted):
            return False
        actual = actual[len(actual) - len(wanted) :]
    return len(actual) == len(wanted) and all(map(_side_fits, actual, wanted))


def _side_fits(side: int | None, wanted: Size) -> bool:
    return side is None or wanted == "*" or (side in wanted if isinstance(wanted, list) else side == wanted)


def _without_packing(tensors: Tensors) -> tuple[Tensors, frozenset[str]]:
    companions = frozenset(filter(container_names().is_packing, tensors))
    return ({name: tensors[name] for name in tensors if name not in companions} if companions else tensors), companions


def _match_layout(signature: Signature, layout: Layout, tensors: Tensors, companions: frozenset[str]) -> Match | None:
    if layout.most is not None and len(tensors) > layout.most:
        return None
    for prefix in layout.prefixes:
        if not all(prefix + name in tensors for name in layout.anchors):
            continue
        inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()} if prefix else tensors
        if not _bears(layout, inner, packed=bool(companions)):
            continue
        explained = frozenset(
            name
            for name in tensors
            if layout.explains.fullmatch(name.removeprefix(prefix)) or container_names().is_anywhere(name)
        )
        variant = next((v for v in layout.variants if _bears(v, inner, packed=bool(companions))), None)
        total = len(tensors) + len(companions)
        return Match(signature, layout, variant, explained | companions, total, bool(companions))
    return None


def _bears(marks: Marks, tensors: Tensors, *, packed: bool) -> bool:
    return (
        all(name in tensors for name in marks.anchors)
        and all(any(_fitting(pattern, tensors)) for pattern in marks.required if not is_literal(pattern))
        and all(_shape_agrees(pattern, size, tensors, packed=packed) for pattern, size in marks.shapes.items())
        and all(tensors[name].dtype in wanted for name, wanted in marks.dtypes.items() if name in tensors)
        and not any(any(_fitting(pattern, tensors)) for pattern in marks.forbidden)
    )


def _shape_agrees(pattern: str, wanted: Sequence[Size], tensors: Tensors, *, packed: bool) -> bool:
    found = list(_fitting(pattern, tensors))
    checked = [tensors[name] for name in found if not (packed and tensors[name].dtype in ("U8", "I8", "I32"))]
    return bool(found) and all(size_fits(tensor.shape, wanted) for tensor in checked)


def _fitting(pattern: str, names: Iterable[str]) -> Iterator[str]:
    if is_literal(pattern):
        if pattern in names:
            yield pattern
        return
    expression = any_of((pattern,))
    yield from (name for name in names if expression.fullmatch(name))
