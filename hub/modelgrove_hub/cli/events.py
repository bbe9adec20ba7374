"""`modelgrove events`: the audit trail, newest first."""

from __future__ import annotations

import json

import click

from modelgrove_hub.cli.output import json_option, print_json, print_table
from modelgrove_hub.cli.place import ask


@click.command()
@click.option("--head", is_flag=True, help="Print the log's head alone: note it elsewhere for `fsck --head`.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=30, show_default=True, help="How many at most.")
@json_option
def events(head: bool, limit: int, as_json: bool) -> None:
    """List what happened, newest first. `fsck` tells whether somebody changed it."""
    from modelgrove_hub.verbs.system import event_head, list_events

    if head:
        newest = ask(event_head)
        if as_json:
            print_json(newest.model_dump())
        else:
            click.echo(newest.head)
        return
    found = ask(list_events, limit=limit).items
    if as_json:
        print_json([event.model_dump() for event in found])
    else:
        rows = ((event.id, event.at, event.action, event.subject, json.dumps(event.detail)) for event in found)
        print_table(("event", "at", "action", "subject", "detail"), rows, empty="Nothing has happened yet.")
