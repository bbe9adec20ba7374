"""sd-mecha on the same files: the same numbers, and what is wrong in it is named (1.1.8)."""

import warnings

import pytest
import torch
import yaml

from modelgrove_hub.plugins import get_plugin
from modelgrove_hub.testing import run_plugin

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that fuzzywuzzy could be faster
    sd_mecha = pytest.importorskip("sd_mecha", reason="pip install --no-deps fuzzywuzzy sd-mecha")
add_difference = sd_mecha.extensions.builtin.merge_methods.linear.add_difference
configs = sd_mecha.extensions.model_configs

# Both compute in float32, in another order: a few roundings of values up to four.
SAME = 2e-6
FILE = "diffusion_pytorch_model.safetensors"
NAME = "conv_in.weight"


@pytest.fixture
def base(checkpoint):
    return checkpoint("base", 0)


@pytest.fixture
def models(checkpoint, base):
    shared = checkpoint("shared", 9, start=base)
    return [checkpoint(name, seed, start=shared, step=0.5) for seed, name in enumerate("abc", 1)]


@pytest.fixture(scope="module")
def tiny():
    """It merges what it has the names and shapes of."""
    shapes = {"conv_in.weight": [8, 4, 3, 3], "conv_in.bias": [8], "proj.weight": [8, 8], "norm.weight": [8]}
    keys = {name: {"shape": shape, "dtype": "float32"} for name, shape in shapes.items()}
    config = configs.from_yaml(yaml.safe_dump({"identifier": "tiny-unet", "components": {"unet": keys}}))
    configs.register(config)
    return config


@pytest.fixture
def theirs(tiny, tmp_path, values_of):
    """What sd-mecha makes of a recipe, a function of its nodes for checkpoints."""

    def run(recipe, *inputs):
        nodes = [sd_mecha.model(model.files()[FILE], tiny) for model in inputs]
        (tmp_path / "mecha/out").mkdir(parents=True, exist_ok=True)
        sd_mecha.merge(
            recipe(*nodes), output=tmp_path / "mecha/out" / FILE, output_dtype=torch.float32, threads=0,
            check_extra_keys=False,
        )  # fmt: skip
        return values_of(tmp_path / "mecha")

    return run


@pytest.fixture
def ours(tmp_path, values_of):
    def run(method, models, **params):
        job = tmp_path / f"{method}-{len(list(tmp_path.iterdir()))}"
        run_plugin(get_plugin(f"merger.{method}")(), models, job, params)
        return values_of(job)

    return run


def updates_of(base, models):
    return [sd_mecha.subtract(model, base) for model in models]


def ties(base, *models, **parameters):
    return add_difference(base, sd_mecha.ties_sum(*updates_of(base, models), **parameters))


def assert_same(found, wanted, names=None):
    assert found.keys() == wanted.keys()
    for name in names or wanted:
        assert torch.allclose(found[name], wanted[name], rtol=0, atol=SAME), name


def test_averages_are_alike(models, theirs, ours):
    a, b, c = models
    wanted = theirs(lambda a, b: sd_mecha.weighted_sum(a, b, alpha=0.3), a, b)
    assert_same(ours("sum", [a, b], weights=[0.7, 0.3]), wanted)
    assert_same(ours("sum", [a, b, c]), theirs(sd_mecha.n_average, a, b, c))


def test_differences_are_added_alike(base, models, theirs, ours):
    def recipe(base, a, b):
        first, second = updates_of(base, [a, b])
        return add_difference(add_difference(base, first, alpha=0.7), second, alpha=-0.4)

    wanted = theirs(recipe, base, *models[:2])
    assert_same(ours("sum", [*models[:2], base], weights=[0.7, -0.4], base=True), wanted)


def test_ties_is_alike_if_it_votes_by_mass_and_keeps_one_entry_more(base, models, theirs, ours):
    """It keeps all from the k-th smallest on, one more than the share; the paper's sign is that of the sum."""
    wanted = theirs(lambda *nodes: ties(*nodes, k=0.5, vote_sgn=True), base, *models)
    found = ours("ties", [*models, base], base=True, density=145.5 / 288)
    assert_same(found, wanted, [NAME])
    # All of it is kept: nothing is off by one.
    wanted = theirs(lambda *nodes: ties(*nodes, k=1.0, vote_sgn=True), base, *models)
    assert_same(ours("ties", [*models, base], base=True, density=1.0), wanted)


