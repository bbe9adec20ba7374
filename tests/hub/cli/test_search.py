"""`expert`, `search` and `similar` on LoRAs of the shipped sample: real weights, real cards, no cards."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import modelgrove_analyzers.zoo
from modelgrove_hub.cli.expert import expert
from modelgrove_hub.cli.search import search
from modelgrove_hub.cli.similar import similar
from modelgrove_hub.errors import JobFailedError, NotFoundError, UsageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.ingest.pipeline import ingest
from modelgrove_hub.settings import settings
from modelgrove_migrations.run import upgrade

SAMPLE = Path(modelgrove_analyzers.zoo.__file__).parent / "data/sample"
CONCEPTS = ("guitar", "drum", "trumpet", "horse", "whale", "tree", "fire", "key")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A folder with the sample's LoRAs of eight concepts, and what is true of them by registered name."""
    folder = tmp_path_factory.mktemp("models")
    truth = [json.loads(line) for line in (SAMPLE / "truth.jsonl").read_text("utf-8").splitlines()]
    rows = [row for row in truth if row["concept"] in CONCEPTS]
    for row in rows:
        source = SAMPLE / row["path"]
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / row["path"])
    return folder, {row["name"]: row for row in rows}


@pytest.fixture(scope="module")
def full_hub(tmp_path_factory, sample):
    """A hub with these LoRAs, an expert fitted by the command and all vectors; the commands open it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELGROVE_HOME", str(tmp_path_factory.mktemp("home")))
        settings.cache_clear()
        hub = Hub.open()
        upgrade(hub.settings.database)
        assert {one.outcome for one in ingest(hub, [sample[0]], "reference")} == {"new"}
        yield hub, call(expert, "fit", "--tree", "zoo", "--local")
        hub.engine.dispose()
    settings.cache_clear()


def call(command, *arguments, text=False):
    options = [*arguments, *([] if text else ["--json"])]
    done = CliRunner().invoke(command, options, catch_exceptions=False, standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.output if text else json.loads(done.stdout)


def concepts(answer, truth):
    return [truth[hit["name"].partition("/")[2]]["concept"] for hit in answer["hits"]]


def test_fitting_learns_from_cards_and_places_every_model(full_hub, sample):
    truth = sample[1]
    documented = sum(row["documented"] for row in truth.values())
    fitted = full_hub[1]
    assert fitted["state"] == "done"
    assert fitted["outputs"]["report"]["models"] == documented
    assert fitted["embedded"] == {"weights": len(truth), "cards": documented, "skipped": {}}


@pytest.mark.parametrize("text", ["a guitar", "a big swimming mammal", "something burning"])
def test_weights_alone_find_what_a_text_says(full_hub, sample, text):
    wanted = {"a guitar": "guitar", "a big swimming mammal": "whale", "something burning": "fire"}[text]
    answer = call(search, text, "--by", "weights", "--limit", "3")
    assert concepts(answer, sample[1])[0] == wanted


def test_a_lora_without_a_card_is_found(full_hub, sample):
    bare = {name: row["concept"] for name, row in sample[1].items() if not row["documented"]}
    assert bare
    for name, concept in bare.items():
        hits = call(search, f"a picture of a {concept}", "--limit", "3")["hits"]
        assert f"local/{name}" in {hit["name"] for hit in hits}


def test_similar_models_show_the_same(full_hub, sample):
    guitars = [name for name, row in sample[1].items() if row["concept"] == "guitar"]
    answer = call(similar, guitars[0], "--limit", str(len(guitars) - 1))
    assert set(concepts(answer, sample[1])) == {"guitar"}


def test_people_read_a_table_and_notes(full_hub):
    shown = call(search, "a guitar", text=True)
    assert "score" in shown
    assert "guitar" in shown
    assert "Nothing here seems to do that" in call(search, "income tax", "--by", "weights", text=True)


def test_filters_reach_the_search(full_hub):
    assert call(search, "a guitar", "--family", "sdxl")["hits"] == []
    assert all(hit["licence"] == "mit" for hit in call(search, "a guitar", "--license", "mit")["hits"])


def test_a_filter_that_leaves_nothing_is_named_once(full_hub):
    assert call(search, "a guitar", "--rank", "900..", text=True) == "No model here is of rank '900..'.\n"
    assert call(similar, "guitar-daf405b8", "--family", "sdxl", text=True) == "No model here is of family 'sdxl'.\n"


def test_ranks_are_those_of_the_weights(full_hub, sample):
    within = {name for name, row in sample[1].items() if row["recipe"]["rank"] <= 3}
    assert 0 < len(within) < len(sample[1])
    found = call(search, "a guitar", "--rank", "..3", "--limit", "100")["hits"]
    assert {hit["name"].partition("/")[2] for hit in found} == within


def test_what_is_no_rank_is_refused(full_hub):
    with pytest.raises(UsageError, match="16, or a range"):
        call(search, "a guitar", "--rank", "large")


def test_experts_are_listed_with_their_trees(full_hub, sample):
    (row,) = call(expert, "ls")
    assert (row["tree"], row["expert"], row["not_embedded"]) == ("zoo", "gram-ridge v1", 0)
    assert "gram-ridge v1" in call(expert, "ls", text=True)


def test_embedding_again_does_nothing(full_hub):
    assert call(expert, "embed") == {"weights": 0, "cards": 0, "skipped": {}}


def test_an_unknown_tree_is_refused(full_hub):
    with pytest.raises(NotFoundError, match=r"trees with adapters: zoo \(\d+\)"):
        call(expert, "fit", "--tree", "sd1", "--local")


def test_a_tree_without_cards_cannot_be_learned(hub, sample):
    bare = [sample[0] / row["path"] for row in sample[1].values() if not row["documented"]]
    assert {one.outcome for one in ingest(hub, bare, "reference")} == {"new"}
    with pytest.raises(JobFailedError, match="8 are needed"):
        call(expert, "fit", "--tree", "zoo", "--local")
