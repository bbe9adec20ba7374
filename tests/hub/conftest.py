"""What the tests of the hub share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from modelgrove_hub.hub import Hub
from modelgrove_hub.settings import settings
from modelgrove_migrations.run import upgrade


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def hostile() -> ModuleType:
    """The module `hostile.py` beside this file: a test gets its corpus by `hostile.corpus(folder)`."""
    return _load(Path(__file__).with_name("hostile.py"))


@pytest.fixture
def own_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub, which the commands of this process open too."""
    monkeypatch.setenv("MODELGROVE_HOME", str(tmp_path / "home"))
    settings.cache_clear()
    opened = Hub.open()
    upgrade(opened.settings.database)
    yield opened
    opened.engine.dispose()
    settings.cache_clear()


@pytest.fixture(scope="session")
def pickled() -> ModuleType:
    """The module `pickled.py` beside this file: pickles of plain weights, and hostile ones."""
    return _load(Path(__file__).with_name("pickled.py"))
