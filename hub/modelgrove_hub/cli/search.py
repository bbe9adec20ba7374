"""`modelgrove search`: find models by what they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import click

from modelgrove_hub.cli.output import json_option, print_json, print_table, say
from modelgrove_hub.cli.place import ask

if TYPE_CHECKING:
    from modelgrove_hub.search.answers import Answer

Command = TypeVar("Command", bound=Callable[..., Any])


def filter_options(command: Command) -> Command:
    """The options that say which models are looked at, as `search` and `similar` have them."""
    for option in reversed(
        (
            click.option("--kind", help="checkpoint, component, adapter, embedding or unknown."),
            click.option("--family", help="sd1, sdxl, flux, zoo …"),
            click.option("--type", "adapter_type", help="Adapter type: lora, loha, dora …"),
            click.option("--base", help="Declared base, with or without its owner, or a family that the weights fit."),
            click.option("--license", "licence", help="Licence, as the card says it."),
            click.option("--rank", help="Rank of all modules of an adapter: 16, or a range: 4-16, ..16, 16.."),
            click.option("--trust", type=click.Choice(["ok", "quarantined"])),
        )
    ):
        command = option(command)
    return command


@click.command()
@click.argument("text")
@click.option(
    "--by", type=click.Choice(["weights", "card", "both"]), default="both", show_default=True,
    help="What is compared with TEXT: what the weights do, what the card says, or both.",
)  # fmt: skip
@filter_options
@click.option("--limit", type=click.IntRange(1, 1000), default=10, show_default=True)
@json_option
def search(text: str, by: Any, limit: int, as_json: bool, **filters: Any) -> None:
    """Find the models that do what TEXT says, with or without a card.

    Scores are standard deviations above what unrelated prompts get at best; "?" marks hits that any text
    might have brought. Upper and lower case are the same to filters.
    """
    from modelgrove_hub.verbs.search import search as verb

    answer = ask(verb, text=text, by=by, limit=limit, **filters)
    show_answer(answer, as_json=as_json, empty="No models to search yet.")


def show_answer(answer: Answer, *, as_json: bool, empty: str) -> None:
    """Print hits and notes; `empty` when there are neither."""
    if as_json:
        print_json(asdict(answer))
        return
    if answer.hits or not answer.notes:
        _print_hits(answer, empty)
    for note in answer.notes:
        say(note)


def _print_hits(answer: Answer, empty: str) -> None:
    print_table(
        ("", "score", "name", "looks like", "found by", "type", "family", "licence", "tags"),
        (
            (place, f"{hit.score:.2f}{'' if hit.sure else ' ?'}", hit.name, hit.looks_like, hit.found_by,
             hit.adapter_type or hit.kind, hit.family, hit.licence, hit.tags)
            for place, hit in enumerate(answer.hits, 1)
        ),
        empty=empty,
    )  # fmt: skip
