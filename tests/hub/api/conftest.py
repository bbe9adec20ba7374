"""A real server process, one a module, and clients of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from modelgrove_hub.hub import Hub
from modelgrove_hub.settings import Settings
from modelgrove_migrations.run import upgrade

CLI = [sys.executable, "-c", "from modelgrove_hub.cli.root import main; main()"]


@dataclass
class Server:
    """A server process, and the hub that it serves, which tests may open beside it."""

    url: str
    hub: Hub
    process: subprocess.Popen[str]

    @property
    def home(self) -> Path:
        return self.hub.settings.home

    def run(self, *arguments: str) -> str:
        """A command on the hub of this machine, in a process of its own: what it says."""
        command = [*CLI, "--home", str(self.home), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout


def start(home: Path, *options: str) -> Server:
    """A server of the hub in `home`, which is made if it is not there."""
    config = Settings(home=home)
    upgrade(config.database)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MODELGROVE_", "HF_"))}
    command = [*CLI, "--home", str(home), "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"https?://\S+", line):
            return Server(found[0], Hub.open(config), process)
    raise RuntimeError(f"the server did not start: {''.join(said)}")


def stop(server: Server) -> None:
    server.process.terminate()
    server.process.wait(20)
    server.process.stderr.close()
    server.hub.engine.dispose()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An empty hub, served on loopback."""
    served = start(tmp_path_factory.mktemp("served") / "hub")
    yield served
    stop(served)
