"""`modelgrove fsck`: does the hub still hold what it says?"""

from __future__ import annotations

import re

import click

from modelgrove_hub.cli.output import json_option, print_json, say
from modelgrove_hub.cli.place import ask
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
    from modelgrove_hub.verbs.system import fsck as verb

    found = ask(verb, full=full, fix=fix, **({"head": head} if head else {}))
    if as_json:
        print_json(found.model_dump(exclude={"events"}))
    else:
        for one in found.findings:
            line = f"{one.subject}: {one.problem}"
            click.echo(f"fixed: {line}" if one.fixed else f"{one.level}: {line}. Way out: {one.way_out}")
        if found.half_written_files_removed:
            click.echo(f"fixed: {found.half_written_files_removed} half-written files in the blob store")
    if found.remaining:
        raise DataError(f"{found.remaining} of the hub's rows and files do not agree")
    say(f"Rows and files agree. The event log ends at number {found.events} with head {found.head}")
