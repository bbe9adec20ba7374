import json
from importlib.metadata import entry_points

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sqlmodel import select

from modelgrove_hub.errors import NotFoundError, PluginError
from modelgrove_hub.registry.commits import Said, commit
from modelgrove_hub.search.embedding import embed_missing, not_embedded
from modelgrove_hub.search.experts import newest_experts, record_expert, training_inputs
from modelgrove_hub.search.groups import Group, fits_none, groups
from modelgrove_hub.search.text import SPACE, WIDTH
from modelgrove_hub.tables import Blob, Embedding, Expert, Job, Model, Revision, RevisionFile, Trust, now

TELLER = '''
from modelgrove_hub.contracts import API, Kind, Params, Result

class Teller:
    """Places a model where its tensor says; fails when told to."""

    name, kind, api, summary, paper, Params = "teller", Kind.EMBEDDER, API, "Tells.", "", Params

    def run(self, context, params):
        return Result()

    def embed(self, expert, model):
        (tensor,) = model.tensors()
        if tensor.name == "raise":
            raise RuntimeError("the plugin's own fault")
        values = tensor.read().tolist()
        return values if tensor.name == "short" else [v + len(expert.read_bytes()) * 0 for v in values]
'''


@pytest.fixture
def teller(tmp_path, monkeypatch):
    """A stranger's distribution with the embedder `teller`, on the path."""
    site = tmp_path / "site"
    (site / "teller-1.0.dist-info").mkdir(parents=True)
    (site / "teller.py").write_text(TELLER)
    (site / "teller-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: teller\nVersion: 1.0\n")
    (site / "teller-1.0.dist-info/entry_points.txt").write_text(
        "[modelgrove.plugins]\nembedder.teller = teller:Teller\n"
    )
    monkeypatch.syspath_prepend(site)
    assert entry_points(group="modelgrove.plugins", name="embedder.teller")


ZOO, NETWORKS, SDXL = Group("zoo", "adapter"), Group("zoo", "checkpoint"), Group("sdxl", "adapter")


def direction(number):
    return torch.nn.functional.one_hot(torch.tensor(number), WIDTH).float()


@pytest.fixture
def fill(hub, register, tmp_path):
    """fill(name, tensors, **facts) → a revision with one real weight file."""

    def add(name, tensors=None, **facts):
        revision = register(name, **facts)
        path = tmp_path / "w.safetensors"
        save_file(tensors or {"x": direction(revision)}, path)
        stored = hub.store.put(path)
        with hub.transaction() as session:
            session.merge(Blob(sha256=stored.sha256, size=stored.size))
            session.flush()
            session.add(RevisionFile(revision_id=revision, path="w.safetensors", sha256=stored.sha256))
        return revision

    return add


@pytest.fixture
def make_expert(hub):
    """make_expert(tree) → an expert of `teller` for that tree, recorded as a job's end would."""

    def record(tree="zoo", inputs=(), **report):
        stored = hub.store.put_bytes(json.dumps(report).encode())
        with hub.transaction() as session:
            session.merge(Blob(sha256=stored.sha256, size=stored.size))
            session.flush()
            job = Job(id="j", plugin="embedder.teller", target=tree, idempotency_key="k", inputs=list(inputs))
            outputs = {"report": report, "artefacts": {"expert.safetensors": stored.sha256}}
            return record_expert(session, job, outputs)

    return record


def vectors(hub, side="weights"):
    with hub.transaction() as session:
        rows = session.exec(select(Embedding).where(Embedding.side == side, Embedding.text_space == SPACE))
        return {row.revision_id: int(np.frombuffer(row.vector, "<f4").argmax()) for row in rows}


