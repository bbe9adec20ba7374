import shutil
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from sqlmodel import select

from modelgrove_hub.errors import NotFoundError, UsageError
from modelgrove_hub.registry.commits import Said, commit
from modelgrove_hub.search import vectors
from modelgrove_hub.search.background import load_background
from modelgrove_hub.search.filters import Filters
from modelgrove_hub.search.kept import kept_vectors
from modelgrove_hub.search.query import fuse, looks_like, search, similar
from modelgrove_hub.search.text import SPACE, embed_texts
from modelgrove_hub.search.words import words
from modelgrove_hub.tables import Blob, Embedding, Expert, Model, Revision


@pytest.fixture
def database_url(sqlite_url):
    """SQLite alone: what databases do differently is tested with the index and the experts."""
    return sqlite_url


@pytest.fixture(scope="module")
def known_background(tmp_path_factory):
    """A folder with the vectors of the background prompts and of the words, so that they are made once."""
    folder = tmp_path_factory.mktemp("background")
    load_background(folder)
    kept_vectors("words", words(), folder)
    return folder


@pytest.fixture(autouse=True)
def warm_hub(hub, known_background):
    shutil.copytree(known_background, hub.settings.index)


@cache
def text_vector(text):
    return embed_texts([text])[0]


@pytest.fixture
def place(hub, register, embed):
    """place(name, does=…, says=…) → a model whose weights do the one and whose card says the other."""
    background = load_background(hub.settings.index)
    noise = np.random.default_rng(0)

    def add(name, does=None, says=None, **facts):
        revision = register(name, card=says or "", **facts)
        if does:
            vector = background.centre(text_vector(does))
            vector = vector / np.linalg.norm(vector) + 0.02 * noise.normal(size=vector.shape)
            embed({revision: vector / np.linalg.norm(vector)})
        if says:
            embed({revision: text_vector(says)}, side="card")
        return revision

    return add


@pytest.fixture
def expert(hub):
    with hub.transaction() as session:
        session.add(Blob(sha256="e" * 64, size=1))
        session.flush()
        session.add(Expert(tree="zoo", encoder="e", text_space=SPACE, blob="e" * 64, calibration={"threshold": 4.0}))


@pytest.fixture
def zoo(place, expert):
    """Twelve models: half have cards, one has a lying card, none is called by what it does."""
    animals = ("a cat", "a horse", "an owl", "a shark")
    things = ("a violin", "a red sports car", "a castle", "a pizza")
    for number, thing in enumerate(animals):
        place(f"a/documented{number}", does=thing, says=f"This LoRA draws {thing}.")
    for number, thing in enumerate(things):
        place(f"a/bare{number}", does=thing)
    place("a/liar", does="a waterfall", says="This LoRA draws a pirate ship.")
    place("a/words-only", says="An adapter that draws stained glass windows.", family="sdxl", licence="mit")


def names(answer):
    return [hit.name for hit in answer.hits]


@pytest.mark.parametrize("by", ["weights", "both"])
def test_an_undocumented_model_is_found_first_by_its_weights(hub, zoo, by):
    answer = search(hub, "a stringed musical instrument", by=by)
    assert names(answer)[0] == "a/bare0"
    first = answer.hits[0]
    assert (first.found_by, first.card, first.sure) == ("weights", None, True)
    assert not answer.nothing


def test_a_documented_model_is_found_by_both_sides_and_says_so(hub, zoo):
    first = search(hub, "a small pet that meows", limit=3).hits[0]
    assert (first.name, first.found_by) == ("a/documented0", "both")
    assert first.weights is not None
    assert first.card is not None


def test_a_model_that_has_only_a_card_is_found_by_it(hub, zoo):
    answer = search(hub, "colourful church windows")
    assert names(answer)[0] == "a/words-only"
    assert answer.hits[0].found_by == "card"
    assert "a/words-only" not in names(search(hub, "colourful church windows", by="weights"))


def test_by_weights_a_lying_card_counts_for_nothing(hub, zoo):
    assert names(search(hub, "a waterfall", by="weights"))[0] == "a/liar"
    assert names(search(hub, "a pirate ship", by="card"))[0] == "a/liar"
    assert not any(hit.sure for hit in search(hub, "a pirate ship", by="weights").hits if hit.name == "a/liar")


