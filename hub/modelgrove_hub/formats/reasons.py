"""The sentences that say why a verdict was reached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from modelgrove_hub.formats.families import nearest_family
from modelgrove_hub.formats.listing import ListedTensor, Listing, Role
from modelgrove_hub.formats.parts import Part
from modelgrove_hub.formats.provenance import declared_families
from modelgrove_hub.formats.quantized import KEY
from modelgrove_hub.formats.texts import readable

NUMBERED = (
    "vectors numbered from 0, as SaRA's optimizer saves them: new values of the weights that were small in its base, "
    "whose places it does not tell. Load it onto that base by its own code, save the whole network as safetensors, "
    "and run `modelgrove merge NETWORK --base BASE --method sara --threshold T` with the threshold of its training"
)


def part_reasons(parts: Sequence[Part]) -> Iterator[str]:
    """What told each part's family."""
    for part in parts:
        where = f"{part.name}: " if part.name else ""
        if part.match:
            match = part.match
            variant = f", variant {match.variant.name}" if match.variant else ""
            proof = ", ".join(match.layout.anchors[:2]) or "their few names"
            yield (
                f"{where}{match.signature.title} in the {match.layout.name} layout{variant}: "
                f"{len(part.explained)} of {len(part.tensors)} tensor names are explained; told by {proof}"
            )
            if match.packed:
                yield f"{where}a quantizer's tensors are there: packed sizes were not compared"
        elif part.delta:
            yield from (where + reason for reason in part.delta.reasons)
        elif part.tensors:
            yield from (where + reason for reason in _nearest_note(part.tensors))


def why_unknown(parts: Sequence[Part], listing: Listing) -> Iterator[str]:
    """Why there is no verdict."""
    if listing.pickles and not listing.tensors:
        yield "the weights are in a pickle, which is not opened to look for tensors"
    elif not listing.tensors:
        yield "there are no tensors"
    else:
        for part in parts:
            yield from _nearest_note(part.tensors)


def _nearest_note(tensors: Mapping[str, ListedTensor]) -> Iterator[str]:
    near = nearest_family(tensors)
    if near:
        yield f"marks of {near.signature.name} are there, but it explains only {near.coverage:.0%} of the tensors"
    elif tensors:
        yield "no signature's marks are among the tensors"


def config_notes(parts: Sequence[Part], listing: Listing) -> Iterator[str]:
    """What the configs claim, held against what the tensors show."""
    for part in parts:
        path = f"{part.name}/config.json" if part.name else "config.json"
        config = listing.configs.get(path, {})
        claims = [config.get("_class_name"), config.get("model_type")]
        if listing.format == "gguf":
            claims.append(listing.metadata.get("general.architecture"))
        claimed = [readable(text, 100) for text in claims if isinstance(text, str)]
        if not claimed or not part.match:
            continue
        hints = part.match.signature.config
        expected = {*hints.class_names, *hints.model_types, *hints.architectures}
        where = f"{part.name}/config" if part.name else "the config"
        if expected and not expected & set(claimed):
            family = part.match.signature.name
            yield f"{where} claims {' / '.join(claimed)}, which does not go with {family}: the tensors decide"
        elif expected:
            yield f"{where} agrees: {' / '.join(claimed)}"


def format_notes(listing: Listing) -> Iterator[str]:
    """What the format hides or changes."""
    if listing.format == "onnx":
        plain = sum("." not in name for name in listing.tensors)
        yield f"an ONNX graph, seen as its {len(listing.tensors)} initialisers; {plain} of them are constants"
    if KEY in listing.metadata:
        yield "packed by modelgrove: names, dtypes and shapes are judged as they were before"
    yield from listing.notes


def claim_notes(bases: Sequence[str], base: str | None, claims: Mapping[str, Any]) -> Iterator[str]:
    """What the metadata claim beyond the tensors, or against them."""
    if merged := claims.get("merged_from"):
        yield f"its metadata call it a merge of {str(merged)[:200]}"
    if base and bases:
        declared = declared_families(base)
        if declared and not set(declared) & set(bases):
            yield f"it declares {base[:100]} as its base, but its tensors fit {', '.join(bases)}"


def code_claims(listing: Listing) -> Iterator[str]:
    """What the configs ask a loader to run: Python of the folder, or of another repository."""
    for path, config in listing.configs.items():
        if isinstance(config.get("auto_map"), Mapping) and config["auto_map"]:
            yield f"{path} maps classes to Python code (auto_map)"
        if config.get("custom_pipeline") or isinstance(config.get("_class_name"), list):
            yield f"{path} names a custom pipeline"
        parts = [name for name, value in config.items() if isinstance(value, list) and _is_local(value)]
        if path.endswith("model_index.json") and parts:
            yield f"{path} takes its {readable(parts[0], 60)!a} from Python code"


def _is_local(component: Sequence[Any]) -> bool:
    """diffusers looks such a component up in its cache of modules that were made of a repository's files."""
    return bool(component) and isinstance(component[0], str) and component[0].startswith("diffusers_modules")


def trust_notes(listing: Listing) -> Iterator[str]:
    """What in the files could run code."""
    yield from (f"{claim}, which a loader might run: quarantined" for claim in code_claims(listing))
    for path, report in listing.pickles.items():
        imports = f"; it imports {readable(', '.join(report.imports[:8]), 300)}" if report.imports else ""
        yield f"{path} is a pickle ({report.wrapping}), which can run code when read: quarantined{imports}"
    for path, role in listing.files.items():
        if role is Role.CODE:
            yield f"{path} is Python code that a loader might run: quarantined"
        elif role is Role.PICKLE and path not in listing.pickles:
            yield f"{path} is called like a pickle and was not opened; the weights are read from elsewhere"
