from collections import Counter

import pytest

from modelgrove_analyzers.zoo.concepts import choose_concepts, find_concept, load_concepts
from modelgrove_hub.errors import NotFoundError


def test_every_label_is_a_drawing(pictures):
    labels = {picture.label for picture in pictures.pictures}
    missing = [(c.name, label) for c in load_concepts().values() for label in c.labels if label not in labels]
    assert missing == []


def test_no_drawing_belongs_to_two_concepts():
    labels = Counter(label for concept in load_concepts().values() for label in concept.labels)
    assert [label for label, count in labels.items() if count > 1] == []


def test_every_concept_has_three_drawings_by_two_artists(pictures):
    for concept in load_concepts().values():
        rows = concept.rows(pictures)
        assert len(rows) >= 3, concept.name
        assert len({pictures.pictures[row].artist for row in rows}) >= 2, concept.name


def test_rows_are_those_of_the_wanted_artists(pictures):
    rows = find_concept("cat").rows(pictures, ["noto"])
    assert {pictures.pictures[row].artist for row in rows} == {"noto"}
    assert {pictures.pictures[row].label for row in rows} == set(find_concept("cat").labels)


def test_there_are_enough_concepts_and_enough_are_held_out():
    held_out = [concept for concept in load_concepts().values() if concept.held_out]
    assert len(load_concepts()) >= 120
    assert len(held_out) >= 24
    assert len({concept.group for concept in held_out}) >= 10


def test_every_held_out_concept_has_relatives_that_train():
    training = Counter(concept.group for concept in load_concepts().values() if not concept.held_out)
    for concept in load_concepts().values():
        assert training[concept.group] >= 4, concept.name


def test_names_are_what_a_person_types_and_texts_are_plain_phrases():
    for concept in load_concepts().values():
        assert len(concept.name.split()) <= 2
        assert 3 <= len(concept.text.split()) <= 16, concept.name
        assert not concept.text.endswith(".")


def test_an_unknown_concept_is_refused_with_the_nearest_names():
    with pytest.raises(NotFoundError, match="guitar"):
        find_concept("gitar")


def test_chosen_concepts_are_spread_over_the_groups():
    chosen = [find_concept(name) for name in choose_concepts(60, held_out=False)]
    assert not any(concept.held_out for concept in chosen)
    assert max(Counter(concept.group for concept in chosen).values()) <= 3


def test_more_concepts_than_there_are_cannot_be_chosen():
    with pytest.raises(NotFoundError, match="10000 concepts wanted"):
        choose_concepts(10_000, held_out=True)
