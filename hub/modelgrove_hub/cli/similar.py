"""`modelgrove similar`: find models that do what a given model does."""

from __future__ import annotations

from typing import Any

import click

from modelgrove_hub.cli.output import json_option
from modelgrove_hub.cli.search import filter_options, show_answer
from modelgrove_hub.cli.work import open_hub


@click.command()
@click.argument("model")
@filter_options
@click.option("--limit", type=click.IntRange(1, 1000), default=10, show_default=True)
@json_option
def similar(model: str, limit: int, as_json: bool, **filters: Any) -> None:
    """Find the models that do most nearly what MODEL does. Scores are cosines of their vectors."""
    from modelgrove_hub.search.filters import Filters
    from modelgrove_hub.search.query import similar as ask

    show_answer(ask(open_hub(), model, Filters(**filters), limit), as_json=as_json, empty="Nothing to compare with.")
