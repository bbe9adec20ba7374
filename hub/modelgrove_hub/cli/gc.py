"""`modelgrove gc`: free the space of what was forgotten."""

from __future__ import annotations

from dataclasses import asdict

import click

from modelgrove_hub.cli.output import dry_run_option, human_size, json_option, print_json, say
from modelgrove_hub.cli.work import open_hub


@click.command()
@dry_run_option
@json_option
def gc(dry_run: bool, as_json: bool) -> None:
    """Remove stored files that no model, expert or job names.

    Files younger than the grace time (MODELGROVE_GC_GRACE_SECONDS) are kept, as are all files
    that are referenced where they lie. What killed processes left half-written goes too.
    """
    from modelgrove_hub.store.gc import find_garbage, find_leftovers, remove_garbage, remove_leftovers

    hub = open_hub()
    items, folders = find_garbage(hub), find_leftovers(hub)
    if not dry_run:
        remove_leftovers(hub, folders)
        items = list(remove_garbage(hub, items))
    size = sum(item.size for item in items if item.stored)
    if as_json:
        blobs = [asdict(item) for item in items]
        print_json(
            {"blobs": blobs, "bytes": size, "folders": [str(folder) for folder in folders], "removed": not dry_run}
        )
        return
    for item in items:
        click.echo(f"{item.sha256}  {human_size(item.size) if item.stored else 'row only'}")
    for folder in folders:
        click.echo(f"{folder}  left by a job that died")
    say(f"{'Would free' if dry_run else 'Freed'} {human_size(size)} in {len(items)} blobs.")