def test_experts_learn_from_the_documented_adapters_of_their_tree(hub, register):
    told = [register("a/card", card="Draws cats."), register("a/tags", tags=["lora", "cat"])]
    told.append(register("a/captions", summary={"metadata": {"frequent_tags": ["cat"]}}))
    register("a/mute", tags=["lora"])
    register("a/other", card="Draws cats.", family="sdxl")
    register("a/twin", card="Draws cats.", tree="zoo:a/other-base")
    register("a/quarantined", card="Draws cats.", trust=Trust.QUARANTINED)
    register("a/base", card="Draws cats.", kind="checkpoint")
    register("a/treeless", card="Draws cats.", tree=None)
    with hub.transaction() as session:
        assert training_inputs(session, "zoo") == told
        assert groups(session) == {ZOO: 4, SDXL: 1, Group("zoo:a/other-base", "adapter"): 1}
        assert fits_none(session) == {"zoo": 1}


def test_networks_have_an_expert_of_their_own_and_the_root_is_no_member(hub, register):
    register("a/base", kind="checkpoint", card="Draws everything.")
    tuned = [register(f"a/tuned{i}", kind="checkpoint", card="Draws cats.") for i in range(2)]
    lora = register("a/lora", card="Draws cats.")
    with hub.transaction() as session:
        assert groups(session) == {ZOO: 1, NETWORKS: 2}
        assert training_inputs(session, "zoo") == tuned  # more are documented
        assert training_inputs(session, "zoo", "adapter") == [lora]
        assert not_embedded(session) == {ZOO: 1}  # without an expert for networks nobody misses their vectors


def test_an_expert_is_calibrated_again_when_a_tenth_of_its_models_is_new(hub, fill, make_expert, teller):
    made = make_expert()

    def calibrated_on(count):
        for number in range(count):
            fill(f"a/{count}-{number}")
        embed_missing(hub)
        with hub.reading() as session:
            return session.get(Expert, made.id).calibration["models"]

    assert calibrated_on(20) == 20
    assert calibrated_on(1) == 20
    assert calibrated_on(2) == 23


def test_an_expert_is_for_the_kind_that_it_was_fitted_on(hub, register, make_expert):
    register("a/base", kind="checkpoint")
    tuned = register("a/tuned", kind="component")
    assert make_expert(inputs=[tuned]).kind == "checkpoint"
    with hub.transaction() as session:
        assert list(newest_experts(session)) == [NETWORKS]
        assert not_embedded(session) == {NETWORKS: 1}


def test_a_vector_by_the_expert_of_another_tree_goes(hub, teller, fill, make_expert):
    kept, moved = fill("a/kept"), fill("a/moved")
    make_expert()
    embed_missing(hub)
    with hub.transaction() as session:
        session.get(Model, session.get(Revision, moved).model_id).tree = "zoo:a/moved"
    embed_missing(hub)
    assert list(vectors(hub)) == [kept]


def test_an_unknown_tree_is_refused_with_those_there_are(hub, register):
    with hub.transaction() as session, pytest.raises(NotFoundError, match="ingest some LoRAs first"):
        training_inputs(session, "zoo")
    register("a/card")
    with hub.transaction() as session, pytest.raises(NotFoundError, match=r"trees with adapters: zoo \(1\)"):
        training_inputs(session, "sd1")


def test_experts_are_numbered_and_the_newest_counts(hub, make_expert):
    report = {"layers": ["l"], "calibration": {"threshold": 2.5}, "metrics": {"top1": 0.5}}
    made = [make_expert(**report), make_expert(tree="sd1"), make_expert()]
    assert [(expert.tree, expert.version) for expert in made] == [("zoo", 1), ("sd1", 1), ("zoo", 2)]
    assert (made[0].layers, made[0].calibration, made[0].metrics) == tuple(report.values())
    with hub.transaction() as session:
        newest = {group: expert.id for group, expert in newest_experts(session).items()}
        assert newest == {ZOO: made[2].id, Group("sd1", "adapter"): made[1].id}


def test_an_embedder_that_leaves_no_expert_is_blamed(hub, make_expert):
    job = Job(id="j", plugin="embedder.teller", target="zoo", idempotency_key="k")
    with hub.transaction() as session, pytest.raises(PluginError, match=r"left no artefact 'expert\.safetensors'"):
        record_expert(session, job, {"report": {}, "artefacts": {}})
    with pytest.raises(PluginError, match="for space 'clip'"):
        make_expert(text_space="clip")