def test_a_hit_says_in_words_what_its_weights_do(hub, zoo, place):
    hits = {hit.name: hit for hit in search(hub, "a violin").hits}
    assert hits["a/bare0"].looks_like[0] == "violin"
    place("a/only-card", says="A LoRA of a violin.")
    [bare] = [hit for hit in search(hub, "a violin").hits if hit.name == "a/only-card"]
    assert bare.looks_like == ()


def test_a_revision_that_no_expert_has_placed_looks_like_nothing(hub, place, register):
    assert looks_like(hub, place("a/owl", does="an owl"))[0] == "owl"
    assert looks_like(hub, register("a/bare")) == ()


def test_what_is_not_here_is_said_not_to_be_here(hub, zoo):
    answer = search(hub, "quarterly tax report of a limited company", by="weights")
    assert answer.nothing
    assert answer.notes[0].startswith("Nothing here seems to do that")
    assert not any(hit.sure for hit in answer.hits)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (Filters(family="sdxl"), ["a/words-only"]),
        (Filters(licence="mit", kind="adapter"), ["a/words-only"]),
        (Filters(adapter_type="dora"), []),
        (Filters(base="zoo-base"), []),
        (Filters(trust="quarantined"), []),
    ],
)
def test_filters_leave_only_models_that_fit(hub, zoo, filters, expected):
    assert names(search(hub, "a cat", filters=filters)) == expected


def test_when_filters_leave_no_model_the_answer_says_which(hub, zoo):
    for answer in (
        search(hub, "a cat", filters=Filters(adapter_type="dora")),
        similar(hub, "a/bare0", Filters(adapter_type="dora")),
    ):
        assert (answer.hits, answer.nothing) == ((), True)
        assert answer.notes == ("No model here is of type 'dora'.",)


def test_few_models_that_pass_are_found_among_many_in_lists(hub, zoo, place, monkeypatch):
    monkeypatch.setattr(vectors, "FLAT_UP_TO", 8)
    monkeypatch.setattr(vectors, "LOOKED_AT", 1)
    for number in range(20):
        place(f"a/kitten{number}", does="a kitten")
    place("a/rock", does="a grey rock", licence="gpl")
    answer = search(hub, "a kitten", by="weights", filters=Filters(licence="GPL"))
    assert names(answer) == ["a/rock"]
    assert names(search(hub, "a kitten", by="weights", limit=1))[0].startswith("a/kitten")


def test_the_answer_says_what_it_did_not_look_at(hub, zoo, register):
    register("a/waiting")
    answer = search(hub, "a cat")
    assert (answer.without_expert, answer.not_embedded) == ({"sdxl": 1}, {"zoo": 1})
    assert any("Tree sdxl has no expert" in note for note in answer.notes)
    assert any("1 adapters of tree zoo have no vector yet" in note for note in answer.notes)


def test_a_superseded_revision_is_not_found(hub, zoo):
    with hub.transaction() as session:
        old = session.get(Revision, 5)
        newer = Revision(model_id=old.model_id, digest="newer")
        session.add(newer)
        session.flush()
        commit(session, session.get(Model, old.model_id), newer, Said())
    assert "a/bare0" not in names(search(hub, "a violin"))


def test_an_empty_text_is_refused(hub):
    with pytest.raises(UsageError, match="empty search"):
        search(hub, " \n")


def test_a_very_long_text_is_cut(hub, zoo):
    assert names(search(hub, "a cat " * 100_000, by="weights"))[0] == "a/documented0"


def test_an_empty_hub_answers_with_nothing(hub):
    answer = search(hub, "a cat")
    assert (answer.hits, answer.nothing) == ((), True)


def test_similar_models_do_the_same(hub, zoo, place):
    place("a/kitten", does="a kitten")
    answer = similar(hub, "a/documented0", limit=2)
    assert names(answer)[0] == "a/kitten"
    assert 0 < answer.hits[0].score <= 1
    assert "a/documented0" not in names(answer)
    assert answer.notes == ()


def test_similar_models_can_be_filtered(hub, zoo, place):
    place("a/lynx", does="a lynx", family="sdxl")
    assert names(similar(hub, "a/documented0", Filters(family="sdxl"))) == ["a/lynx"]


def test_similar_falls_back_to_cards_and_says_so(hub, zoo, place):
    place("a/rose-window", says="Draws the round glass windows of cathedrals.")
    answer = similar(hub, "a/words-only", limit=1)
    assert names(answer) == ["a/rose-window"]
    assert "No expert has placed a/words-only" in answer.notes[0]


