"""`modelgrove show`: everything known about one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from modelgrove_hub.cli.output import human_size, json_option, print_facts, print_json, say
from modelgrove_hub.cli.place import ask

if TYPE_CHECKING:
    from modelgrove_hub.verbs.facts import ModelDetail
    from modelgrove_hub.verbs.models import Document

_CARD_LINES = 12
_TARGETS = 8


@click.command()
@click.argument("model")
@click.option(
    "--provenance", is_flag=True, help="Print only the in-toto statements of the jobs that made it, one a line."
)
@json_option
def show(model: str, provenance: bool, as_json: bool) -> None:
    """Show what MODEL is, why we think so, its files and its family."""
    from modelgrove_hub.verbs.models import list_documents, show_model

    if provenance:
        _print_documents(ask(list_documents, model=model))
        return
    found = ask(show_model, model=model)
    if as_json:
        print_json(found.model_dump())
        return
    summary = found.content.summary
    print_facts(
        [
            ("name", found.name),
            ("kind", " ".join(filter(None, (found.kind, found.adapter_type)))),
            ("family", " ".join(filter(None, (found.family, summary.get("variant"))))),
            *_looks(summary),
            ("trust", found.trust),
            ("base", found.declared_base or ", ".join(summary.get("base_candidates", []))),
            ("tree", _tree(found)),
            ("looks like", found.looks_like),
            ("licence", found.licence),
            ("tags", found.tags),
            ("size", human_size(found.size)),
            ("parameters", f"{found.parameters:,}"),
            ("revision", found.revision[:12]),
            ("parents", [link.text for link in found.parents]),
            ("children", [link.text for link in found.children]),
            *((kind, [sha256[:12] for sha256 in documents]) for kind, documents in found.attestations.items()),
            *(("" if number else "why", reason) for number, reason in enumerate(summary.get("reasons", []))),
        ]
    )
    for file in found.files:
        click.echo(f"  {file.path}  {human_size(file.size)}  {file.sha256[:12]}")
    if found.card:
        lines = found.card.splitlines()
        click.echo("\n" + "\n".join(lines[:_CARD_LINES]))
        if len(lines) > _CARD_LINES:
            click.echo(f"… {len(lines) - _CARD_LINES} more lines of its card: modelgrove show {found.name} --json")


def _print_documents(documents: Sequence[Document]) -> None:
    for document in documents:
        click.echo(document.text)
    if not documents:
        say("No job of this hub made it.")


def _tree(model: ModelDetail) -> str:
    """The tree and why, and whether the weights bear out the declared base."""
    reason = model.tree_reason or {}
    said = f"{model.tree or 'none'}: {reason['said']}" if "said" in reason else model.tree or ""
    if reason.get("declared_agrees") is False:
        return f"{said}. It declares base {model.declared_base}, but its weights do not agree"
    return said


def _looks(summary: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What recognition saw, in words: how the weights are stored, what an adapter changes, what it is told by."""
    dtypes = ", ".join(f"{dtype} × {count}" for dtype, count in summary.get("dtypes", {}).items())
    yield "format", ": ".join(filter(None, (summary.get("format"), dtypes)))
    if ranks := summary.get("ranks"):
        low, high = ranks["min"], ranks["max"]
        yield "rank", str(low) if low == high else f"{low} to {high}, mostly {ranks['common']}"
    if sections := summary.get("sections"):
        yield "changes", ", ".join(f"{count} modules of the {part}" for part, count in sections.items())
    if targets := summary.get("targets"):
        yield "modules", ", ".join(f"{name} × {count}" for name, count in list(targets.items())[:_TARGETS])
    if parts := summary.get("parts"):
        yield "parts", ", ".join(f"{part}: {family}" for part, family in parts.items())
    claims = summary.get("metadata", {})
    yield "triggers", claims.get("trigger_words", [])
    yield "style tokens", claims.get("style_tokens", [])
    if broken := summary.get("not_finite"):
        yield "not finite", f"{broken['tensors']} tensors hold NaN or infinite values, first {broken['first']}"
    if summary.get("tensors"):
        yield "explained", f"{summary.get('coverage', 0):.0%} of {summary['tensors']} tensors"
