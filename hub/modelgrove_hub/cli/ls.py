"""`modelgrove ls`: the registered models."""

from __future__ import annotations

from typing import Any

import click

from modelgrove_hub.cli.output import human_size, json_option, print_json, print_table
from modelgrove_hub.cli.place import ask


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
    from modelgrove_hub.verbs.models import list_models

    models = ask(list_models, text=text, limit=limit, **filters).items
    if as_json:
        print_json([model.model_dump() for model in models])
        return
    print_table(
        ("name", "kind", "family", "type", "size", "parameters", "licence"),
        (
            (m.name, m.kind, m.family, m.adapter_type, human_size(m.size), f"{m.parameters:,}", m.licence)
            for m in models
        ),
        empty="No models here. Next: modelgrove ingest PATH",
    )
