"""Model Stock against its formula in float64, on checkpoints and on adapters."""

import pytest
import torch

from modelgrove_hub.errors import UsageError
from modelgrove_hub.formats.adapters import read_adapter
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_plugins.merge.model_stock import ModelStock

NAME = "conv_in.weight"


def stock(updates):
    """t times the mean, t from the mean cosine of all pairs (Jang et al. 2024)."""
    units = torch.stack([update.flatten() / update.norm() for update in updates])
    count = len(updates)
    cosine = float((units @ units.T).triu(1).sum()) * 2 / count / (count - 1)
    return count * max(0.0, cosine) / (1 + (count - 1) * max(0.0, cosine)) * sum(updates) / count


@pytest.fixture
def merge(tmp_path, values_of):
    def run(models, base, **params):
        job = tmp_path / f"job-{len(list(tmp_path.iterdir()))}"
        run_plugin(ModelStock(), [*models, base], job, {"base": True, **params})
        return values_of(job)

    return run


@pytest.mark.parametrize(("count", "step"), [(2, 1.0), (4, 1.0), (3, 1e-3)])
def test_checkpoints_are_the_formula_in_every_tensor(count, step, checkpoint, values_of, merge):
    base = checkpoint("base", 0)
    shared = checkpoint("shared", 9, start=base, step=step)
    models = [checkpoint(f"m{seed}", seed, start=shared, step=step) for seed in range(1, count + 1)]
    found = merge(models, base)
    for name, start in values_of(base).items():
        wanted = stock([values_of(model)[name] - start for model in models])
        # Stored in float32 beside weights up to four.
        assert torch.allclose(found[name] - start, wanted, rtol=0, atol=2e-6), name
        assert float(wanted.norm()) > 0.1 * step


def test_weights_count_before_the_angle(checkpoint, values_of, merge):
    base = checkpoint("base", 0)
    shared = checkpoint("shared", 9, start=base)
    models = [checkpoint(name, seed, start=shared) for seed, name in enumerate("abc", 1)]
    weights = [1.0, 0.5, -1.0]
    found = merge(models, base, weights=weights)
    for name, start in values_of(base).items():
        updates = [w * (values_of(model)[name] - start) for w, model in zip(weights, models, strict=True)]
        assert torch.allclose(found[name] - start, stock(updates), rtol=0, atol=2e-6), name


def test_the_same_model_twice_is_the_model(checkpoint, values_of, merge):
    base, model = checkpoint("base", 0), checkpoint("a", 1)
    found = merge([model, model], base)
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in values_of(model).items())


def test_models_that_disagree_leave_the_base(checkpoint, values_of, merge):
    base = checkpoint("base", 0)
    models = [checkpoint(name, 1, start=base, step=step) for name, step in (("a", 1.0), ("b", -1.0))]
    found = merge(models, base)
    assert all(torch.equal(found[name], value) for name, value in values_of(base).items())


def test_a_model_that_left_a_tensor_alone_says_nothing_about_it(checkpoint, values_of, merge):
    base = checkpoint("base", 0)
    shared = checkpoint("shared", 9, start=base)
    a, b = (checkpoint(name, seed, start=shared) for seed, name in enumerate("ab", 1))
    same = checkpoint("same", 3, start=shared, **{NAME: values_of(base)[NAME].float()})
    found, without = merge([a, b, same], base), merge([a, b], base)
    assert torch.allclose(found[NAME], without[NAME], rtol=0, atol=1e-6)
    assert not torch.allclose(found["proj.weight"], without["proj.weight"], rtol=0, atol=1e-2)


def test_adapters_are_the_formula_and_unrelated_ones_are_warned_of(make, tmp_path):
    parts = [make("a", 4, seed=1), make("b", 4, seed=2)]
    result = run_plugin(ModelStock(), [model for model, _ in parts], tmp_path / "job", {})
    found = read_adapter(FolderModel(tmp_path / "job/out", adapter_type="lora")).modules
    for module, factors in found.items():
        updates = [update[module] for _, update in parts]
        away = float((factors.up.double() @ factors.down.double() - stock(updates)).norm())
        # A cosine near zero in float32, of updates as long as these.
        assert away < 1e-6 * float(updates[0].norm())
    kept = [row["energy_kept"] for row in result.report["adapters"]]
    assert max(kept) < 0.01
    assert sum("of its energy" in warning for warning in result.report["warnings"]) == 2


def test_related_adapters_keep_what_they_share(make, tmp_path):
    a, updates = make("a", 4, seed=1)
    twin, _ = make("twin", 4, seed=1)
    result = run_plugin(ModelStock(), [a, twin], tmp_path / "job", {})
    found = read_adapter(FolderModel(tmp_path / "job/out", adapter_type="lora")).modules
    for module, factors in found.items():
        exact = updates[module]
        assert float((factors.up.double() @ factors.down.double() - exact).norm()) < 1e-5 * float(exact.norm())
    # Each gives a half: a quarter of its energy.
    assert [row["energy_kept"] for row in result.report["adapters"]] == pytest.approx([0.25, 0.25], rel=1e-3)


def test_checkpoints_need_their_base(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="--base"):
        run_plugin(ModelStock(), [checkpoint("a", 1), checkpoint("b", 2)], tmp_path / "job", {})
