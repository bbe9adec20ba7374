"""`modelgrove doctor`: is everything in order, and if not, what to do."""

from __future__ import annotations

import click

from modelgrove_hub.cli.output import json_option, print_json
from modelgrove_hub.cli.place import ask_any
from modelgrove_hub.errors import DataError


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check the hub's folder, database, store, broker, index and plugins."""
    from modelgrove_hub.verbs.system import doctor as verb

    checks = ask_any(verb)
    if as_json:
        print_json([check.model_dump() for check in checks])
    else:
        for check in checks:
            click.echo(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.seen}")
            if check.fix:
                click.echo(f"     → {check.fix}")
    if failed := [check.name for check in checks if not check.ok]:
        raise DataError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
