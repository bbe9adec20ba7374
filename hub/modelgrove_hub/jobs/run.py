"""Run one job: claim, work in a staging folder, and either everything it made is registered or nothing.

Workers and `--local` share this code. Delivery is at least once, effects are exactly once:
what a run wrote becomes visible in the same transaction that marks the job done, and that
transaction first asks whether the job is still this run's.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlmodel import col, select

from modelgrove_hub.contracts import Cancelled, Kind, Plugin, Result
from modelgrove_hub.errors import DataError, ModelgroveError, PluginError, StorageError, UsageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.jobs import rows
from modelgrove_hub.jobs.context import JobContext
from modelgrove_hub.jobs.lease import Lease, LostLease
from modelgrove_hub.plugins import check_params, find_plugin, get_plugin
from modelgrove_hub.registry.blobs import name_blobs
from modelgrove_hub.tables import Blob, Job, JobState

if TYPE_CHECKING:
    from modelgrove_hub.registry.inputs import RegisteredModel

LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.2
_LONGEST_DELAY = 600.0
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE}

OnProgress = Callable[[float, str], None]


class Interrupted(BaseException):
    """Raised in a worker that must stop now; the job goes back to the queue."""


def run_job(
    hub: Hub, job_id: str, owner: str, *,
    on_progress: OnProgress | None = None, on_hang: Callable[[], None] | None = None,
) -> str | None:  # fmt: skip
    """Run the job if it is there to be had; the state it was left in, or None when it is someone else's.

    `on_hang` is called from another thread when a cancel is not obeyed for a whole lease.

    Raises:
        StorageError: the database did not let it be claimed.
    """
    with hub.transaction() as session:
        job = rows.claim(session, job_id, owner, hub.settings.lease_seconds)
    if job is None:
        return None
    LOG.info("job %s: %s, attempt %d", job.id, job.plugin, job.attempts)
    try:
        state = _guarded(hub, job, owner, on_progress, on_hang)
    except StorageError as error:
        LOG.error("job %s: its end was not written, it will be taken back: %s", job.id, error)
        return None
    LOG.info("job %s: %s", job.id, state or "taken back while it ran")
    return state


def run_local(hub: Hub, job_id: str, on_progress: OnProgress | None = None) -> Job:
    """Run a job in this process until it is over, retries included; if a worker has it, wait for that worker."""
    while True:
        run_job(hub, job_id, rows.new_owner(), on_progress=on_progress)
        job = rows.get(hub, job_id)
        if job.finished_at is not None:
            return job
        if on_progress:
            on_progress(job.progress, job.message or job.error or "")
        time.sleep(_POLL_SECONDS)


def sweep(hub: Hub) -> int:
    """Remove staging folders of jobs that are not running, left by killed workers. Returns how many."""
    folders = [folder for folder in _staging(hub).glob("*-*") if folder.is_dir()]
    names = {folder.name.rpartition("-")[0] for folder in folders}
    running = select(Job.id).where(col(Job.id).in_(names), col(Job.state) == JobState.RUNNING)
    with hub.transaction() as session:
        busy = set(session.exec(running)) if names else set()
    idle = [folder for folder in folders if folder.name.rpartition("-")[0] not in busy]
    for folder in idle:
        shutil.rmtree(folder, ignore_errors=True)
    return len(idle)


def _guarded(
    hub: Hub, job: Job, owner: str, on_progress: OnProgress | None, on_hang: Callable[[], None] | None
) -> str | None:
    """One attempt, with every way it can end written to the row (if it is still ours)."""
    try:
        with Lease(hub, job.id, owner, on_hang) as lease, _folder(hub, job) as folder:
            _attempt(hub, job, lease, folder, on_progress)
        return JobState.DONE
    except LostLease:
        return None
    except (Cancelled, KeyboardInterrupt) as end:
        _settle(hub, rows.stop, job, owner)
        if isinstance(end, KeyboardInterrupt):
            raise
        return JobState.CANCELLED
    except Interrupted:
        _settle(hub, rows.give_back, job, owner)
        raise
    except StorageError as error:
        return _again(hub, job, owner, str(error))
    except (DataError, UsageError, PluginError) as error:
        return _failed(hub, job, owner, str(error))
    except (Exception, SystemExit) as error:  # noqa: BLE001  (a plugin may raise anything, and that is its author's fault)
        if isinstance(error, OSError) and error.errno in _DISK:
            return _again(hub, job, owner, f"{type(error).__name__}: {error}")
        return _failed(hub, job, owner, _blame(hub, job, error), traceback.format_exc())


def _attempt(hub: Hub, job: Job, lease: Lease, folder: Path, on_progress: OnProgress | None) -> None:
    plugin = get_plugin(job.plugin, hub.settings)
    params = check_params(plugin, job.params)
    inputs = _inputs(hub, job)
    with JobContext(inputs, job.idempotency_key, folder, lease, on_progress) as context:
        context.log(f"attempt {job.attempts} of {job.plugin} by {lease.owner}")
        result = _run(hub, plugin(), context, params)
        _check(plugin, result)
    _complete(hub, job, lease, result, context.out, inputs)


def _run(hub: Hub, plugin: Any, context: JobContext, params: Any) -> Result:
    if plugin.kind != Kind.SOURCE:
        result: Result = plugin.run(context, params)
        return result
    from modelgrove_hub.ingest.sources import run_source

    return run_source(hub, plugin, context, params)


def _inputs(hub: Hub, job: Job) -> list[RegisteredModel]:
    if not job.inputs:
        return []
    from modelgrove_hub.registry.inputs import load_input

    return [load_input(hub, revision_id) for revision_id in job.inputs]


def _check(plugin: type[Plugin], result: object) -> None:
    name = f"{plugin.kind}.{plugin.name}"
    if not isinstance(result, Result):
        raise PluginError(f"plugin {name!r} returned a {type(result).__name__}, not a Result")
    try:
        json.dumps(dict(result.report), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PluginError(f"the report of plugin {name!r} is not JSON: {error}") from error


def _complete(hub: Hub, job: Job, lease: Lease, result: Result, out: Path, inputs: Sequence[RegisteredModel]) -> None:
    """Blobs first, while no transaction is open; then the rows and "done" together, or not at all."""
    artefacts = {name: hub.store.put(_kept(job, out, name), mode="hardlink") for name in result.artefacts}
    for name in (name for output in result.outputs for name in output.files):
        _kept(job, out, name)
    stored: Any = ()
    if result.outputs:
        from modelgrove_hub.ingest.outputs import register_outputs, store_outputs

        stored = store_outputs(hub, job, result, out, inputs)
    lease.check()
    outputs: dict[str, Any] = {"report": dict(result.report), "models": []}
    outputs["artefacts"] = {name: blob.sha256 for name, blob in artefacts.items()}
    with hub.transaction() as session:
        lease.pulse = rows.beat(session, job.id, lease.owner, hub.settings.lease_seconds)
        lease.check()
        name_blobs(session, [Blob(sha256=blob.sha256, size=blob.size) for blob in artefacts.values()])
        if stored:
            outputs["models"] = register_outputs(session, job, stored)
        if Kind(job.plugin.partition(".")[0]) is Kind.EMBEDDER:
            from modelgrove_hub.search.experts import record_expert

            record_expert(session, job, outputs)
        if Kind(job.plugin.partition(".")[0]) is Kind.ANALYZER:
            from modelgrove_hub.registry.lineage import record_found

            try:
                record_found(session, result.report, set(job.inputs))
            except (KeyError, TypeError, ValueError) as error:
                raise PluginError(f"the report of plugin {job.plugin!r} has edges that are none: {error!r}") from error
        if not rows.finish(session, job.id, lease.owner, outputs):
            raise LostLease(f"job {job.id} was taken back")


def _kept(job: Job, out: Path, name: str) -> Path:
    place = (out / name).resolve()
    if not place.is_relative_to(out.resolve()) or not place.is_file():
        written = ", ".join(sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()))
        raise PluginError(f"plugin {job.plugin!r} did not write {name!r}; it wrote {written or 'nothing'}")
    return place


def _again(hub: Hub, job: Job, owner: str, error: str) -> str | None:
    """Queue after a storage fault, each time twice as patient; park when the attempts are used up."""
    if job.attempts >= hub.settings.max_attempts:
        return _failed(hub, job, owner, f"parked after {job.attempts} attempts: {error}")
    delay = min(_LONGEST_DELAY, hub.settings.lease_seconds * 2 ** (job.attempts - 1))
    LOG.warning("job %s: again in %.0f s: %s", job.id, delay, error)
    return JobState.QUEUED if _settle(hub, rows.give_back, job, owner, error=_line(error), delay=delay) else None


def _failed(hub: Hub, job: Job, owner: str, error: str, log: str = "") -> str | None:
    return JobState.FAILED if _settle(hub, rows.fail, job, owner, _line(error), log) else None


def _settle(hub: Hub, verb: Callable[..., bool], job: Job, owner: str, *args: Any, **kwargs: Any) -> bool:
    with hub.transaction() as session:
        return verb(session, job.id, owner, *args, **kwargs)


def _blame(hub: Hub, job: Job, error: BaseException) -> str:
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, ModelgroveError):
        return str(error)
    return f"plugin {job.plugin!r} of {find_plugin(job.plugin, hub.settings).distribution!r} failed: {what}"


def _line(text: str) -> str:
    return " ".join(text.split())


def _staging(hub: Hub) -> Path:
    return hub.settings.home / "tmp"


@contextmanager
def _folder(hub: Hub, job: Job) -> Iterator[Path]:
    """This attempt's staging folder; those of earlier attempts are removed, this one too in the end."""
    for old in _staging(hub).glob(f"{job.id}-*"):
        shutil.rmtree(old, ignore_errors=True)
    folder = _staging(hub) / f"{job.id}-{job.attempts}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
