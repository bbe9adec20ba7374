"""`modelgrove rm`: forget a model."""

from __future__ import annotations

import click

from modelgrove_hub.cli.output import dry_run_option, json_option, print_json, say
from modelgrove_hub.cli.work import open_hub


@click.command()
@click.argument("models", nargs=-1, required=True)
@dry_run_option
@json_option
def rm(models: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Forget MODELS. Referenced files stay where they are; stored blobs go at the next `gc`."""
    from modelgrove_hub.registry.models import find, remove

    hub = open_hub()
    with hub.transaction() as session:
        names = [find(session, model).name for model in models]
        if not dry_run:
            for name in names:
                remove(session, name)
    if as_json:
        print_json({"removed": [] if dry_run else names, "would_remove": names if dry_run else []})
    else:
        say(f"{'Would forget' if dry_run else 'Forgot'} {', '.join(names)}")
