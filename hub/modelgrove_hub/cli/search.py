"""`modelgrove search`: find models by what they do."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from modelgrove_hub.cli.output import json_option, print_json, print_table, say
from modelgrove_hub.cli.work import open_hub

if TYPE_CHECKING:
    from modelgrove_hub.search.answers import Answer


@click.command()
@click.argument("text")
@click.option(
    "--by", type=click.Choice(["weights", "card", "both"]), default="both", show_default=True,
    help="What is compared with TEXT: what the weights do, what the card says, or both.",
)  # fmt: skip
@click.option("--kind", help="checkpoint, component, adapter, embedding or unknown.")
@click.option("--family", help="sd1, sdxl, flux, zoo …")
@click.option("--type", "adapter_type", help="Adapter type: lora, loha, dora …")
@click.option("--base", help="Declared base model.")
@click.option("--license", "licence", help="Licence, as the card says it.")
@click.option("--trust", type=click.Choice(["ok", "quarantined"]))
@click.option("--limit", type=click.IntRange(1, 1000), default=10, show_default=True)
@json_option
def search(text: str, by: Any, limit: int, as_json: bool, **filters: Any) -> None:
    """Find the models that do what TEXT says, with or without a card.

    Scores are standard deviations above what unrelated prompts get; "?" marks hits that any text
    might have brought.
    """
    from modelgrove_hub.search.query import Filters
    from modelgrove_hub.search.query import search as ask

    show_answer(ask(open_hub(), text, by, Filters(**filters), limit), as_json=as_json, empty="No models to search yet.")


def show_answer(answer: Answer, *, as_json: bool, empty: str) -> None:
    """Print hits and notes."""
    if as_json:
        print_json(asdict(answer))
        return
    print_table(
        ("", "score", "name", "found by", "type", "family", "licence", "tags"),
        (
            (place, f"{hit.score:.2f}{'' if hit.sure else ' ?'}", hit.name, hit.found_by, hit.adapter_type or hit.kind,
             hit.family, hit.licence, hit.tags)
            for place, hit in enumerate(answer.hits, 1)
        ),
        empty=empty,
    )  # fmt: skip
    for note in answer.notes:
        say(note)
