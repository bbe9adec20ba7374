"""`modelgrove key`: secrets of marks. Making one commits to it in the event log; the secret stays in its file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from modelgrove_hub.cli.output import json_option, print_facts, print_json, print_table, say
from modelgrove_hub.cli.place import ask

if TYPE_CHECKING:
    from modelgrove_hub.verbs.keys import KeyFacts

_DEFAULT_BITS = 128


@click.group()
def key() -> None:
    """Secret keys of marks. Make one before a model is released: only then is its test exact."""


@key.command()
@click.argument("name")
@click.option(
    "--bits", type=click.IntRange(20, 512), default=_DEFAULT_BITS, show_default=True, help="Bits that are read with it."
)
@json_option
def new(name: str, bits: int, as_json: bool) -> None:
    """Draw a secret, and commit to it in the event log."""
    from modelgrove_hub.verbs.keys import NewKey, new_key

    _show(ask(new_key, wanted=NewKey(name=name, bits=bits)), as_json)
    if not as_json:
        say("Keep a copy of the file: without it no mark can be shown. Publish the commitment, and it proves the date.")


@key.command("ls")
@json_option
def list_all(as_json: bool) -> None:
    """List keys, oldest first."""
    from modelgrove_hub.verbs.keys import list_keys

    rows = [found.model_dump() for found in ask(list_keys)]
    if as_json:
        print_json(rows)
        return
    print_table(
        ("name", "commitment", "bits", "committed", "secret"),
        ((row["name"], row["id"][:16], row["bits"], row["committed_at"], _where(row)) for row in rows),
        empty="No key yet. Next: modelgrove key new NAME",
    )


@key.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show a key's commitment, when it was made, and where its secret lies; never the secret."""
    from modelgrove_hub.verbs.keys import show_key

    _show(ask(show_key, key=name), as_json)


def _show(found: KeyFacts, as_json: bool) -> None:
    facts = found.model_dump()
    if as_json:
        print_json(facts)
        return
    print_facts(
        [
            ("name", facts["name"]), ("commitment", facts["id"]), ("bits", facts["bits"]),
            ("committed", facts["committed_at"]), ("event", facts["event"]), ("secret", _where(facts)),
        ]
    )  # fmt: skip


def _where(facts: dict[str, Any]) -> str:
    return facts["secret_file"] if facts["here"] else "not on this machine"
