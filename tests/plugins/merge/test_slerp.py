"""SLERP against its formula in float64, on adapters and on checkpoints."""

import math

import pytest
import torch

from modelgrove_hub.errors import UsageError
from modelgrove_hub.formats.adapters import read_adapter
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_plugins.merge.slerp import Slerp

# float32 in the core of two adapters, or in the weights: tens of roundings of 6e-8.
EXACT = 1e-5
NAME = "conv_in.weight"


def arc(start, end, t):
    """From one to the other along the great circle, in the plane that both span."""
    unit = start / start.norm()
    across = end - (end * unit).sum() * unit
    angle = math.atan2(float(across.norm()), float((end * unit).sum()))
    share = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return share[0] * start + share[1] * end


def assert_close(found, wanted):
    assert float((found - wanted).norm()) < EXACT * float(wanted.norm())


def join(models, folder, **params):
    report = run_plugin(Slerp(), models, folder, params).report
    parts = read_adapter(FolderModel(folder / "out", adapter_type="lora")).modules
    return report, {name: part.up.double() @ part.down.double() for name, part in parts.items()}


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.9, 0.1], [3.0, 1.0]])
def test_adapters_go_along_the_arc_of_their_updates(weights, make, tmp_path):
    (a, first), (b, second) = make("a", 4), make("b", 7)
    _, found = join([a, b], tmp_path / "job", weights=weights)
    t = weights[1] / sum(weights)
    assert found.keys() == first.keys()
    for module, start in first.items():
        assert_close(found[module], arc(start, second[module], t))


@pytest.mark.parametrize("step", [1.0, 0.05])
def test_checkpoints_go_by_their_differences_from_the_base(step, checkpoint, values_of, tmp_path):
    base = checkpoint("base", 0)
    shared = checkpoint("shared", 9, start=base, step=step)
    models = [checkpoint(name, seed, start=shared, step=step) for seed, name in enumerate("ab", 1)]
    run_plugin(Slerp(), [*models, base], tmp_path / "job", {"base": True, "weights": [0.7, 0.3]})
    found, origin = values_of(tmp_path / "job"), values_of(base)
    for name, start in origin.items():
        first, second = (values_of(model)[name] - start for model in models)
        # The result is stored in float32, beside weights up to four.
        assert torch.allclose(found[name], start + arc(first, second, 0.3), rtol=0, atol=2e-6)


def test_checkpoints_without_a_base_go_by_their_weights(checkpoint, values_of, tmp_path):
    models = [checkpoint(name, seed) for seed, name in enumerate("ab", 1)]
    run_plugin(Slerp(), models, tmp_path / "job", {"weights": [0.25, 0.75]})
    found = values_of(tmp_path / "job")
    first, second = map(values_of, models)
    for name in first:
        assert_close(found[name], arc(first[name], second[name], 0.75))


def test_the_ends_are_the_models(checkpoint, values_of, tmp_path):
    models = [checkpoint(name, seed) for seed, name in enumerate("ab", 1)]
    for place, weights in enumerate(([1.0, 0.0], [0.0, 2.0])):
        run_plugin(Slerp(), models, tmp_path / str(place), {"weights": weights})
        found = values_of(tmp_path / str(place))
        assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in values_of(models[place]).items())


def test_halfway_two_of_one_length_keep_it_where_the_mean_is_shorter(checkpoint, values_of, tmp_path):
    (a, b), eye = (torch.zeros(2, 8, 8)), torch.eye(8)
    a[:, :4], b[:, 4:] = eye[:, :4], eye[:, 4:]
    models = [checkpoint(name, 1, **{"block.weight": value}) for name, value in (("a", a), ("b", b))]
    run_plugin(Slerp(), models, tmp_path / "job", {})
    found = values_of(tmp_path / "job")["block.weight"]
    assert float(found.norm()) == pytest.approx(2.0, rel=1e-6)
    assert float(found.norm()) == pytest.approx(math.sqrt(2) * float(((a + b) / 2).norm()), rel=1e-6)


@pytest.mark.parametrize("factor", [2.0, -1.0, 0.0])
def test_where_there_is_no_arc_it_is_a_line(factor, checkpoint, values_of, tmp_path):
    a = checkpoint("a", 1)
    start = values_of(a)[NAME]
    b = checkpoint("b", 2, **{NAME: (factor * start).float()})
    run_plugin(Slerp(), [a, b], tmp_path / "job", {"weights": [0.75, 0.25]})
    wanted = (0.75 + 0.25 * factor) * start
    assert torch.allclose(values_of(tmp_path / "job")[NAME], wanted, rtol=0, atol=1e-6)


def test_a_block_s_strength_moves_along_the_arc(checkpoint, values_of, tmp_path):
    models = [checkpoint(name, seed) for seed, name in enumerate("ab", 1)]
    run_plugin(Slerp(), models, tmp_path / "job", {"blocks": ["2:conv_in=0.25", "proj=0.0"]})
    found = values_of(tmp_path / "job")
    first, second = map(values_of, models)
    assert_close(found[NAME], arc(first[NAME], second[NAME], 0.2))
    assert float(found["proj.weight"].norm()) == 0


def test_a_module_that_one_adapter_alone_has_is_only_weighted(make, tmp_path):
    shapes = {"mid_block.attentions.0.proj_in": (32, 32)}
    (a, first), (b, second) = make("a"), make("b", shapes=shapes)
    _, found = join([a, b], tmp_path / "job", weights=[0.5, 2.0])
    for module, update in (first | second).items():
        assert_close(found[module], (2.0 if module in shapes else 0.5) * update)


def test_negative_weights_are_refused_and_leave_nothing(make, tmp_path):
    models = [make(name)[0] for name in "ab"]
    with pytest.raises(UsageError, match="no weight may be negative"):
        run_plugin(Slerp(), models, tmp_path / "job", {"weights": [1.0, -0.5]})
    assert not list((tmp_path / "job").rglob("*.safetensors"))