def test_similar_says_when_there_is_nothing_to_compare(hub, register):
    register("a/mute")
    answer = similar(hub, "a/mute")
    assert answer.hits == ()
    assert "neither a vector from its weights nor a card" in answer.notes[0]
    with pytest.raises(NotFoundError, match="no model 'a/nobody'"):
        similar(hub, "a/nobody")


def test_fusion_prefers_what_both_sides_rank_high():
    assert fuse({"weights": [1, 2, 3], "card": [2, 3, 1]})[0] == 2


@given(st.permutations(range(8)), st.integers(1, 7))
def test_a_model_without_a_card_ranks_as_one_whose_card_ranks_as_its_weights(order, place):
    order = list(order)
    bare = order[place]
    card = [one for one in order if one != bare]
    fused = fuse({"weights": order, "card": card})
    # All that both sides rank above it stay above; nothing else gets there.
    assert fused.index(bare) <= place
    assert set(fused[: fused.index(bare)]) <= set(order[:place])


def test_what_no_expert_has_seen_comes_before_its_known_relatives(hub, register, embed, tmp_path):
    background = load_background(hub.settings.index)

    def towards(**shares):
        vector = sum(share * background.centre(text_vector(f"a {thing}")) for thing, share in shares.items())
        return (vector / np.linalg.norm(vector)).astype(np.float32)

    labels = np.stack([towards(guitar=1), towards(castle=1), towards(cat=1)])
    guitar, new, cat = (register(name) for name in ("a/guitar", "a/new", "a/cat"))
    embed({guitar: labels[0], new: towards(guitar=1, castle=0.8, violin=0.1), cat: labels[2]})
    assert names(search(hub, "a violin", by="weights")) == ["a/guitar", "a/new", "a/cat"]
    save_file({"labels": labels}, tmp_path / "expert.safetensors")
    stored = hub.store.put(tmp_path / "expert.safetensors")
    with hub.transaction() as session:
        session.add(Blob(sha256=stored.sha256, size=stored.size))
        session.flush()
        session.add(made := Expert(tree="zoo", encoder="e", text_space=SPACE, blob=stored.sha256))
        session.flush()
        for row in session.exec(select(Embedding)):
            row.expert_id = made.id
    answer = search(hub, "a violin", by="weights")
    assert names(answer) == ["a/new", "a/guitar", "a/cat"]
    assert answer.hits[0].score < answer.hits[1].score  # shown as they were
    assert names(search(hub, "a guitar", by="weights"))[0] == "a/guitar"


def test_scores_of_two_trees_are_on_one_scale(hub, register, embed):
    """An expert whose models all stand high for any text does not win by that."""
    background = load_background(hub.settings.index)
    exact = background.centre(text_vector("a cat"))
    exact = exact / np.linalg.norm(exact)
    near = exact + 0.03 * np.random.default_rng(0).normal(size=exact.shape)
    levels = {"zoo": {"mean": 6.0, "spread": 2.0}, "zoo:a/quiet": {"mean": 2.0, "spread": 1.0}}
    with hub.transaction() as session:
        session.add(Blob(sha256="e" * 64, size=1))
        session.flush()
        experts = {}
        for tree, level in levels.items():
            calibration = {"threshold": 5.0, "level": level}
            made = Expert(tree=tree, encoder="e", text_space=SPACE, blob="e" * 64, calibration=calibration)
            session.add(made)
            session.flush()
            experts[tree] = made.id
    loud, quiet = register("a/loud"), register("a/quiet", tree="zoo:a/quiet")
    embed({loud: exact}, expert=experts["zoo"])
    embed({quiet: near / np.linalg.norm(near)}, expert=experts["zoo:a/quiet"])
    answer = search(hub, "a cat", by="weights")
    assert names(answer) == ["a/quiet", "a/loud"]
    query = background.centre(text_vector("a cat"))[None]
    z = background.scores(np.stack([near, exact]).astype(np.float32), query)[:, 0]
    assert z[1] > z[0]
    # Vectors are kept in float32.
    assert [hit.score for hit in answer.hits] == pytest.approx([(z[0] - 2) / 1, (z[1] - 6) / 2], abs=1e-3)
    assert [hit.sure for hit in answer.hits] == [bool(z[0] >= 5), bool(z[1] >= 5)]


def test_the_answer_counts_the_adapters_that_fit_no_tree(hub, zoo, register):
    register("a/stray", tree=None)
    answer = search(hub, "a cat")
    assert answer.outside == {"zoo": 1}
    assert any("1 adapters of family zoo fit no known tree" in note for note in answer.notes)
