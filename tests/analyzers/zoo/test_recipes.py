import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelgrove_analyzers.zoo.concepts import find_concept, load_concepts
from modelgrove_analyzers.zoo.recipes import Nuisance, draw_recipe, seed_of
from modelgrove_hub.errors import UsageError


@given(seed=st.integers(0, 2**48 - 1), name=st.sampled_from(sorted(load_concepts())))
def test_a_recipe_keeps_to_its_nuisance_and_its_concept(pictures, seed, name):
    nuisance, concept = Nuisance(), find_concept(name)
    recipe = draw_recipe(concept, seed, nuisance, pictures)
    low, high = nuisance.learning_rate
    assert recipe.rank in nuisance.ranks
    assert recipe.scale in nuisance.alpha_per_rank
    assert low * 0.999 <= recipe.learning_rate <= high * 1.001  # rounded to four digits
    assert nuisance.steps[0] <= recipe.steps <= nuisance.steps[1]
    assert set(recipe.pictures) <= set(concept.rows(pictures, recipe.artists))
    assert 1 <= len(recipe.pictures) <= nuisance.most_pictures
    assert recipe == draw_recipe(concept, seed, nuisance, pictures)


def test_recipes_of_one_concept_differ_in_everything_but_the_concept(pictures):
    recipes = [draw_recipe(find_concept("cat"), seed_of("test", i), Nuisance(), pictures) for i in range(60)]
    for field in ("rank", "alpha", "learning_rate", "steps", "pictures", "artists", "seed"):
        assert len({getattr(recipe, field) for recipe in recipes}) > 3, field
    assert {recipe.prompt for recipe in recipes} == {"a picture of sks"}


def test_only_the_allowed_artists_are_seen(pictures):
    nuisance = Nuisance(artists=("fluent", "noto"))
    for seed in range(20):
        assert "twemoji" not in draw_recipe(find_concept("dog"), seed, nuisance, pictures).artists


def test_a_concept_that_the_artists_never_drew_is_refused(pictures):
    with pytest.raises(UsageError, match="'crown' has no drawing by picasso"):
        draw_recipe(find_concept("crown"), 0, Nuisance(artists=("picasso",)), pictures)


def test_seeds_are_the_same_on_every_machine():
    # Worked out once with sha256sum: printf 'a\n1' | sha256sum | cut -c1-12
    assert seed_of("a", 1) == 0x4F395A2E9EA1