def test_its_ties_counts_heads_unless_told_otherwise(base, models, theirs, values_of):
    found = theirs(lambda *nodes: ties(*nodes, k=1.0), base, *models)[NAME]
    origin = values_of(base)[NAME]
    updates = torch.stack([values_of(model)[NAME] - origin for model in models])
    wanted = {}
    for rule, ballot in (("heads", updates.sign()), ("mass", updates)):
        agree = updates.sign() == ballot.sum(0).sign()
        wanted[rule] = origin + (updates * agree).sum(0) / agree.sum(0)
    assert torch.allclose(found, wanted["heads"], rtol=0, atol=SAME)
    assert not torch.allclose(found, wanted["mass"], rtol=0, atol=0.1)


def test_its_own_composition_of_ties_fails(base, models, theirs):
    with pytest.raises(AttributeError, match="identifier"):
        theirs(sd_mecha.add_difference_ties, base, *models)


def test_its_extended_ties_does_the_opposite_of_apply_stock(base, models, theirs, ours):
    """Without `apply_stock` it multiplies by Model Stock's ratio, and with it does not."""
    plain = ours("ties", [*models, base], base=True, density=1.0)
    for switch in (True, False):

        def recipe(base, *models, apply_stock=switch):
            merged = sd_mecha.ties_sum_extended(
                *updates_of(base, models), k=1.0, vote_sgn=True, apply_stock=apply_stock
            )
            return add_difference(base, merged)

        found = theirs(recipe, base, *models)
        assert torch.allclose(found[NAME], plain[NAME], rtol=0, atol=SAME) is switch


def test_slerp_is_alike_for_equal_lengths_alone(models, checkpoint, theirs, ours, values_of):
    """It goes along the unit sphere and scales by the mean of the lengths: off the circle where they differ."""

    def recipe(a, b):
        return sd_mecha.slerp(a, b, alpha=0.3)

    a, b = models[:2]
    first, second = values_of(a)[NAME], values_of(b)[NAME]
    equal = checkpoint("equal", 2, **{NAME: (second * first.norm() / second.norm()).float()})
    assert_same(ours("slerp", [a, equal], weights=[0.7, 0.3]), theirs(recipe, a, equal), [NAME])

    longer = checkpoint("longer", 2, **{NAME: 2 * second.float()})
    angle = torch.acos((first * second).sum() / first.norm() / second.norm())
    shares = torch.sin(0.7 * angle) / torch.sin(angle), torch.sin(0.3 * angle) / torch.sin(angle)
    circle = shares[0] * first + shares[1] * 2 * second
    length = 0.7 * first.norm() + 0.3 * 2 * second.norm()
    sphere = length * (shares[0] * first / first.norm() + shares[1] * second / second.norm())
    assert torch.allclose(ours("slerp", [a, longer], weights=[0.7, 0.3])[NAME], circle, rtol=0, atol=SAME)
    assert torch.allclose(theirs(recipe, a, longer)[NAME], sphere, rtol=0, atol=SAME)
    assert float((circle - sphere).norm()) > 0.05 * float(circle.norm())


def test_model_stock_is_alike_for_two_models_and_a_vector(base, models, theirs, ours, values_of):
    """It takes every row for itself, and of more models only neighbours."""
    a, b, c = models
    found = ours("model-stock", [a, b, base], base=True)
    wanted = theirs(sd_mecha.n_model_stock, base, a, b)
    origin = values_of(base)
    vectors = [name for name, tensor in origin.items() if tensor.ndim == 1]
    assert_same(found, wanted, vectors)
    assert not torch.allclose(found["proj.weight"], wanted["proj.weight"], rtol=0, atol=0.01)

    wanted = theirs(sd_mecha.n_model_stock, base, a, b, c)["conv_in.bias"] - origin["conv_in.bias"]
    one, two, three = (values_of(model)["conv_in.bias"] - origin["conv_in.bias"] for model in models)
    cosines = [float(x @ y / x.norm() / y.norm()) for x, y in ((one, two), (two, three), (one, three))]
    mean = (one + two + three) / 3
    for pairs, found in ((2, wanted), (3, ours("model-stock", [*models, base], base=True)["conv_in.bias"])):
        cosine = sum(cosines[:pairs]) / pairs
        change = found if pairs == 2 else found - origin["conv_in.bias"]
        assert torch.allclose(change, 3 * cosine / (1 + 2 * cosine) * mean, rtol=0, atol=SAME)
