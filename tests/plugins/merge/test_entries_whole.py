"""Methods that look at entries, on whole checkpoints with a base: against formulas in float64, tensor by tensor."""

import pytest
import torch

from modelgrove_hub.plugins import get_plugin
from modelgrove_hub.testing import run_plugin

# Differences are taken and added in float32, and the result is stored so: a few roundings of values up to four.
EXACT = 2e-6
WEIGHTS = [0.7, -0.4, 1.2]
BLOCK = "block.weight"
SHAPE = (64, 96)


@pytest.fixture
def base(checkpoint):
    return checkpoint("base", 0, **{BLOCK: torch.zeros(SHAPE)})


@pytest.fixture
def models(checkpoint):
    generator = torch.Generator().manual_seed(7)
    return [
        checkpoint(name, seed, **{BLOCK: torch.randn(SHAPE, generator=generator)}) for seed, name in enumerate("abc", 1)
    ]


@pytest.fixture
def merge(base, tmp_path, values_of):
    """A method's result, and the bytes of its file."""

    def run(method, models, **params):
        job = tmp_path / f"{method}-{len(list(tmp_path.iterdir()))}"
        result = run_plugin(get_plugin(f"merger.{method}")(), [*models, base], job, {"base": True, **params})
        (file,) = job.glob("out/*.safetensors")
        return values_of(job), file.read_bytes(), result.report

    return run


@pytest.fixture
def updates(base, models, values_of):
    """What each model changed, by tensor."""
    origin = values_of(base)
    return {
        name: [values_of(model)[name].float().sub(start.float()).double() for model in models]
        for name, start in origin.items()
    }


def largest(update, density, outliers=0.0):
    """The update without its smallest entries, and without the very largest."""
    order = update.abs().flatten().argsort(descending=True)
    kept = max(1, int(density * update.numel()))
    above = min(int(outliers * update.numel()), update.numel() - kept)
    mask = torch.zeros(update.numel(), dtype=torch.bool)
    mask[order[above : above + kept]] = True
    return update * mask.view(update.shape)


def elected(parts, weights):
    """The mean of the parts that agree with the sign of the weighted sum, each times its weight."""
    scaled = torch.stack([weight * part for weight, part in zip(weights, parts, strict=True)])
    shares = torch.tensor(weights).double().abs().view(-1, *(1 for _ in parts[0].shape))
    agree = (scaled.sign() == scaled.sum(0).sign()) & (scaled != 0)
    voices = (shares * agree).sum(0)
    return torch.where(voices > 0, (shares * scaled * agree).sum(0) / voices.clamp_min(1e-30), 0.0)


def added(parts, weights):
    return sum(weight * part for weight, part in zip(weights, parts, strict=True))


@pytest.mark.parametrize(
    ("method", "params", "changed", "join"),
    [
        ("ties", {}, lambda X: largest(X, 0.2), elected),
        ("ties", {"density": 0.6}, lambda X: largest(X, 0.6), elected),
        ("ties", {"density": 1.0}, lambda X: X, elected),
        ("breadcrumbs", {}, lambda X: largest(X, 0.5, 0.01), added),
        ("breadcrumbs", {"density": 0.8, "outliers": 0.15}, lambda X: largest(X, 0.8, 0.15), added),
        ("breadcrumbs", {"density": 0.9, "outliers": 0.3}, lambda X: largest(X, 0.9, 0.3), added),
        ("dare", {"density": 1.0}, lambda X: X, added),
        ("dare", {"density": 1.0, "elect": True}, lambda X: X, elected),
        ("della", {"density": 1.0, "epsilon": 0.0}, lambda X: X, elected),
    ],
)
def test_it_is_the_formula_in_every_tensor(method, params, changed, join, base, models, updates, merge, values_of):
    found, _, report = merge(method, models, weights=WEIGHTS, **params)
    for name, start in values_of(base).items():
        wanted = start + join([changed(update) for update in updates[name]], WEIGHTS)
        assert torch.allclose(found[name], wanted, rtol=0, atol=EXACT), name
    assert report["merged_tensors"] == len(updates)


def test_outliers_are_left_where_the_base_has_them(checkpoint, base, merge):
    update = torch.full(SHAPE, 0.1)
    update[:32] = 0.2
    update[5, 7], update[60, 90] = 50.0, -40.0
    models = [checkpoint(name, 1, **{BLOCK: update}) for name in "ab"]
    # Of 6144 entries three are outliers: both, and one of the others.
    found, _, _ = merge("breadcrumbs", models, density=0.9, outliers=3.5 / 6144)
    changed = found[BLOCK] != 0
    assert not bool(changed[5, 7])
    assert not bool(changed[60, 90])
    assert int(changed.sum()) == int(0.9 * 6144)
    assert float(found[BLOCK].max()) == pytest.approx(2 * 0.2)
    kept, _, _ = merge("breadcrumbs", models, density=0.9, outliers=0.0)
    assert float(kept[BLOCK][5, 7]) == 100.0


@pytest.mark.parametrize(("method", "params"), [("dare", {}), ("dare", {"elect": True}), ("della", {})])
def test_what_is_drawn_belongs_to_the_seed(method, params, models, merge):
    _, one, _ = merge(method, models, seed=1, **params)
    _, again, _ = merge(method, models, seed=1, **params)
    found, other, _ = merge(method, models, seed=2, **params)
    assert one == again
    assert one != other
    before, _, _ = merge(method, models, seed=1, **params)
    # No tensor is drawn alike, however small it is.
    assert all(not torch.equal(before[name], found[name]) for name in found)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_what_is_not_drawn_does_not_depend_on_a_seed(method, models, merge):
    one, _, _ = merge(method, models, seed=1)
    other, _, _ = merge(method, models, seed=2)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("elect", [False, True])
def test_dare_keeps_the_share_and_scales_it_up(elect, models, updates, merge):
    masks = []
    for weights in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]):
        found, _, _ = merge("dare", models, density=0.3, elect=elect, seed=4, weights=weights)
        update = updates[BLOCK][weights.index(1.0)]
        masks.append(found[BLOCK] != 0)
        assert torch.allclose(found[BLOCK], masks[-1] * update / 0.3, rtol=1e-6, atol=0)
        # Six deviations of 6144 draws.
        assert float(masks[-1].double().mean()) == pytest.approx(0.3, abs=6 * (0.21 / 6144) ** 0.5)
    both = (masks[0] & masks[1]).double().mean()
    # Models are thinned apart from each other: 0.3² are kept of both.
    assert float(both) == pytest.approx(0.09, abs=6 * (0.09 * 0.91 / 6144) ** 0.5)


def test_della_keeps_large_entries_of_a_row_more_often(models, updates, merge):
    update = updates[BLOCK][0]
    ranks = update.abs().argsort(1).argsort(1).double()
    probability = 0.5 - 0.4 / 2 + 0.4 * ranks / (SHAPE[1] - 1)
    kept = 0.0
    for seed in range(4):
        found, _, _ = merge("della", models, density=0.5, epsilon=0.4, seed=seed, weights=[1.0, 0.0, 0.0])
        mask = found[BLOCK] != 0
        assert torch.allclose(found[BLOCK], mask * update / probability, rtol=1e-5, atol=0)
        kept = kept + mask.double() / 4
    for place in (0, 1, 2):
        third = (ranks // 32) == place
        # Six deviations of 8192 draws whose probability is at most a half's.
        assert float(kept[third].mean()) == pytest.approx(float(probability[third].mean()), abs=6 * 0.5 / 8192**0.5)
