"""Real workers: `modelgrove worker` in processes of its own, on real brokers and databases."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
from kombu import Connection

from modelgrove_hub.hub import Hub
from modelgrove_hub.jobs import rows
from modelgrove_hub.jobs.dispatch import publish
from modelgrove_hub.settings import Settings
from modelgrove_hub.tables import Job
from modelgrove_migrations.run import upgrade
from modelgrove_workers.app import make_queue

STRANGERS = Path(__file__).parents[1] / "hub/fixtures"
REDIS = os.environ.get("MODELGROVE_TEST_REDIS", "redis://127.0.0.1:6379")
RABBITMQ = os.environ.get("MODELGROVE_TEST_RABBITMQ", "amqp://guest:guest@127.0.0.1:5672//")
WORKER = "from modelgrove_workers.cli import worker; worker()"
PATIENCE = 120.0


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait for `condition`. The limit only ends a hopeless test: nothing here depends on speed."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"not within {PATIENCE:.0f} s: {what}"
        time.sleep(0.02)


@dataclass
class Grove:
    """A hub with workers that can be started, killed and stopped."""

    hub: Hub
    queue: str
    """Its workers listen here and nowhere else, so tests share brokers in peace."""
    _running: list[psutil.Popen] = field(default_factory=list)

    def start(self) -> psutil.Popen:
        """Start `modelgrove worker` for this test's queue; its log is in the hub's folder."""
        config = self.hub.settings
        given = {name: str(getattr(config, name)) for name in ("home", "database_url", "broker_url", "lease_seconds")}
        env = {**os.environ, **{f"MODELGROVE_{name.upper()}": value for name, value in given.items()}}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(STRANGERS), env.get("PYTHONPATH")]))
        with (config.home / "worker.log").open("ab") as log:
            command = [sys.executable, "-c", WORKER, "--queues", self.queue, "--concurrency", "1"]
            self._running.append(psutil.Popen(command, env=env, stdout=log, stderr=log, cwd=config.home))
        return self._running[-1]

    def submit(self, plugin: str, key: str, **params: object) -> Job:
        """Submit and publish a job; what it does is seen in `lines(key)`."""
        counter = self.hub.settings.home / key
        job = rows.submit(self.hub, plugin, {"counter": str(counter), **params}, key=key, queue=self.queue)
        publish(self.hub, job)
        return job

    def lines(self, key: str, word: str) -> list[int]:
        """Process ids of the runs that wrote `word` ("begin" or "end")."""
        counter = self.hub.settings.home / key
        found = [line.split() for line in counter.read_text().splitlines()] if counter.exists() else []
        return [int(pid) for said, pid in found if said == word]

    def await_end(self, job: Job) -> Job:
        """The job when it is over."""
        wait_until(lambda: rows.get(self.hub, job.id).finished_at, f"{job.plugin} ends; see {self.log()}")
        return rows.get(self.hub, job.id)

    def log(self) -> str:
        """What the workers said."""
        place = self.hub.settings.home / "worker.log"
        return place.read_text() if place.exists() else ""

    def kill(self) -> None:
        """`kill -9` every process of the workers."""
        for supervisor in self._running:
            if supervisor.is_running():
                for process in [supervisor, *supervisor.children(recursive=True)]:
                    process.kill()
            supervisor.wait()
        self._running.clear()


@pytest.fixture
def waiting() -> Callable[[Callable[[], object], str], None]:
    """`wait_until`, for test modules, which cannot import from here."""
    return wait_until


@contextmanager
def planted(home: Path, database_url: str = "", broker_url: str = "") -> Iterator[Grove]:
    """A grove with its schema made; killed and cleaned up afterwards."""
    config = Settings(home=home, database_url=database_url, broker_url=broker_url, lease_seconds=2)
    upgrade(config.database)
    grove = Grove(Hub.open(config), f"test-{uuid4().hex[:8]}")
    yield grove
    grove.kill()
    grove.hub.engine.dispose()
    if broker_url.startswith("amqp"):
        with Connection(broker_url) as connection:
            make_queue(config, grove.queue)(connection.default_channel).delete()


@pytest.fixture(scope="session", autouse=True)
def strangers() -> Iterator[None]:
    """The strangers' plugins are installed, here and in the workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STRANGERS)
        yield


@pytest.fixture
def grove(tmp_path: Path, database_url: str, broker_url: str) -> Iterator[Grove]:
    """A grove on the database and the broker of the test's parameters."""
    with planted(tmp_path, database_url, broker_url) as made:
        yield made


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grove]:
    """A grove with nothing but a folder, for all tests of a module; its one worker runs one job at a time."""
    with planted(tmp_path_factory.mktemp("live")) as made:
        made.start()
        yield made


@pytest.fixture
def redis_url() -> Iterator[str]:
    """A Redis database that is empty, emptied again afterwards."""
    import redis

    server = redis.Redis.from_url(REDIS)
    try:
        used = {int(name.removeprefix("db")) for name in server.info("keyspace")}
    except redis.ConnectionError as error:
        pytest.skip(f"Redis does not answer at {REDIS} ({error}). Start it: redis-server --daemonize yes")
    finally:
        server.close()
    number = max(set(range(16)) - used)
    yield f"{REDIS}/{number}"
    with redis.Redis.from_url(REDIS, db=number) as database:
        database.flushdb()


@pytest.fixture
def rabbitmq_url() -> Iterator[str]:
    """RabbitMQ's default virtual host; the queues of tests are deleted afterwards."""
    with Connection(RABBITMQ, connect_timeout=3) as connection:
        try:
            connection.ensure_connection(max_retries=1)
        except (OSError, connection.connection_errors) as error:
            pytest.skip(f"RabbitMQ does not answer at {RABBITMQ} ({error}). Start it: rabbitmq-server -detached")
        yield RABBITMQ


@pytest.fixture(
    params=[
        "embedded",
        pytest.param("redis", marks=pytest.mark.service),
        pytest.param("rabbitmq", marks=pytest.mark.service),
    ]
)
def broker_url(request: pytest.FixtureRequest) -> str:
    """Each test that takes this runs on every broker."""
    url: str = "" if request.param == "embedded" else request.getfixturevalue(f"{request.param}_url")
    return url
