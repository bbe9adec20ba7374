"""`modelgrove show`: everything known about one model."""

from __future__ import annotations

import click

from modelgrove_hub.cli.output import human_size, json_option, print_facts, print_json
from modelgrove_hub.cli.work import open_hub

_CARD_LINES = 12


@click.command()
@click.argument("model")
@json_option
def show(model: str, as_json: bool) -> None:
    """Show what MODEL is, why we think so, its files and its family."""
    from modelgrove_hub.registry.lineage import children, parents
    from modelgrove_hub.registry.models import files_of, find, find_revision

    hub = open_hub()
    with hub.transaction() as session:
        row, revision = find(session, model), find_revision(session, model)
        files = files_of(session, revision)
        up = [link.describe() for link in parents(session, revision)]
        down = [link.describe() for link in children(session, revision)]
    facts = {**row.model_dump(), "revision": revision.model_dump(), "files": files, "parents": up, "children": down}
    if as_json:
        print_json(facts)
        return
    summary = revision.summary
    print_facts(
        [
            ("name", row.name),
            ("kind", " ".join(filter(None, (row.kind, row.adapter_type)))),
            ("family", " ".join(filter(None, (row.family, summary.get("variant"))))),
            ("trust", row.trust),
            ("base", row.declared_base or ", ".join(summary.get("base_candidates", []))),
            ("licence", row.licence),
            ("tags", row.tags),
            ("size", human_size(revision.size)),
            ("parameters", f"{revision.parameters:,}"),
            ("revision", revision.digest[:12]),
            ("parents", up),
            ("children", down),
            ("why", "; ".join(summary.get("reasons", []))),
        ]
    )
    for file in files:
        click.echo(f"  {file['path']}  {human_size(file['size'])}  {file['sha256'][:12]}")
    if row.card:
        lines = row.card.splitlines()
        click.echo("\n" + "\n".join(lines[:_CARD_LINES]))
        if len(lines) > _CARD_LINES:
            click.echo(f"… {len(lines) - _CARD_LINES} more lines of its card: modelgrove show {row.name} --json")
