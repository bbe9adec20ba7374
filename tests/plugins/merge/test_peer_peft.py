"""PEFT's merges of the same adapters: the same numbers, and what is wrong in it is named (0.21.2)."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from modelgrove_hub.formats.updates import open_updates
from modelgrove_hub.plugins import get_plugin
from modelgrove_hub.testing import FolderModel, run_plugin

NAMES = ("one", "two", "three")
DENSITY = 0.4
# An SVD of a full matrix in float32 on both sides: tens of roundings of 6e-8.
SAME = 1e-5


@pytest.fixture
def peft(tmp_path):
    """Three unrelated adapters of two layers, saved to a folder each."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["first", "second"])
    layers = nn.ModuleDict({"first": nn.Linear(24, 32, bias=False), "second": nn.Linear(40, 24, bias=False)})
    model = get_peft_model(layers, config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "peft")
    return model


def deltas(model, adapter):
    layers = model.base_model.model
    return {name: layers[name].get_delta_weight(adapter).detach().double() for name in ("first", "second")}


def theirs(model, kind, weights, **parameters):
    more = {"svd_rank": 24} if "svd" in kind else {}  # as large as a rank can be here: nothing is cut off
    model.add_weighted_adapter(list(NAMES), weights, kind, combination_type=kind, **more, **parameters)
    return deltas(model, kind)


def ours(folder, method, weights, **params):
    models = [FolderModel(folder / "peft" / name, adapter_type="lora") for name in NAMES]
    run_plugin(get_plugin(f"merger.{method}")(), models, folder / method, {"weights": weights, **params})
    targets = open_updates(FolderModel(folder / method / "out", adapter_type="lora")).targets
    factors = {name.split(".")[-1]: target.read() for name, target in targets.items()}
    return {name: found.up.double() @ found.down.double() for name, found in factors.items()}


@pytest.mark.parametrize(
    ("kind", "method", "weights", "density", "params"),
    [
        ("cat", "sum", [0.7, -0.4, 1.2], None, {}),
        ("svd", "sum", [0.7, -0.4, 1.2], None, {}),
        ("linear", "legacy-linear", [0.7, 0.4, 1.2], None, {}),
        ("ties_svd", "ties", [0.7, 0.7, 0.7], DENSITY, {"space": "full"}),
        ("magnitude_prune_svd", "breadcrumbs", [0.7, -0.4, 1.2], DENSITY, {"outliers": 0}),
    ],
)
def test_it_makes_the_same(kind, method, weights, density, params, peft, tmp_path):
    shares = {} if density is None else {"density": density}
    wanted = theirs(peft, kind, weights, **shares)
    found = ours(tmp_path, method, weights, **shares, **params)
    assert found.keys() == wanted.keys()
    for name, exact in wanted.items():
        assert float((found[name] - exact).norm()) < SAME * float(exact.norm()), name


def test_dare_scales_by_the_density_in_both(peft, tmp_path):
    torch.manual_seed(0)
    weights = [1.0, 0.0, 0.0]
    exact = deltas(peft, "one")
    wanted = theirs(peft, "dare_linear_svd", weights, density=DENSITY)
    found = ours(tmp_path, "dare", weights, density=DENSITY)
    for result in (wanted, found):
        for name, update in exact.items():
            kept = result[name].abs() > update.abs()
            assert torch.allclose(result[name], kept * update / DENSITY, rtol=0, atol=1e-4)
            # Six deviations of so many draws.
            assert float(kept.double().mean()) == pytest.approx(DENSITY, abs=6 * (0.24 / kept.numel()) ** 0.5)


@pytest.mark.filterwarnings("ignore:The density")  # peft says that one prunes nothing
def test_its_ties_elects_signs_before_it_weights(peft, tmp_path):
    """Two models whose weights are next to nothing outvote one, and what it changed is lost there."""
    weights = [1.0, 0.01, 0.01]
    wanted = theirs(peft, "ties_svd", weights, density=1.0)
    found = ours(tmp_path, "ties", weights, density=1.0, space="full")
    for name in wanted:
        updates = torch.stack([deltas(peft, adapter)[name] for adapter in NAMES])
        shares = torch.tensor(weights).double()[:, None, None]
        equal = updates.sign() == updates.sum(0).sign()
        weighted = updates.sign() == (shares * updates).sum(0).sign()
        by_formula = (shares * updates * equal).sum(0) / equal.sum(0)
        assert float((wanted[name] - by_formula).norm()) < SAME * float(by_formula.norm())
        by_formula = (shares.square() * updates * weighted).sum(0) / (shares * weighted).sum(0)
        assert float((found[name] - by_formula).norm()) < SAME * float(by_formula.norm())
        assert float((wanted[name] * updates[0] < 0).double().mean()) > 0.2
        assert float((found[name] * updates[0] < 0).double().mean()) < 0.02
