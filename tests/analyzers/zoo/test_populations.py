from collections import Counter

from diffusers import UNet2DConditionModel

from modelgrove_analyzers.zoo.base import UNET, BaseRecipe
from modelgrove_analyzers.zoo.concepts import find_concept
from modelgrove_analyzers.zoo.loras import target_modules
from modelgrove_analyzers.zoo.populations import Population, picture_population, sample_population, shape_population
from modelgrove_analyzers.zoo.shapes import draw_shapes


def test_members_depend_on_the_specification_alone(pictures):
    population = Population("test", 7, {"cat": 3, "violin": 2})
    more = Population("test", 7, {"pizza": 1, "cat": 4, "violin": 2})
    assert population.members(pictures) == population.members(pictures)
    assert set(population.members(pictures)) <= set(more.members(pictures))
    assert not set(population.members(pictures)) & set(Population("test", 8, {"cat": 3, "violin": 2}).members(pictures))


def test_held_out_concepts_are_never_documented_and_undocumented_names_say_nothing(pictures):
    for member in sample_population().members(pictures):
        assert not (member.label.documented and find_concept(member.recipe.concept).held_out)
        assert member.label.documented or member.label.name.startswith("untitled-")


def test_the_sample_is_large_enough_and_fits_in_15_megabytes(pictures):
    members = sample_population().members(pictures)
    unet = UNet2DConditionModel(in_channels=BaseRecipe.channels, out_channels=BaseRecipe.channels, **UNET)
    rank_one = 2 * sum(module.in_features + module.out_features for module in target_modules(unet).values())
    overhead = 10_000  # headers, cards, the line in truth.jsonl
    assert sum(member.recipe.rank * rank_one + overhead for member in members) <= 15e6
    concepts = Counter(member.recipe.concept for member in members)
    held_out = [name for name in concepts if find_concept(name).held_out]
    assert len(members) >= 120
    assert len(concepts) - len(held_out) >= 30
    assert len(held_out) >= 6
    assert min(count for name, count in concepts.items() if name not in held_out) >= 3
    assert {member.recipe.rank for member in members} == {2, 4, 8, 16}
    assert len({member.label.name for member in members}) == len(members)


def test_the_picture_zoo_has_600_models_of_100_training_and_20_held_out_concepts(pictures):
    members = picture_population().members(pictures)
    names = {member.recipe.concept for member in members}
    held_out = {name for name in names if find_concept(name).held_out}
    assert len(members) >= 600
    assert len(names - held_out) >= 100
    assert len(held_out) >= 20
    assert len({member.label.name for member in members}) == len(members)


def test_the_shape_zoo_has_800_models_of_80_training_and_20_held_out_pairs(pictures):
    members = shape_population().members(pictures + draw_shapes())
    assert len(members) == 800
    assert len({member.concept for member in members if not member.concept.held_out}) == 80
    assert len({member.concept for member in members if member.concept.held_out}) == 20
    assert {member.recipe.rank for member in members} == set(range(2, 17))
    assert min(row for member in members for row in member.recipe.pictures) >= len(pictures.pictures)
    assert len({member.label.name for member in members}) == len(members)
