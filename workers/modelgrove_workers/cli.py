"""`modelgrove worker` and `modelgrove up`: the processes that do the work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from modelgrove_hub.cli.output import say

if TYPE_CHECKING:
    from collections.abc import Sequence

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
@click.option(
    "--concurrency", type=click.IntRange(1, 1024), help="Jobs at a time, previews apart.  [default: half the cores]"
)
def up(concurrency: int | None) -> None:
    """Run all that this machine needs: workers for all queues, so that previews never wait, and the schedule."""
    from modelgrove_workers.embedded import Lane, core_count

    _run([Lane(("cpu",), concurrency or max(1, core_count() // 2)), Lane(("preview", "io"), 1)])


def _run(lanes: Sequence[Lane]) -> None:
    from modelgrove_hub.cli.work import open_hub
    from modelgrove_workers.app import make_app
    from modelgrove_workers.embedded import Supervisor
    from modelgrove_workers.tasks import write_log

    hub = open_hub()
    make_app(hub.settings)  # refuses a broker that we do not support before anything starts
    write_log()
    where = "its broker" if hub.settings.broker_url else f"{hub.settings.queue}"
    say(f"Workers for {hub.settings.home}: {', '.join(map(str, lanes))}; messages through {where}. Ctrl-C stops.")
    Supervisor(hub, lanes).run()
    say("Stopped.")
