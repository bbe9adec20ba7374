"""`modelgrove ls`: the registered models."""

from __future__ import annotations

from typing import Any

import click

from modelgrove_hub.cli.output import human_size, json_option, print_json, print_table
from modelgrove_hub.cli.work import open_hub


@click.command()
@click.argument("text", required=False)
@click.option("--kind", help="checkpoint, component, adapter, embedding or unknown.")
@click.option("--family", help="sd1, sdxl, flux, zoo …")
@click.option("--type", "adapter_type", help="Adapter type: lora, loha, dora …")
@click.option("--base", help="Declared base model.")
@click.option("--license", "licence", help="Licence, as the card says it.")
@click.option("--tag", help="A tag of the card.")
@click.option("--trust", type=click.Choice(["ok", "quarantined"]))
@click.option("--limit", type=click.IntRange(1, 10000), default=50, show_default=True)
@json_option
def ls(text: str | None, limit: int, as_json: bool, **filters: Any) -> None:
    """List models, newest first; TEXT filters by name."""
    from modelgrove_hub.registry.models import latest_revision, list_models

    hub = open_hub()
    with hub.reading() as session:
        models = list_models(session, text=text, limit=limit, **filters)
        rows = [(model, latest_revision(session, model)) for model in models]
    if as_json:
        print_json(
            [
                {**m.model_dump(exclude={"card"}), "size": r.size, "parameters": r.parameters, "revision": r.digest}
                for m, r in rows
            ]
        )
        return
    print_table(
        ("name", "kind", "family", "type", "size", "parameters", "licence"),
        (
            (m.name, m.kind, m.family, m.adapter_type, human_size(r.size), f"{r.parameters:,}", m.licence)
            for m, r in rows
        ),
        empty="No models here. Next: modelgrove ingest PATH",
    )
