"""Say what a model is, from its listing alone, with the reasons. What is not known is "unknown"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from modelgrove_hub.formats.deltas import spread
from modelgrove_hub.formats.families import Match
from modelgrove_hub.formats.listing import Listing, Role
from modelgrove_hub.formats.parts import Part, read_parts
from modelgrove_hub.formats.provenance import declared_base, declared_licence, read_claims
from modelgrove_hub.formats.reasons import (
    NUMBERED,
    claim_notes,
    code_claims,
    config_notes,
    format_notes,
    part_reasons,
    trust_notes,
    why_unknown,
)
from modelgrove_hub.formats.texts import readable
from modelgrove_hub.tables import ModelKind, Trust

UNKNOWN = "unknown"
SAMPLE = 5
_ROLES = ("denoiser", "motion", "control", "encoder", "classifier", "autoencoder", "text-encoder", "image-encoder")
"""Which part of a composite model gives it its family: the first of these that it has."""


@dataclass(frozen=True)
class Recognition:
    """The verdict on a model, and why."""

    kind: ModelKind = ModelKind.UNKNOWN
    family: str = UNKNOWN
    variant: str | None = None
    adapter_type: str | None = None
    convention: str | None = None
    """How tensors are named: the layout of the signature, or kohya, diffusers, peft … for adapters."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """min, max, common."""
    alphas: Mapping[str, float] = field(default_factory=dict)
    targets: Mapping[str, int] = field(default_factory=dict)
    """Kinds of adapted modules → how many."""
    sections: Mapping[str, int] = field(default_factory=dict)
    """Adapted networks (denoiser, text_encoder …) → modules."""
    base_candidates: tuple[str, ...] = ()
    """For adapters and embeddings: the families whose models they fit."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Parts of a composite model → their families."""
    trust: Trust = Trust.OK
    coverage: float = 0.0
    """Share of the tensors that the verdict explains."""
    unmatched: tuple[str, ...] = ()
    """Some of the others."""
    reasons: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    declared_base: str | None = None
    licence: str | None = None
    format: str = UNKNOWN
    dtypes: Mapping[str, int] = field(default_factory=dict)
    tensors: int = 0
    parameters: int = 0

    @property
    def text_encoder(self) -> bool:
        """Whether an adapter also changes a text encoder."""
        return any(section.startswith("text_encoder") for section in self.sections)

    def summary(self) -> dict[str, Any]:
        """All of it as JSON values; empty fields are left out."""
        raw = {name: getattr(self, name) for name in self.__dataclass_fields__}
        raw |= {"coverage": round(self.coverage, 4), "kind": str(self.kind), "trust": str(self.trust)}
        if self.sections:
            raw["text_encoder"] = self.text_encoder
        return {key: _plain(value) for key, value in raw.items() if value is not None and value != () and value != {}}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def recognise(listing: Listing) -> Recognition:
    """Recognise a model. Never raises for odd tensors; an empty listing is unknown."""
    parts = list(read_parts(listing))
    verdict = _judge(parts, listing)
    reasons = [*verdict.reasons, *config_notes(parts, listing), *format_notes(listing), *trust_notes(listing)]
    claims = read_claims(listing)
    base = declared_base(listing)
    reasons += claim_notes(verdict.base_candidates, base, claims)
    return replace(
        verdict,
        trust=_trust(listing),
        reasons=tuple(reasons),
        metadata=claims,
        declared_base=base,
        licence=declared_licence(listing),
        format=listing.format,
        dtypes=dict(Counter(tensor.dtype for tensor in listing.tensors.values()).most_common()),
        tensors=len(listing.tensors),
        parameters=sum(prod(tensor.shape) for tensor in listing.tensors.values()),
    )


def _judge(parts: Sequence[Part], listing: Listing) -> Recognition:
    total = sum(len(part.tensors) for part in parts)
    strange = [part.full_name(name) for part in parts for name in part.tensors if name not in part.explained]
    notes = tuple(note for part in parts for note in part.notes)
    known = [part for part in parts if part.match or part.delta]
    frame = Recognition(
        coverage=1 - len(strange) / total if total else 0.0, unmatched=tuple(sorted(strange)[:SAMPLE]), reasons=notes
    )
    families = [part for part in known if part.match]
    if not listing.tensors and any(report.numbered for report in listing.pickles.values()):
        return replace(frame, kind=ModelKind.ADAPTER, adapter_type="sara", reasons=(*notes, NUMBERED))
    if not known or (not families and len(known) > 1 and len({part.delta.bases for part in known if part.delta}) > 1):
        return _judge_config(replace(frame, reasons=(*notes, *why_unknown(parts, listing))), listing)
    if not families:
        return _judge_delta(known, frame)
    return _judge_families(parts, families, frame, listing)


