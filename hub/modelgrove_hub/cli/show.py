"""`modelgrove show`: everything known about one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from modelgrove_hub.cli.output import human_size, json_option, print_facts, print_json, say
from modelgrove_hub.cli.work import open_hub

if TYPE_CHECKING:
    from modelgrove_hub.hub import Hub
    from modelgrove_hub.tables import Model

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
    from modelgrove_hub.registry.attestations import attestations_of
    from modelgrove_hub.registry.lineage import children, parents
    from modelgrove_hub.registry.models import files_of, find, find_revision
    from modelgrove_hub.search.query import looks_like
    from modelgrove_hub.tables import AttestationKind

    hub = open_hub()
    with hub.reading() as session:
        row, revision = find(session, model), find_revision(session, model)
        files = files_of(session, revision)
        up = [link.describe() for link in parents(session, revision)]
        down = [link.describe() for link in children(session, revision)]
        attested = {str(kind): attestations_of(session, revision.id or 0, kind) for kind in AttestationKind}
    if provenance:
        _print_documents(hub, attested[AttestationKind.PROVENANCE])
        return
    looks = looks_like(hub, revision.id)
    facts = {
        **row.model_dump(),
        "looks_like": looks,
        "revision": revision.model_dump(),
        "files": files,
        "parents": up,
        "children": down,
        "attestations": attested,
    }
    if as_json:
        print_json(facts)
        return
    summary = revision.summary
    print_facts(
        [
            ("name", row.name),
            ("kind", " ".join(filter(None, (row.kind, row.adapter_type)))),
            ("family", " ".join(filter(None, (row.family, summary.get("variant"))))),
            *_looks(summary),
            ("trust", row.trust),
            ("base", row.declared_base or ", ".join(summary.get("base_candidates", []))),
            ("tree", _tree(row)),
            ("looks like", looks),
            ("licence", row.licence),
            ("tags", row.tags),
            ("size", human_size(revision.size)),
            ("parameters", f"{revision.parameters:,}"),
            ("revision", revision.digest[:12]),
            ("parents", up),
            ("children", down),
            *((kind, [sha256[:12] for sha256 in found]) for kind, found in attested.items()),
            *(("" if number else "why", reason) for number, reason in enumerate(summary.get("reasons", []))),
        ]
    )
    for file in files:
        click.echo(f"  {file['path']}  {human_size(file['size'])}  {file['sha256'][:12]}")
    if row.card:
        lines = row.card.splitlines()
        click.echo("\n" + "\n".join(lines[:_CARD_LINES]))
        if len(lines) > _CARD_LINES:
            click.echo(f"… {len(lines) - _CARD_LINES} more lines of its card: modelgrove show {row.name} --json")


def _print_documents(hub: Hub, found: list[str]) -> None:
    for sha256 in found:
        with hub.store.open(sha256) as file:
            click.echo(file.read())
    if not found:
        say("No job of this hub made it.")


def _tree(model: Model) -> str:
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
