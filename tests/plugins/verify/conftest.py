"""A hub with two committed keys, and models that the first of them marked."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from types import SimpleNamespace

import pytest

from modelgrove_hub.hub import Hub
from modelgrove_hub.keys import new_key
from modelgrove_hub.settings import settings
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_migrations.run import upgrade
from modelgrove_plugins.verify.attack import Attack
from modelgrove_plugins.verify.mark import WeightMark
from modelgrove_plugins.verify.marked import VerifyMark


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A folder with a hub, and the commitments of its keys."""
    folder = tmp_path_factory.mktemp("verify")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELGROVE_HOME", str(folder / "home"))
        settings.cache_clear()
        hub = Hub.open()
        upgrade(hub.settings.database)
        # Not random here: tests say the same in every run.
        patch.setattr("modelgrove_hub.keys.secrets.token_bytes", Random(0).randbytes)
        with hub.transaction() as session:
            keys = [new_key(session, hub.settings, name) for name in ("ours", "second")]
        yield SimpleNamespace(folder=folder, hub=hub, ours=keys[0].id, second=keys[1].id)
        hub.engine.dispose()
    settings.cache_clear()


@pytest.fixture
def folders(tmp_path):
    """A new folder each time."""
    count = iter(range(1000))
    return lambda: tmp_path / f"run-{next(count)}"


def written(model, result, folder):
    """What a plugin wrote, as a model."""
    assert result.outputs
    return FolderModel(folder / "out", name=folder.name, family=model.family, adapter_type=model.adapter_type)


@pytest.fixture(scope="module")
def network(place, pipeline):
    """The tiny pipeline, marked: (model, report)."""
    folder = place.folder / "marked-network"
    result = run_plugin(WeightMark(), [pipeline], folder, {"key": place.ours, "margin": 6.0, "fidelity": False})
    return written(pipeline, result, folder), result.report


@pytest.fixture
def verify(place, folders):
    """The report on a model."""

    def verify(model, reference=None, **params):
        inputs = [model, *([reference] if reference else [])]
        wanted = {"key": place.ours, "reference": reference is not None, "controls": 2, **params}
        return run_plugin(VerifyMark(), inputs, folders(), wanted).report

    return verify


@pytest.fixture
def attack(folders):
    """The attacked model; its report is in `.report`."""

    def attack(*models, **params):
        folder = folders()
        result = run_plugin(Attack(), models, folder, params)
        model = written(models[0], result, folder)
        object.__setattr__(model, "report", result.report)
        return model

    return attack