def _judge_config(verdict: Recognition, listing: Listing) -> Recognition:
    """An adapter of a method whose tensors are not known here is still what its configuration declares."""
    method = listing.configs.get("adapter_config.json", {}).get("peft_type")
    if not isinstance(method, str) or not listing.tensors:
        return verdict
    method = readable(method.lower(), 40)
    reason = f"adapter_config.json declares {method}; its tensors have the names of no method known here"
    return replace(verdict, kind=ModelKind.ADAPTER, adapter_type=method, reasons=(*verdict.reasons, reason))


def _judge_delta(parts: Sequence[Part], frame: Recognition) -> Recognition:
    deltas = [part.delta for part in parts if part.delta]
    types = {delta.adapter_type for delta in deltas}
    bases = deltas[0].bases
    sections: Counter[str] = Counter()
    targets: Counter[str] = Counter()
    for delta in deltas:
        sections.update(delta.sections)
        targets.update(delta.targets)
    ranks = [module.rank for delta in deltas for module in delta.modules if module.rank is not None]
    return replace(
        frame,
        kind=ModelKind.ADAPTER,
        family=bases[0] if len(bases) == 1 else UNKNOWN,
        adapter_type=types.pop() if len(types) == 1 else "mixed",
        convention=deltas[0].convention,
        ranks=spread(ranks),
        alphas=spread([alpha for delta in deltas for alpha in delta.alphas]),
        targets=dict(targets.most_common()),
        sections=dict(sections),
        base_candidates=bases,
        reasons=(*frame.reasons, *(reason for delta in deltas for reason in delta.reasons), _base_reason(bases)),
    )


def _base_reason(bases: tuple[str, ...]) -> str:
    if not bases:
        return "the adapted modules are those of no known family"
    if len(bases) > 1:
        return f"the adapted modules have the names and widths of {' and of '.join(bases)}: the base stays open"
    return f"the adapted modules have the names and widths of {bases[0]}"


def _judge_families(
    parts: Sequence[Part], families: Sequence[Part], frame: Recognition, listing: Listing
) -> Recognition:
    """The family of the leading part; the whole is a checkpoint when it has several."""
    ordered = sorted(families, key=_precedence)
    main = ordered[0].match
    if main is None:
        return frame
    several = len(families) > 1 or "model_index.json" in listing.configs
    lost = [part for part in parts if part.tensors and not (part.match or part.delta)]
    if several and main.layout.role not in ("denoiser", "encoder", "classifier") and lost:
        # The part that would give the family is the one that is not known.
        return replace(
            frame, kind=ModelKind.CHECKPOINT, parts=_part_names(parts), reasons=(*frame.reasons, *part_reasons(parts))
        )
    bases = main.bases
    mixed = any(part.delta for part in parts)
    return replace(
        frame,
        kind=ModelKind.CHECKPOINT if several and main.layout.kind is ModelKind.COMPONENT else main.layout.kind,
        family=(bases[0] if len(bases) == 1 else UNKNOWN) if main.signature.family_of_base else main.signature.name,
        variant=main.variant.name if main.variant else None,
        adapter_type="mixed" if mixed else _adapter_type(main),
        convention=main.layout.name,
        base_candidates=bases,
        parts=_part_names(parts) if len(parts) > 1 else {},
        reasons=(*frame.reasons, *part_reasons(parts)),
    )


def _adapter_type(match: Match) -> str | None:
    return match.signature.adapter_type if match.layout.kind in (ModelKind.ADAPTER, ModelKind.EMBEDDING) else None


def _precedence(part: Part) -> tuple[int, int]:
    role = part.match.layout.role if part.match else ""
    return (_ROLES.index(role) if role in _ROLES else len(_ROLES), -len(part.tensors))


def _part_names(parts: Sequence[Part]) -> dict[str, str]:
    def family(part: Part) -> str:
        return part.match.signature.name if part.match else part.delta.adapter_type if part.delta else UNKNOWN

    return {part.name or "whole": family(part) for part in parts if part.tensors}


def _trust(listing: Listing) -> Trust:
    unsafe = listing.pickles or Role.CODE in listing.files.values() or any(code_claims(listing))
    return Trust.QUARANTINED if unsafe else Trust.OK
