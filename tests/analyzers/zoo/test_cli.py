import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from modelgrove_analyzers.zoo.base_folder import write_base
from modelgrove_analyzers.zoo.classifiers import Schedule
from modelgrove_analyzers.zoo.cli import zoo
from modelgrove_analyzers.zoo.digits import BaseRecipe, grow_digits
from modelgrove_hub.errors import DataError, NotFoundError, UsageError


@pytest.fixture
def base_folder(tiny, tmp_path):
    write_base(tiny, {}, tmp_path / "base")
    return str(tmp_path / "base")


def run(*arguments):
    return CliRunner().invoke(zoo, [str(argument) for argument in arguments], catch_exceptions=False)


def test_grow_reports_its_models_and_a_sheet_shows_them(base_folder, tmp_path):
    grown = ["grow", tmp_path / "grown", "--concept", "crown", "--models", 2, "--steps", 1, 2, "--base", base_folder]
    done = run(*grown, "--json")
    assert [row["concept"] for row in json.loads(done.stdout)] == ["crown", "crown"]
    done = run("sheet", tmp_path / "grown.png", "--grown", tmp_path / "grown", "--base", base_folder)
    assert "grown.png" in done.stderr
    with Image.open(tmp_path / "grown.png") as image:
        assert image.height == 66


def test_shapes_are_grown_and_shown_with_their_own_pictures(base_folder, tmp_path):
    grown = [
        "grow",
        tmp_path / "g",
        "--population",
        "shapes",
        "--concept",
        "red circle",
        "--models",
        2,
        "--steps",
        1,
        1,
    ]
    rows = json.loads(run(*grown, "--base", base_folder, "--json").stdout)
    assert [(row["concept"], row["group"], row["text"]) for row in rows] == [
        ("red circle", "shapes", "a circle filled with red")
    ] * 2
    run("sheet", tmp_path / "grown.png", "--grown", tmp_path / "g", "--base", base_folder)
    with Image.open(tmp_path / "grown.png") as image:
        real = np.asarray(image.crop((130, 0, 262, 66))).reshape(-1, 3)
    # Of the two drawings at the left something is red: real pictures in these rows would be others.
    assert ((real[:, 0] > 190) & (real[:, 1:] < 70).all(1)).any()


def test_digits_are_grown_on_the_base_that_is_there(tmp_path):
    grow_digits([], tmp_path / "g", BaseRecipe(pictures=200, schedule=Schedule(2e-3, 0.01, 5)))
    grown = ["grow", tmp_path / "g", "--population", "digits", "--models", 3, "--steps", 2, 3]
    rows = json.loads(run(*grown, "--json").stdout)
    assert [row["concept"] for row in rows] == ["digits"] * 3
    assert all(2 <= row["recipe"]["schedule"]["steps"] <= 3 for row in rows)
    with pytest.raises(UsageError, match="the digits have none"):
        run(*grown, "--concept", "seven")


def test_sheet_draws_prompts(base_folder, tmp_path):
    run("sheet", tmp_path / "sheets/base.png", "a cat", "a car", "a key", "--base", base_folder)
    with Image.open(tmp_path / "sheets/base.png") as image:
        assert image.height == 2 * 66


def test_an_unknown_concept_is_refused(base_folder, tmp_path):
    with pytest.raises(NotFoundError, match="no concept 'crwn'"):
        run("grow", tmp_path / "grown", "--concept", "crwn", "--base", base_folder)


@pytest.mark.parametrize("command", ["pictures", "train", "grow", "chains", "sample", "sheet"])
def test_every_command_explains_itself(command):
    assert run(command, "--help").exit_code == 0


def test_rank_type_and_artist_override_the_population(base_folder, tmp_path):
    options = ["--concept", "crown", "--models", 3, "--steps", 1, 1, "--base", base_folder, "--json"]
    chosen = ["--rank", 3, "--rank", 5, "--type", "loha", "--artist", "noto"]
    rows = json.loads(run("grow", tmp_path / "g", *options, *chosen).stdout)
    assert {row["recipe"]["rank"] for row in rows} <= {3, 5}
    assert {(row["recipe"]["method"], *row["recipe"]["artists"], row["convention"]) for row in rows} == {
        ("loha", "noto", "kohya")
    }
    run("sheet", tmp_path / "grown.png", "--grown", tmp_path / "g", "--base", base_folder)


def test_sparse_adapters_have_rates_of_their_own_and_no_rank(base_folder, tmp_path):
    grown = ["grow", tmp_path / "g", "--concept", "crown", "--models", 1, "--steps", 1, 1, "--type", "sara"]
    (row,) = json.loads(run(*grown, "--base", base_folder, "--json").stdout)
    assert 1e-3 <= row["recipe"]["learning_rate"] <= 4e-3
    with pytest.raises(UsageError, match="a sparse adapter has none"):
        run(*grown, "--base", base_folder, "--rank", 4)


def test_grow_trains_in_the_columns_of_a_basis(base_folder, tmp_path):
    listed = [{"base": "zoo", "seed": 9, "concepts": [{"concept": "crown", "start": 4, "rank": 2}]}]
    (tmp_path / "basis.json").write_text(json.dumps(listed))
    grown = ["grow", tmp_path / "g", "--concept", "crown", "--models", 1, "--steps", 1, 1, "--base", base_folder]
    (row,) = json.loads(run(*grown, "--basis", tmp_path / "basis.json", "--json").stdout)
    assert row["recipe"]["columns"] == {"base": "zoo", "seed": 9, "start": 4, "rank": 2}
    with pytest.raises(UsageError, match="--type loha"):
        run(*grown, "--basis", tmp_path / "basis.json", "--type", "loha")
    (tmp_path / "basis.json").write_text(json.dumps(listed * 2))
    with pytest.raises(DataError, match="not one basis"):
        run(*grown, "--basis", tmp_path / "basis.json")
