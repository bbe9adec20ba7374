"""The supervisor of `modelgrove up` and `modelgrove worker`: processes of workers, a server and a ticker together."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import FrameType

from modelgrove_hub.api.server import Place
from modelgrove_hub.hub import Hub
from modelgrove_hub.settings import Settings
from modelgrove_workers.schedule import Ticker

LOG = logging.getLogger(__name__)
_WATCH_SECONDS = 0.2
_QUICK_SECONDS = 5.0
_HEALTHY_SECONDS = 60.0
_LONGEST_PAUSE = 30.0
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Lane:
    """Queues that share processes: jobs of one lane never wait for jobs of another."""

    queues: tuple[str, ...]
    concurrency: int

    def __str__(self) -> str:
        return f"{'+'.join(self.queues)} ×{self.concurrency}"

    @property
    def command(self) -> tuple[str, ...]:
        """What its process runs."""
        return ("modelgrove_workers.process", ",".join(self.queues), str(self.concurrency))


@dataclass(frozen=True)
class Web:
    """A server on a socket that listens already: connections wait while its process is started again."""

    place: Place
    listener: socket.socket

    def __str__(self) -> str:
        return "server"

    @property
    def command(self) -> tuple[str, ...]:
        """What its process runs."""
        return ("modelgrove_hub.api.server", str(self.listener.fileno()), json.dumps(asdict(self.place)))


@dataclass
class _Child:
    runs: Lane | Web
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    crashes: int = 0
    resume: float = 0.0


@dataclass
class Supervisor:
    """Runs lanes of workers, a ticker, and a server if there is one to run, until told to stop."""

    hub: Hub
    lanes: Sequence[Lane]
    web: Web | None = None
    grace_seconds: float = 10.0
    """How long running jobs may go on after a stop; then they go back to the queue."""
    _signals: int = 0
    """How often it was told to stop. No lock guards it: a handler that waits for the thread it interrupts hangs."""

    def run(self) -> None:
        """Work until SIGTERM, SIGINT or SIGHUP; a second one cuts the grace short. Restarts what crashes."""
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._told_to_stop)
        server = [_Child(self.web)] if self.web else []
        workers = [_Child(lane) for lane in self.lanes]
        ticker = Ticker(self.hub)
        ticker.start()
        try:
            while not self._signals:
                for child in (*server, *workers):
                    self._keep_alive(child)
                time.sleep(_WATCH_SECONDS)
        finally:
            self._end((*server, *workers))
            ticker.stop()

    def _told_to_stop(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1

    def _keep_alive(self, child: _Child) -> None:
        moment = time.monotonic()
        if child.process is not None and child.process.poll() is None:
            return
        if child.process is not None:
            child.crashes = 1 if moment - child.started > _HEALTHY_SECONDS else child.crashes + 1
            pause = min(_LONGEST_PAUSE, 2.0 ** (child.crashes - 1))
            kind = "worker " if isinstance(child.runs, Lane) else ""
            LOG.warning("%s%s ended with %s; again in %.0f s", kind, child.runs, child.process.returncode, pause)
            child.process, child.resume = None, moment + pause
        if moment >= child.resume:
            child.process, child.started = self._start(child.runs), moment

    def _start(self, runs: Lane | Web) -> subprocess.Popen[bytes]:
        jobs = sum(each.concurrency for each in self.lanes)
        handed = (runs.listener.fileno(),) if isinstance(runs, Web) else ()
        # Its own session: Ctrl-C at the terminal reaches the supervisor only, which then stops all gently.
        return subprocess.Popen(
            [sys.executable, "-m", *runs.command], env=environment(self.hub.settings, jobs), start_new_session=True,
            stdin=subprocess.DEVNULL, pass_fds=handed,
        )  # fmt: skip

    def _end(self, children: Sequence[_Child]) -> None:
        """First let running jobs and downloads finish; then have jobs given back to the queue; then kill."""
        running = [child.process for child in children if child.process is not None]
        for number, patience in ((signal.SIGTERM, self.grace_seconds), (signal.SIGQUIT, _QUICK_SECONDS)):
            running = [process for process in running if process.poll() is None]
            for process in running:
                process.send_signal(number)
            self._await(running, patience, hurried=number == signal.SIGTERM)
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _await(self, processes: Sequence[subprocess.Popen[bytes]], patience: float, *, hurried: bool) -> None:
        limit = time.monotonic() + patience
        while any(process.poll() is None for process in processes) and time.monotonic() < limit:
            if hurried and self._signals > 1:
                return
            time.sleep(_WATCH_SECONDS / 4)


def environment(config: Settings, jobs: int) -> dict[str, str]:
    """The environment of a worker: our settings, and as many threads a job as there are cores for it.

    Two thread pools on the same cores make linear algebra many times slower; torch reads the
    variables when it is imported.
    """
    threads = str(max(1, core_count() // jobs))
    ours = {
        f"MODELGROVE_{name.upper()}": str(getattr(config, name))
        for name in type(config).model_fields
        if name in config.model_fields_set and name != "hf_token"
    }
    process = {
        # `python -m` would put the working directory on the path, and with it whatever lies there.
        "PYTHONSAFEPATH": "1",
        # billiard complains when a worker is ended at once; its tracker cleans up all the same.
        "PYTHONWARNINGS": ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore:semaphore_tracker"])),
    }
    return {**dict.fromkeys(_THREADS, threads), **os.environ, **ours, **process}


def core_count() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
