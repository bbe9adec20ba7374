import torch

from modelgrove_analyzers.zoo.concepts import find_concept
from modelgrove_analyzers.zoo.loras import train_loras
from modelgrove_analyzers.zoo.recipes import Nuisance, draw_recipe
from modelgrove_analyzers.zoo.sheets import base_sheet, lora_sheet, sample


def test_samples_depend_on_prompt_and_seed_alone(tiny):
    drawn = sample(tiny, ["cat", "car"], [1, 2], steps=2)
    assert drawn.shape == (2, 2, 3, 32, 32)
    assert drawn.abs().max() <= 1
    # Another batch size, another order of sums: float32 noise.
    torch.testing.assert_close(drawn[1:, 1:], sample(tiny, ["car"], [2], steps=2), rtol=0, atol=1e-4)


def test_each_lora_draws_its_own_prompt(tiny, pictures):
    nuisance = Nuisance(steps=(5, 5), learning_rate=(0.05, 0.05))
    recipes = [draw_recipe(find_concept(name), 1, nuisance, pictures) for name in ("cat", "arrow")]
    loras = train_loras(tiny, pictures, recipes)
    together = sample(tiny, [recipe.prompt for recipe in recipes], [1], loras, steps=2)
    for i, recipe in enumerate(recipes):
        alone = sample(tiny, [recipe.prompt], [1], loras[i : i + 1], steps=2)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_sheets_have_a_row_for_each_model_or_prompt(tiny, pictures):
    recipes = [draw_recipe(find_concept(name), 1, Nuisance(steps=(1, 1)), pictures) for name in ("cat", "crown", "key")]
    sheet = lora_sheet(tiny, pictures, train_loras(tiny, pictures, recipes), seeds=(1, 2))
    assert sheet.size == (2 * (130 + 6 * 66 + 8), 2 * 66)
    assert base_sheet(tiny, ["cat"], seeds=(1, 2)).size == (2 * (130 + 2 * 66 + 8), 66)