def test_all_adapters_of_a_tree_are_placed_by_its_expert(hub, teller, fill, make_expert):
    ids = [fill(f"a/m{i}") for i in range(3)]
    other = fill("a/other", family="sdxl")
    make_expert()
    with hub.transaction() as session:
        assert not_embedded(session) == {ZOO: 3, SDXL: 1}
    done = embed_missing(hub)
    assert (done.weights, done.cards, done.skipped) == (3, 0, {})
    assert vectors(hub) == {revision: revision for revision in ids}
    assert other not in vectors(hub)
    with hub.transaction() as session:
        assert not_embedded(session) == {SDXL: 1}
    assert embed_missing(hub).weights == 0


def test_a_newer_expert_places_everything_again(hub, teller, fill, make_expert):
    revision = fill("a/m")
    make_expert()
    embed_missing(hub)
    second = make_expert()
    assert embed_missing(hub).weights == 1
    with hub.transaction() as session:
        assert [(row.revision_id, row.expert_id) for row in session.exec(select(Embedding))] == [(revision, second.id)]


def test_one_tree_can_be_placed_alone(hub, teller, fill, make_expert):
    fill("a/m")
    other = fill("a/other", family="sdxl", card="Draws cats.")
    make_expert("zoo")
    make_expert("sdxl")
    done = embed_missing(hub, tree="sdxl")
    assert (done.weights, done.cards) == (1, 1)
    assert list(vectors(hub)) == [other]


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"raise": direction(0)}, "RuntimeError: the plugin's own fault"),
        ({"short": torch.ones(3)}, "not 384 of length one"),
        ({"x": torch.full((WIDTH,), float("nan"))}, "not 384 of length one"),
        ({"x": 3 * direction(0)}, "not 384 of length one"),
    ],
)
def test_a_model_that_cannot_be_placed_is_skipped_with_a_reason(hub, teller, fill, make_expert, tensors, reason):
    good = fill("a/good")
    fill("a/bad", tensors)
    make_expert()
    done = embed_missing(hub)
    assert list(vectors(hub)) == [good]
    assert reason in done.skipped["a/bad"]


def test_a_file_that_is_gone_is_skipped_with_a_reason(hub, teller, fill, make_expert):
    revision = fill("a/m")
    make_expert()
    with hub.transaction() as session:
        sha256 = session.exec(select(RevisionFile.sha256).where(RevisionFile.revision_id == revision)).one()
    hub.store.delete(sha256)
    assert list(embed_missing(hub).skipped) == ["a/m"]


def test_vectors_of_superseded_revisions_go(hub, teller, fill, make_expert):
    old = fill("a/m", card="Draws cats.")
    make_expert()
    embed_missing(hub)
    with hub.transaction() as session:
        model = session.get(Revision, old).model_id
        newer = Revision(model_id=model, digest="newer")
        session.add(newer)
        session.flush()
        commit(session, session.get(Model, model), newer, Said())
    embed_missing(hub)
    assert old not in {**vectors(hub), **vectors(hub, "card")}


def test_cards_are_read_once_and_again_when_they_change(hub, register):
    register("a/mute")
    register("a/base", kind="checkpoint", card="A base model of everything.")
    revision = register("a/cat", card="Draws cats.")
    assert embed_missing(hub).cards == 2
    assert embed_missing(hub).cards == 0
    before = vectors(hub, "card")
    with hub.transaction() as session:
        model = session.get(Model, session.get(Revision, revision).model_id)
        model.card, model.updated_at = "Draws pirate ships.", now()
    assert embed_missing(hub).cards == 1
    assert vectors(hub, "card") != before
    with hub.transaction() as session:
        model = session.get(Model, session.get(Revision, revision).model_id)
        model.card, model.updated_at = "", now()
    embed_missing(hub)
    assert revision not in vectors(hub, "card")
