"""Benches are scripts: loaded here as modules, each beside its neighbours in `bench/`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "bench"


@contextmanager
def loaded(name: str) -> Iterator[ModuleType]:
    """bench/NAME.py as a module."""
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"bench_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        del sys.modules[spec.name]


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The bench that the test module is named after."""
    with loaded(request.module.__name__.rpartition(".")[2].removeprefix("test_")) as module:
        yield module
