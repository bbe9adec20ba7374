"""Give work to the hub from the command line: submit, watch, or run it here."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import click

from modelgrove_hub.cli.output import print_json, progress_bar, say
from modelgrove_hub.errors import JobFailedError

if TYPE_CHECKING:
    from modelgrove_hub.hub import Hub
    from modelgrove_hub.verbs.facts import JobFacts
    from modelgrove_hub.verbs.jobs import Work

Command = TypeVar("Command", bound=Callable[..., Any])

_POLL = 0.2


class AtOnce(TypedDict):
    """Where a job is run, for `do`."""

    local: bool
    wait: bool


_HINT_AFTER = 5.0


def work_options(command: Command) -> Command:
    """`--wait`, `--local` and `--key`, as every command that makes a job has them."""
    command = click.option("--key", default=None, help="Idempotency key: the same key gives the same job.")(command)
    return place_options(command)


def place_options(command: Command) -> Command:
    """`--wait` and `--local` alone, for commands whose `--key` is a mark's."""
    command = click.option("--local", is_flag=True, help="Run it here and now, without a worker.")(command)
    return click.option("--wait", is_flag=True, help="Wait for the worker and show its progress.")(command)


def open_hub() -> Hub:
    """The hub of the settings, with its schema checked."""
    from modelgrove_hub.hub import Hub
    from modelgrove_hub.registry.schema import require_current

    hub = Hub.open()
    click.get_current_context().call_on_close(hub.engine.dispose)
    require_current(hub.engine)
    return hub


def resolve(hub: Hub, reference: str) -> int:
    """The revision id of a model's reference.

    Raises:
        NotFoundError: it names nothing.
    """
    from modelgrove_hub.registry.models import find_revision

    with hub.reading() as session:
        return find_revision(session, reference).id or 0


def do(
    plugin: str, params: Mapping[str, Any], models: Sequence[str], *, target: str | None = None, wait: bool = False,
    local: bool = False, key: str | None = None,
) -> JobFacts:  # fmt: skip
    """Submit a job on models and, as the user asked, run it here, wait for it or leave it to the workers.

    Raises:
        UsageError: it is another hub's, and was to be run here.
        JobFailedError: it was run or waited for, and failed.
    """
    from modelgrove_hub.verbs.jobs import Work

    work = Work(plugin=plugin, params=dict(params), models=list(models), target=target, key=key)
    return do_work(work, wait=wait, local=local)


def do_work(work: Work, *, wait: bool = False, local: bool = False) -> JobFacts:
    """The same for work that the hub has put together.

    Raises:
        UsageError, JobFailedError: as `do`.
    """
    from modelgrove_hub.cli.place import ask, only_here
    from modelgrove_hub.verbs.jobs import create_job, submit_job

    if not local:
        job = ask(submit_job, work=work)
        return follow(job.id) if wait else job
    from modelgrove_hub.jobs.run import run_local
    from modelgrove_hub.verbs.facts import JobFacts

    only_here("--local")
    hub = open_hub()
    update, close = progress_bar(work.plugin)
    try:
        # Libraries print to stdout (huggingface_hub does, on a race of its imports); our data must stay clean.
        with redirect_stdout(sys.stderr):
            return _checked(JobFacts.of(run_local(hub, create_job(hub, work).id, on_progress=update)))
    finally:
        close()


def at_once() -> AtOnce:
    """How commands run what they answer with: here, or on the workers of the hub that was named."""
    from modelgrove_hub.cli.place import hub_url

    return AtOnce(local=not hub_url(), wait=True)


def follow(job_id: str) -> JobFacts:
    """Show a job's progress until it ends. Ctrl-C leaves the job running."""
    from modelgrove_hub.cli.place import ask
    from modelgrove_hub.verbs.jobs import show_job as get

    update, close = progress_bar(f"job {job_id[:8]}")
    started, hinted = time.monotonic(), False
    try:
        while not (job := ask(get, job=job_id)).finished_at:
            update(job.progress, job.message)
            if not hinted and not job.attempts and time.monotonic() - started > _HINT_AFTER:
                hinted = True
                say("No worker has taken the job yet: start one with `modelgrove worker`, or run again with --local.")
            time.sleep(_POLL)
    except KeyboardInterrupt:
        say(f"The job goes on. Watch it again: modelgrove jobs wait {job_id}")
        raise
    finally:
        close()
    return _checked(job)


def show_job(job: JobFacts, *, as_json: bool) -> None:
    """Print a job as the end of a command."""
    if as_json:
        print_json(job.model_dump(exclude={"log"}))
    elif job.finished_at is None:
        say(f"Job {job.id} is {job.state}. Watch it: modelgrove jobs wait {job.id}")
        click.echo(job.id)
    else:
        for name in job.outputs.get("models", []):
            click.echo(name)


def _checked(job: JobFacts) -> JobFacts:
    if job.state != "done":
        raise JobFailedError(f"job {job.id} ({job.plugin}) {job.state}: {job.error or 'no reason was recorded'}")
    return job
