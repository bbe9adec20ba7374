"""Makes `made_loras`, which the tests here share, importable, and fits one expert for all of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import made_loras

from modelgrove_analyzers.encoders.gram_ridge import GramOptions, GramRidge
from modelgrove_analyzers.zoo.classifiers import Schedule
from modelgrove_analyzers.zoo.digits import BASE, BaseRecipe, Nuisance, digits_population, grow_digits
from modelgrove_hub.search.background import Background, load_background
from modelgrove_hub.testing import FolderModel, LocalContext


@pytest.fixture(scope="session")
def background(tmp_path_factory: pytest.TempPathFactory) -> Background:
    return load_background(tmp_path_factory.mktemp("background"))


@pytest.fixture(scope="session")
def expert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """An expert's file and the report of its fit."""
    folder = tmp_path_factory.mktemp("expert")
    with LocalContext(folder / "job", made_loras.family(folder / "models")) as context:
        result = GramRidge().run(context, GramOptions())
    return context.out / result.artefacts[0], dict(result.report)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[FolderModel], list[set[str]]]:
    """Full fine-tunes on five digits each that know their base, and the digits; the last ten are for testing."""
    folder = tmp_path_factory.mktemp("digits")
    base = BaseRecipe(pictures=1500, schedule=Schedule(2e-3, 0.01, 200))
    rows = grow_digits(digits_population(70, nuisance=Nuisance(steps=(60, 90))), folder, base)
    known = FolderModel(folder / BASE)
    return [FolderModel(folder / row["path"], base=known) for row in rows], [set(row["classes"]) for row in rows]
