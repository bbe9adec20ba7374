"""`modelgrove init`: make the hub's folder and its database."""

from __future__ import annotations

import click

from modelgrove_hub.cli.output import json_option, print_json, say


@click.command()
@json_option
def init(as_json: bool) -> None:
    """Make the hub's folder and database (again is harmless)."""
    from modelgrove_hub.settings import settings
    from modelgrove_migrations.run import upgrade

    config = settings()
    config.home.mkdir(parents=True, exist_ok=True)
    upgrade(config.database)
    if as_json:
        print_json({"home": str(config.home), "database": config.database, "store": config.store})
    else:
        say(f"The hub is ready in {config.home}. Next: modelgrove ingest PATH")
