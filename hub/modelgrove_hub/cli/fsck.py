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
    findings = []
    remaining = 0
    for finding in check(hub, full=full):
        fixed = fix and finding.fix is not None
        if finding.fix and fix:
            finding.fix(hub)
        remaining += not fixed
        state = "fixed" if fixed else finding.level
        findings.append(
            {
                "level": finding.level,
                "subject": finding.subject,
                "problem": finding.problem,
                "way_out": finding.way_out,
                "fixed": fixed,
            }
        )
        if not as_json:
            click.echo(
                f"{state}: {finding.subject}: {finding.problem}" + ("" if fixed else f". Way out: {finding.way_out}")
            )
    if as_json:
        print_json({"findings": findings, "remaining": remaining})
    if remaining:
        raise DataError(f"{remaining} of the hub's rows and files do not agree")
    say("Rows and files agree.")
