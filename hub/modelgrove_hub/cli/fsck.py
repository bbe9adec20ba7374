"""`modelgrove fsck`: does the hub still hold what it says?"""

from __future__ import annotations

import click

from modelgrove_hub.cli.output import json_option, print_json, say
from modelgrove_hub.cli.work import open_hub
from modelgrove_hub.errors import DataError


@click.command()
@click.option("--full", is_flag=True, help="Read and hash every byte, not only sizes and times.")
@click.option("--fix", is_flag=True, help="Put right what can be without losing anything.")
@json_option
def fsck(full: bool, fix: bool, as_json: bool) -> None:
    """Check that database, blob store and referenced files agree (exit code 5 if not)."""
    from modelgrove_hub.store.fsck import check

    hub = open_hub()
    results = []
    for finding in check(hub, full=full):
        fixed = False
        if fix and finding.fix is not None:
            finding.fix(hub)
            fixed = True
        facts = {name: getattr(finding, name) for name in ("level", "subject", "problem", "way_out")}
        results.append({**facts, "fixed": fixed})
        if not as_json:
            line = f"{finding.subject}: {finding.problem}"
            click.echo(f"fixed: {line}" if fixed else f"{finding.level}: {line}. Way out: {finding.way_out}")
    swept = hub.store.sweep(hub.settings.gc_grace_seconds) if fix else 0
    remaining = sum(not result["fixed"] for result in results)
    if as_json:
        print_json({"findings": results, "remaining": remaining, "half_written_files_removed": swept})
    elif swept:
        click.echo(f"fixed: {swept} half-written files in the blob store")
    if remaining:
        raise DataError(f"{remaining} of the hub's rows and files do not agree")
    say("Rows and files agree.")
