"""`modelgrove gc`: free the space of what was forgotten."""

from __future__ import annotations

import click

from modelgrove_hub.cli.output import dry_run_option, human_size, json_option, print_json, say
from modelgrove_hub.cli.place import ask


@click.command()
@dry_run_option
@json_option
def gc(dry_run: bool, as_json: bool) -> None:
    """Remove stored files that no model, expert or job names.

    Files younger than the grace time (MODELGROVE_GC_GRACE_SECONDS) are kept, as are all files
    that are referenced where they lie. What killed processes left half-written goes too.
    """
    from modelgrove_hub.verbs.system import gc as verb

    found = ask(verb, dry_run=dry_run)
    if as_json:
        print_json(found.model_dump())
        return
    for item in found.blobs:
        click.echo(f"{item.sha256}  {human_size(item.size) if item.stored else 'row only'}")
    for folder in found.folders:
        click.echo(f"{folder}  left by a job that died")
    if found.half_written_files:
        click.echo(f"{found.half_written_files} half-written files in the blob store")
    say(f"{'Would free' if dry_run else 'Freed'} {human_size(found.bytes)} in {len(found.blobs)} blobs.")
