"""A hub with real models behind a real server and a real worker, and a real browser."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from modelgrove_hub.settings import settings

ROOT = Path(__file__).parents[3]
ZOO = ROOT / "analyzers/modelgrove_analyzers/zoo/data"
WORKER = "from modelgrove_workers.cli import worker; worker()"
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
PATIENCE = 120.0


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"web_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def serving() -> ModuleType:
    """The module that starts and stops servers."""
    return _load(Path(__file__).parents[1] / "api/conftest.py")


@pytest.fixture(scope="session")
def grove(serving: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The zoo's sample with its base and an expert, served."""
    served = serving.start(tmp_path_factory.mktemp("grove") / "hub")
    served.run("ingest", str(ZOO / "sample"), str(ZOO / "zoo-base"))
    served.run("expert", "fit", "--tree", "zoo", "--no-ask", "--local")
    yield served
    serving.stop(served)


@pytest.fixture(scope="session")
def worker(grove: Any) -> Iterator[None]:
    """`modelgrove worker` for that hub."""
    environment = {**os.environ, "MODELGROVE_HOME": str(grove.home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER, "--concurrency", "1"]
    with (grove.home / "worker.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=grove.home)
    yield
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module", autouse=True)
def own_settings() -> Iterator[None]:
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; the tests are skipped loudly where there is none."""
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def wait_until() -> Callable[[Callable[[], object], str], None]:
    """Waits for a condition. The limit only ends a hopeless test."""

    def wait(condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, f"not within {PATIENCE:.0f} s: {what}"
            time.sleep(0.05)

    return wait
