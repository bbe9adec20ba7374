"""mergekit on the same recipe and files: the same numbers, and what is wrong in it is named (0.1.5)."""

import pytest
import torch
import yaml
from click.testing import CliRunner

from modelgrove_hub.plugins import get_plugin
from modelgrove_hub.recipes import read_recipe
from modelgrove_hub.testing import run_plugin

pytest.importorskip("mergekit", reason="pip install --no-deps immutables mergekit")

# Both compute in float32, in another order: a few roundings of values up to four.
SAME = 2e-6
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def both(tmp_path, values_of):
    """Merges by a recipe of mergekit's, both there and here → the tensors of each, in float64."""
    from mergekit.scripts.merge_raw_pytorch import main

    def run(method, models, base=None, weights=(), **parameters):
        folder = tmp_path / f"{method}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        paths = {str(model.files()[FILE]): model for model in (*models, *([base] if base else []))}
        entries = [{"model": path} for path in list(paths)[: len(models)]]
        for entry, weight in zip(entries, weights, strict=bool(weights)):
            entry["parameters"] = {"weight": weight}
        recipe = {"merge_method": method, "models": entries, "parameters": parameters}
        if base:
            recipe["base_model"] = str(base.files()[FILE])
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
        found = CliRunner().invoke(main, [str(folder / "recipe.yaml"), str(folder / "out")], catch_exceptions=False)
        assert found.exit_code == 0, found.output
        (folder / "out/model.safetensors").rename(folder / "out" / FILE)
        followed = read_recipe(folder / "recipe.yaml")
        inputs = [paths[entry.name] for entry in (*followed.models, *([followed.base] if followed.base else []))]
        job = folder / "ours"
        run_plugin(get_plugin(f"merger.{followed.method}")(), inputs, job, {**followed.params(), "seed": 3})
        return values_of(folder), values_of(job)

    return run


@pytest.fixture
def family(checkpoint):
    """A base, and three checkpoints that are related by what they learned."""
    base = checkpoint("base", 0)
    shared = checkpoint("shared", 9, start=base)
    return base, [checkpoint(name, seed, start=shared, step=0.5) for seed, name in enumerate("abc", 1)]


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, exact in wanted.items():
        assert torch.allclose(found[name], exact, rtol=0, atol=SAME), name


@pytest.mark.parametrize(
    ("method", "count", "weights", "parameters"),
    [
        ("task_arithmetic", 3, [0.7, -0.4, 0.2], {}),
        ("ties", 3, [0.6, 0.6, 0.6], {"density": 0.4, "int8_mask": True}),
        ("ties", 2, [1.0, 1.0], {}),
        ("breadcrumbs", 3, [0.7, 0.4, 0.2], {"density": 0.5, "gamma": 0.1}),
        ("breadcrumbs", 2, [0.7, 0.4], {"density": 0.95, "gamma": 0.1}),
        ("model_stock", 3, [], {}),
        ("model_stock", 2, [], {}),
        ("dare_linear", 3, [0.7, 0.4, 0.2], {"density": 1.0}),
        ("dare_ties", 3, [1.0, 1.0, 1.0], {"density": 1.0, "normalize": True}),
        ("della", 3, [1.0, 1.0, 1.0], {"density": 1.0}),
    ],
)
def test_updates_of_a_base_are_merged_alike(method, count, weights, parameters, both, family):
    base, models = family
    theirs, ours = both(method, models[:count], base, weights, **parameters)
    assert_same(ours, theirs)


def test_weights_are_averaged_and_interpolated_alike(both, family):
    _, models = family
    assert_same(*both("linear", models, weights=[3.0, 1.0, 2.0]))
    assert_same(*both("slerp", [models[1]], base=models[0], t=0.3))


