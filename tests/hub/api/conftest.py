"""A real server process, one a module, and clients of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from modelgrove_hub.hub import Hub
from modelgrove_hub.settings import Settings
from modelgrove_migrations.run import upgrade

SCOPES = ("read", "write", "admin")
CLI = [sys.executable, "-c", "from modelgrove_hub.cli.root import main; main()"]


@dataclass
class Server:
    """A server process, and the hub that it serves, which tests may open beside it."""

    url: str
    hub: Hub
    process: subprocess.Popen[str]
    log: Path

    @property
    def home(self) -> Path:
        return self.hub.settings.home

    def run(self, *arguments: str) -> str:
        """A command on the hub of this machine, in a process of its own: what it says."""
        command = [*CLI, "--home", str(self.home), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout


def start(home: Path, *options: str, **settings: str) -> Server:
    """A server of the hub in `home`, which is made if it is not there."""
    config = Settings(home=home)
    upgrade(config.database)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MODELGROVE_", "HF_"))}
    environment |= {f"MODELGROVE_{name.upper()}": value for name, value in settings.items()}
    command = [*CLI, "--home", str(home), "serve", "--port", "0", *options]
    log = home / "serve.log"
    with log.open("w") as written:  # a pipe that nobody reads would fill up
        process = subprocess.Popen(command, stderr=written, text=True, env=environment)
    while process.poll() is None:
        if found := re.search(r"at (https?://\S+)\n", log.read_text()):
            return Server(found[1], Hub.open(config), process, log)
        time.sleep(0.02)
    raise RuntimeError(f"the server did not start: {log.read_text()}")


def stop(server: Server) -> None:
    server.process.terminate()
    server.process.wait(20)
    server.hub.engine.dispose()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An empty hub, served on loopback."""
    served = start(tmp_path_factory.mktemp("served") / "hub")
    yield served
    stop(served)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An empty hub that demands tokens, though tests reach it on loopback: it has a name."""
    served = start(tmp_path_factory.mktemp("guarded") / "hub", hosts="hub.example")
    yield served
    stop(served)


@pytest.fixture(scope="module")
def tokens(guarded: Server) -> dict[str, str]:
    """A token of each scope."""
    return {scope: guarded.run("token", "create", scope, "--scope", scope).strip() for scope in SCOPES}


@pytest.fixture(scope="session")
def serving() -> ModuleType:
    """This module, which test modules cannot import: it starts and stops servers."""
    return sys.modules[__name__]
