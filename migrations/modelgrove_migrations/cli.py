"""`modelgrove db`: the database's schema."""

from __future__ import annotations

import click

from modelgrove_hub.cli.output import dry_run_option, json_option, print_json, say
from modelgrove_hub.errors import DataError


@click.group()
def db() -> None:
    """Bring the database's schema up to date, or back."""


@db.command()
@click.argument("revision", default="head")
@dry_run_option
@json_option
def upgrade(revision: str, dry_run: bool, as_json: bool) -> None:
    """Upgrade the schema to REVISION; a SQLite file is backed up first."""
    from modelgrove_hub.settings import settings
    from modelgrove_migrations import run

    url = settings().database
    steps = run.pending(url, revision)
    backup = None if dry_run else run.upgrade(url, revision)
    if as_json:
        print_json({"steps": steps, "done": not dry_run, "backup": backup and str(backup)})
        return
    for step in steps:
        click.echo(step)
    if not steps:
        say("The schema is up to date.")
    elif backup:
        say(f"The database as it was is in {backup}")


@db.command()
@click.argument("revision")
@click.confirmation_option("--yes", prompt="Going back drops tables or columns with all they hold. Go on?")
@json_option
def downgrade(revision: str, as_json: bool) -> None:
    """Take the schema back to REVISION ("base" drops everything); a SQLite file is backed up first."""
    from modelgrove_hub.settings import settings
    from modelgrove_migrations import run

    url = settings().database
    backup = run.downgrade(url, revision)
    if as_json:
        print_json({"revision": run.current(url), "backup": backup and str(backup)})
        return
    say(f"The schema is at {run.current(url) or 'base'}.")
    if backup:
        say(f"The database as it was is in {backup}")


@db.command()
@json_option
def current(as_json: bool) -> None:
    """Print the schema's revision."""
    from modelgrove_hub.settings import settings
    from modelgrove_migrations import run

    found, head = run.current(settings().database), run.head()
    if as_json:
        print_json({"current": found, "head": head})
    else:
        click.echo(f"{found or 'base'}{'' if found == head else f' (newest: {head})'}")


@db.command()
@json_option
def check(as_json: bool) -> None:
    """Check that the database and the code agree about the tables."""
    from modelgrove_hub.settings import settings
    from modelgrove_migrations import run

    differences = run.check(settings().database)
    if as_json:
        print_json({"differences": differences})
    elif not differences:
        say("The database and the code agree.")
    if differences:
        for difference in differences if not as_json else ():
            click.echo(difference)
        raise DataError(f"the database differs from the code in {len(differences)} place{'s'[: len(differences) != 1]}")
