"""`modelgrove fsck`: does the hub still hold what it says?"""

from __future__ import annotations

import re

import click

from modelgrove_hub.cli.output import json_option, print_json, say
from modelgrove_hub.cli.work import open_hub
from modelgrove_hub.errors import DataError


def _checked(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch("[0-9a-f]{64}", value):
        raise click.BadParameter("64 digits, 0-9 and a-f, as `modelgrove events --head` prints them")
    return value


@click.command()
@click.option("--full", is_flag=True, help="Read and hash every byte, not only sizes and times.")
@click.option("--fix", is_flag=True, help="Put right what can be without losing anything.")
@click.option(
    "--head", metavar="HASH", callback=_checked, help="A head of the event log, noted earlier: it must be there."
)
@json_option
def fsck(full: bool, fix: bool, head: str | None, as_json: bool) -> None:
    """Check that database, event log, blob store and referenced files agree (exit code 5 if not)."""
    from modelgrove_hub.registry.events import START
    from modelgrove_hub.registry.events import head as head_of
    from modelgrove_hub.store.fsck import check

    hub = open_hub()
    with hub.reading() as session:
        events, newest = head_of(session)
    results = []
    for finding in check(hub, full=full, head=head or START):
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
        print_json({"findings": results, "remaining": remaining, "half_written_files_removed": swept, "head": newest})
    elif swept:
        click.echo(f"fixed: {swept} half-written files in the blob store")
    if remaining:
        raise DataError(f"{remaining} of the hub's rows and files do not agree")
    say(f"Rows and files agree. The event log ends at number {events} with head {newest}")
