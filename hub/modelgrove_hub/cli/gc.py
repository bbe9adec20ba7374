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
    from modelgrove_hub.store.gc import collect

    found = collect(open_hub(), dry_run=dry_run)
    size = sum(item.size for item in found.garbage if item.stored)
    if as_json:
        blobs, folders = [asdict(item) for item in found.garbage], [str(folder) for folder in found.folders]
        facts = {"blobs": blobs, "bytes": size, "folders": folders, "half_written_files": found.drafts}
        print_json({**facts, "removed": not dry_run})
        return
    for item in found.garbage:
        click.echo(f"{item.sha256}  {human_size(item.size) if item.stored else 'row only'}")
    for folder in found.folders:
        click.echo(f"{folder}  left by a job that died")
    if found.drafts:
        click.echo(f"{found.drafts} half-written files in the blob store")
    say(f"{'Would free' if dry_run else 'Freed'} {human_size(size)} in {len(found.garbage)} blobs.")
