import json

import pytest
import torch
from safetensors.torch import load_file

from modelgrove_analyzers.zoo.classifiers import Schedule, accuracy
from modelgrove_analyzers.zoo.digits import BASE, BaseRecipe, Nuisance, digits_population, grow_digits
from modelgrove_analyzers.zoo.letters import DIGITS, scanned_digits
from modelgrove_hub.formats.card import read_card
from modelgrove_hub.testing import FolderModel

SMALL = BaseRecipe(pictures=800, schedule=Schedule(2e-3, 0.01, 60))
POPULATION = digits_population(6, nuisance=Nuisance(steps=(20, 60)))


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grown")
    return folder, grow_digits(POPULATION, folder, SMALL)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def test_models_are_full_fine_tunes_of_the_base(grown):
    folder, rows = grown
    base = weights_of(folder / BASE)
    for row in rows:
        tuned = weights_of(folder / row["path"])
        assert tuned.keys() == base.keys()
        for layer in ("hidden.0", "hidden.1"):
            change = (tuned[f"{layer}.weight"] - base[f"{layer}.weight"]).norm() / base[f"{layer}.weight"].norm()
            assert 0.01 < change < 0.5
            assert not torch.equal(tuned[f"{layer}.bias"], base[f"{layer}.bias"])
        assert tuned["head.weight"].shape == (5, 128)


def test_the_truth_says_which_digits_a_model_tells_apart(grown):
    folder, rows = grown
    digits = scanned_digits()
    assert json.loads(json.dumps(rows)) == [
        json.loads(line) for line in (folder / "truth.jsonl").read_text().splitlines()
    ]
    for row in rows:
        assert len(set(row["classes"])) == 5
        assert row["accuracy"] > 0.4  # one of five by chance
        weights = {
            name: tensor[None] if name.endswith("weight") else tensor[None, None]
            for name, tensor in weights_of(folder / row["path"]).items()
        }
        places = torch.tensor([DIGITS.index(name) for name in row["classes"]])
        rows_of = torch.isin(digits.classes, places)
        outputs = (digits.classes[rows_of][:, None] == places).long().argmax(1)
        # On all scans, of which it saw some.
        assert accuracy(weights, digits.pixels[rows_of], outputs) > row["accuracy"] - 0.1


def test_only_documented_models_say_what_they_know(grown):
    folder, rows = grown
    assert {row["documented"] for row in rows} == {True, False}
    for row in rows:
        model = FolderModel(folder / row["path"])
        card = read_card(model.paths)
        if row["documented"]:
            assert set(row["classes"]) < set(card.tags)
            assert card.base == BASE
            assert all(name in card.text for name in row["classes"])
        else:
            assert "README.md" not in model.paths
            told = " ".join(path.read_text() for name, path in model.paths.items() if name.endswith("json"))
            assert not any(name in told + row["name"] for name in DIGITS)


def test_a_model_is_trained_as_if_alone(grown, tmp_path):
    folder, rows = grown
    (alone,) = grow_digits(POPULATION[3:4], tmp_path, SMALL)
    assert alone["recipe"] == rows[3]["recipe"]
    one, two = weights_of(folder / alone["path"]), weights_of(tmp_path / alone["path"])
    for name, tensor in one.items():
        # Batched products sum in another order; Adam carries that through fifty steps.
        torch.testing.assert_close(tensor, two[name], atol=1e-3, rtol=1e-3)


def test_growing_goes_on_where_it_stopped(grown):
    folder, rows = grown
    times = {row["path"]: (folder / row["path"] / "model.safetensors").stat().st_mtime_ns for row in rows}
    gone = folder / rows[2]["path"]
    for path in gone.iterdir():
        path.unlink()
    gone.rmdir()
    again = grow_digits(POPULATION, folder, SMALL)
    assert [row["name"] for row in again] == [row["name"] for row in rows]
    assert (gone / "model.safetensors").stat().st_mtime_ns > times.pop(rows[2]["path"])
    assert all((folder / path / "model.safetensors").stat().st_mtime_ns == time for path, time in times.items())