def test_halves_are_rounded_once_here_and_after_every_step_there(both, checkpoint, values_of):
    base = checkpoint("base", 0, torch.float16)
    models = [checkpoint(name, seed, torch.float16) for seed, name in enumerate("abcd", 1)]
    theirs, ours = both("task_arithmetic", models, base, [0.3] * 4)
    origin, updates = values_of(base), [values_of(model) for model in models]
    for name, start in origin.items():
        wanted = start + sum(0.3 * (update[name] - start) for update in updates)
        spacing = torch.finfo(torch.float16).eps * 2 ** wanted.abs().log2().floor()
        # Half a spacing, and a float32 sum that may tip a tie.
        assert bool(((ours[name] - wanted).abs() <= 0.501 * spacing).all())
    name = "conv_in.weight"
    exact = origin[name] + sum(0.3 * (update[name] - origin[name]) for update in updates)
    assert float((theirs[name] - exact).norm()) > 1.5 * float((ours[name] - exact).norm())


def test_its_model_stock_takes_small_updates_for_unrelated_ones(both, checkpoint, values_of):
    """It divides by 1e-6 where ‖a‖‖b‖ is smaller, as it is for biases of fine-tunes."""
    base = checkpoint("base", 0)
    shared = checkpoint("shared", 9, start=base, step=1e-5)
    models = [checkpoint(name, seed, start=shared, step=1e-5) for seed, name in enumerate("ab", 1)]
    theirs, ours = both("model_stock", models, base)
    name = "conv_in.bias"
    origin = values_of(base)[name]
    first, second = (values_of(model)[name] - origin for model in models)
    cosine = float(first @ second / first.norm() / second.norm())
    wanted = 2 * cosine / (1 + cosine) * (first + second) / 2
    # The base is stored in float32: a rounding of 6e-8 in updates of 1e-5.
    assert float((ours[name] - origin - wanted).norm()) < 0.02 * float(wanted.norm())
    assert float((theirs[name] - origin).norm()) < 0.1 * float(wanted.norm())


def test_its_model_stock_goes_the_other_way_where_models_disagree(both, checkpoint, values_of):
    base = checkpoint("base", 0)
    mean = checkpoint("mean", 9, start=base, step=0.3)
    models = [checkpoint(name, 5, start=mean, step=step) for name, step in (("a", 1.0), ("b", -1.0))]
    theirs, ours = both("model_stock", models, base)
    name = "conv_in.weight"
    origin = values_of(base)[name]
    average = values_of(mean)[name] - origin
    assert torch.equal(ours[name], origin)
    assert float(((theirs[name] - origin) * average).sum()) < -float(average.square().sum())


def test_its_dare_scales_by_what_was_drawn_and_not_by_the_density(both, checkpoint, values_of):
    base = checkpoint("base", 0)
    models = [checkpoint(name, seed, start=base) for seed, name in enumerate("ab", 1)]
    torch.manual_seed(0)
    theirs, ours = both("dare_linear", models, base, [1.0, 0.0], density=0.5)
    name = "conv_in.weight"
    origin = values_of(base)[name]
    update = values_of(models[0])[name] - origin
    for found, exact in ((ours, True), (theirs, False)):
        changed = found[name] - origin
        kept = changed.abs() > 1e-6
        factor = float(changed[kept].abs().sum() / update[kept].abs().sum())
        drawn = float(update.abs().sum() / update[kept].abs().sum())
        # float32 sums of 288 values.
        assert factor == pytest.approx(2.0 if exact else drawn, rel=1e-4)
        assert drawn != pytest.approx(2.0, rel=1e-3)


def test_its_della_scales_all_entries_alike(both, checkpoint, values_of):
    """The paper, and ours, divide each by its own probability, which alone keeps the expectation."""
    base = checkpoint("base", 0)
    models = [checkpoint("a", 1, start=base), checkpoint("b", 2, start=base, step=0.0)]
    torch.manual_seed(0)
    theirs, ours = both("della", models, base, [1.0, 1.0], density=0.5, epsilon=0.3)
    name = "proj.weight"
    origin = values_of(base)[name]
    update = values_of(models[0])[name] - origin
    ratios = []
    for found in (theirs, ours):
        changed = found[name] - origin
        kept = changed.abs() > 1e-6
        ratios.append((changed / update)[kept])
    # float32 rounding of weights around one in updates as small as a hundredth.
    assert float(ratios[0].std()) < 1e-3 < 0.1 < float(ratios[1].std())
