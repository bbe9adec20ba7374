"""What Prometheus may ask: how requests went, and what the hub holds and has to do."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, multiprocess
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlmodel import col, func, select

from modelgrove_hub.hub import Hub
from modelgrove_hub.tables import Blob, Job, JobState, Model

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Where the processes of one server put their counts together; prometheus_client reads it when it is imported."""
_FRESH = 10.0
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0)
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Metrics:
    """The counts of this server."""

    def __init__(self, hub: Hub) -> None:
        self._registry = CollectorRegistry()
        self._hub = _HubCollector(hub)
        self._seconds = Histogram(
            "modelgrove_request_seconds", "Time until a request was answered to its end.",
            ("method", "route"), buckets=_BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._requests = Counter(
            "modelgrove_requests", "Requests; status 0 is one whose client left before the answer.",
            ("method", "route", "status"), registry=self._registry,
        )  # fmt: skip

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """One request more. Methods that nobody knows are one: each label is a row for ever."""
        known = method if method in _METHODS else "other"
        self._requests.labels(known, route, status).inc()
        self._seconds.labels(known, route).observe(seconds)

    def document(self) -> bytes:
        """All of it in the text format; of every process, where the server has several."""
        registry = self._registry
        if os.environ.get(FOLDER):
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        hub = CollectorRegistry()
        hub.register(self._hub)
        return generate_latest(registry) + generate_latest(hub)


class _HubCollector(Collector):
    """What the database says, read at most every ten seconds: a scrape costs nothing however many models there are."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._read_at = -_FRESH
        self._read: list[Metric] = []

    def describe(self) -> list[Metric]:
        """Nothing beforehand: registering must not read the database."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The rows, counted."""
        if time.monotonic() - self._read_at >= _FRESH:
            self._read, self._read_at = list(self._counted()), time.monotonic()
        yield from self._read

    def _counted(self) -> Iterator[Metric]:
        jobs = GaugeMetricFamily("modelgrove_jobs", "Jobs by plugin and state.", labels=("plugin", "state"))
        depth = GaugeMetricFamily("modelgrove_queue_depth", "Jobs that wait for a worker.", labels=("queue",))
        workers = GaugeMetricFamily("modelgrove_workers_busy", "Workers that have a job now.")
        models = GaugeMetricFamily("modelgrove_models", "Models by kind.", labels=("kind",))
        blobs = GaugeMetricFamily("modelgrove_blobs", "Files that are known by their hash.")
        size = GaugeMetricFamily("modelgrove_blob_bytes", "Bytes of those files.")
        number = func.count()
        with self._hub.reading() as session:
            for plugin, state, count in session.exec(
                select(Job.plugin, Job.state, number).group_by(col(Job.plugin), col(Job.state))
            ):
                jobs.add_metric((plugin, state), count)
            waiting = select(Job.queue, number).where(Job.state == JobState.QUEUED).group_by(col(Job.queue))
            for queue, count in session.exec(waiting):
                depth.add_metric((queue,), count)
            busy = select(func.count(col(Job.owner).distinct())).where(Job.state == JobState.RUNNING)
            workers.add_metric((), session.exec(busy).one())
            for kind, count in session.exec(select(Model.kind, number).group_by(col(Model.kind))):
                models.add_metric((kind,), count)
            files, total = session.exec(select(number, func.coalesce(func.sum(Blob.size), 0)).select_from(Blob)).one()
            blobs.add_metric((), files)
            size.add_metric((), float(total))
        yield from (jobs, depth, workers, models, blobs, size)
