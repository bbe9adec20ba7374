"""`modelgrove worker` and `modelgrove up`: the processes that do the work, and those that serve beside them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from modelgrove_hub.cli.output import say
from modelgrove_hub.cli.serve import place_of, place_options, say_where

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelgrove_hub.api.server import Place
    from modelgrove_workers.embedded import Lane


@click.command()
@click.option("--queues", default="preview,cpu,io", show_default=True, help="Which queues to work on, comma-separated.")
@click.option("--concurrency", type=click.IntRange(1, 1024), help="Jobs at a time.  [default: number of cores]")
def worker(queues: str, concurrency: int | None) -> None:
    """Run jobs until stopped; any number may run, on any machine that reaches the database and the broker."""
    from modelgrove_workers.embedded import Lane, core_count

    names = tuple(name.strip() for name in queues.split(",") if name.strip())
    if not names:
        raise click.BadParameter("name at least one queue", param_hint="--queues")
    _run([Lane(names, concurrency or core_count())])


@click.command()
@place_options
@click.option(
    "--concurrency", type=click.IntRange(1, 1024), help="Jobs at a time, previews apart.  [default: half the cores]"
)
def up(concurrency: int | None, **options: Any) -> None:
    """Run all that a hub needs: the server, workers for all queues, so that previews never wait, and the schedule.

    On loopback everybody who reaches the server may do everything; on any other address it demands tokens.
    """
    from modelgrove_workers.embedded import Lane, core_count

    lanes = [Lane(("cpu",), concurrency or max(1, core_count() // 2)), Lane(("preview", "io"), 1)]
    _run(lanes, place_of(**options))


def _run(lanes: Sequence[Lane], place: Place | None = None) -> None:
    from modelgrove_hub.cli.work import open_hub
    from modelgrove_workers.app import make_app
    from modelgrove_workers.embedded import Supervisor, Web
    from modelgrove_workers.tasks import write_log

    hub = open_hub()
    make_app(hub.settings)  # refuses a broker that we do not support before anything starts
    write_log()
    with ExitStack() as stack:
        web = None
        if place is not None:
            from modelgrove_hub.api.server import listen

            web = Web(place, stack.enter_context(listen(place)))
            say_where(hub.settings, place, place.url(web.listener))
        where = "its broker" if hub.settings.broker_url else f"{hub.settings.queue}"
        said = ", ".join(map(str, lanes))
        say(f"Workers for {hub.settings.home}: {said}; messages through {where}. Ctrl-C stops.")
        Supervisor(hub, lanes, web).run()
    say("Stopped.")
