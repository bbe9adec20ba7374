"""`modelgrove similar`: find models that do what a given model does."""

from __future__ import annotations

from typing import Any

import click

from modelgrove_hub.cli.output import json_option
from modelgrove_hub.cli.place import ask
from modelgrove_hub.cli.search import filter_options, show_answer


@click.command()
@click.argument("model")
@filter_options
@click.option("--limit", type=click.IntRange(1, 1000), default=10, show_default=True)
@json_option
def similar(model: str, limit: int, as_json: bool, **filters: Any) -> None:
    """Find the models that do most nearly what MODEL does. Scores are cosines of their vectors."""
    from modelgrove_hub.verbs.search import similar as verb

    answer = ask(verb, model=model, limit=limit, **filters)
    show_answer(answer, as_json=as_json, empty="Nothing to compare with.")
