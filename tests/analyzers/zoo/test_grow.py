import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from modelgrove_analyzers.zoo.grow import TRUTH, grow, read_loras, read_truth
from modelgrove_analyzers.zoo.populations import Population
from modelgrove_analyzers.zoo.recipes import Method, Nuisance
from modelgrove_hub.errors import NotFoundError, UsageError
from modelgrove_hub.formats.listing import list_model
from modelgrove_hub.formats.recognise import recognise
from modelgrove_hub.formats.shared_basis import BasisColumns, columns_from

POPULATION = Population("test", 1, {"cat": 3, "violin": 2}, Nuisance(steps=(1, 3)))


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_grown_population_is_on_disk_with_its_truth(tiny, pictures, tmp_path):
    rows = grow(POPULATION, tiny, pictures, tmp_path)
    assert [row["concept"] for row in rows] == ["cat"] * 3 + ["violin"] * 2
    assert [json.loads(line) for line in (tmp_path / TRUTH).read_text().splitlines()] == json.loads(json.dumps(rows))
    for row in rows:
        assert (tmp_path / row["path"]).exists()
        assert row["held_out"] == (row["concept"] == "violin")
        assert row["recipe"]["prompt"] == "a picture of sks"
    assert not list(tmp_path.glob(".*"))


def test_growing_again_trains_only_what_is_missing(tiny, pictures, tmp_path):
    rows = grow(POPULATION, tiny, pictures, tmp_path)
    before = files_of(tmp_path)
    lost = next(row for row in rows if not row["documented"] and row["path"].endswith(".safetensors"))
    (tmp_path / lost["path"]).unlink()
    seen = []
    grow(POPULATION, tiny, pictures, tmp_path, lambda done, message: seen.append(message))
    after = files_of(tmp_path)
    assert {name: data for name, data in after.items() if name not in (lost["path"], TRUTH)} == {
        name: data for name, data in before.items() if name not in (lost["path"], TRUTH)
    }
    assert lost["path"] in after
    assert len(seen) == lost["recipe"]["steps"]
    # Trained alone this time: equal up to float32 noise, which float16 rounds.
    assert read_truth(tmp_path)[lost["name"]]["last_loss"] == pytest.approx(lost["last_loss"], abs=2e-4)


def test_growing_a_finished_population_trains_nothing(tiny, pictures, tmp_path):
    grow(POPULATION, tiny, pictures, tmp_path)
    grow(POPULATION, tiny, pictures, tmp_path, lambda done, message: pytest.fail(message))


def test_progress_runs_from_zero_to_one(tiny, pictures, tmp_path):
    shares = []
    grow(POPULATION, tiny, pictures, tmp_path, lambda done, message: shares.append(done))
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_grown_loras_are_read_back(tiny, pictures, tmp_path):
    rows = grow(POPULATION, tiny, pictures, tmp_path)
    loras = read_loras(tmp_path, tiny, limit=10)
    assert [lora.recipe.seed for lora in loras] == [row["recipe"]["seed"] for row in rows]
    assert all(torch.isfinite(up).all() and up.any() for lora in loras for _, up in lora.factors.values())
    assert len(read_loras(tmp_path, tiny, limit=2)) == 2


def test_sparse_adapters_are_grown_and_told_but_have_no_factors(tiny, pictures, tmp_path):
    population = Population("test", 1, {"cat": 2}, Nuisance(steps=(1, 2), method=Method.SARA), documented=0.5)
    shares = []
    rows = grow(population, tiny, pictures, tmp_path, lambda done, message: shares.append(done))
    assert shares == sorted(shares)
    for row in rows:
        path = tmp_path / row["path"]
        file = path / "sara.safetensors" if path.is_dir() else path
        assert recognise(list_model(file)).adapter_type == "sara"
        if path.is_dir():
            card = (path / "README.md").read_text("utf-8")
            assert "tags: [sara, text-to-image" in card
            assert "LoRA" not in card
            assert "Rank" not in card
    with pytest.raises(UsageError, match="has no factors to read"):
        read_loras(tmp_path, tiny, limit=1)


def test_orthogonal_loras_differ_from_plain_ones_in_their_columns_alone(tiny, pictures, tmp_path):
    own = {"cat": BasisColumns("zoo", 5, 0, 4), "violin": BasisColumns("zoo", 5, 4, 8)}
    plain = POPULATION.members(pictures)
    rows = grow(replace(POPULATION, columns=own), tiny, pictures, tmp_path)
    assert {row["convention"] for row in rows} == {"diffusers", "kohya", "peft"}
    for row, member in zip(rows, plain, strict=True):
        assert row["recipe"]["rank"] == own[row["concept"]].rank
        for field in ("seed", "pictures", "steps", "learning_rate"):
            assert row["recipe"][field] == getattr(member.recipe, field)
        path = tmp_path / row["path"]
        file = next(path.glob("*.safetensors")) if path.is_dir() else path
        with safe_open(file, "pt") as opened:
            assert columns_from(opened.metadata(), "the file") == own[row["concept"]]
    assert [lora.recipe.columns for lora in read_loras(tmp_path, tiny, limit=10)] == [
        own[m.concept.name] for m in plain
    ]
    with pytest.raises(NotFoundError, match="'violin' has no columns"):
        replace(POPULATION, columns={"cat": own["cat"]}).members(pictures)


def test_reading_where_nothing_grew_says_what_to_do(tiny, tmp_path):
    with pytest.raises(NotFoundError, match="modelgrove zoo grow"):
        read_loras(tmp_path, tiny, limit=1)
