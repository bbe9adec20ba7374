"""Adapters and the networks that they grew from: relatives pass, strangers are refused, whatever the shapes."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelgrove_hub.errors import UsageError
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_plugins.merge.sum import Sum

SHAPES = {"blocks.0.attn.to_q": (32, 24), "blocks.0.attn.to_k": (32, 24)}


@pytest.fixture
def network(tmp_path):
    def write(name, seed, near=None, noise=1.0):
        torch.manual_seed(seed)
        weights = {f"{module}.weight": noise * torch.randn(shape) for module, shape in SHAPES.items()}
        if near is not None:
            weights = {
                key: value + weights[key] for key, value in load_file(near.files()[f"{near.name}.safetensors"]).items()
            }
        path = tmp_path / f"{name}.safetensors"
        save_file(weights, path)
        return FolderModel(path, name=name)

    return write


def merge(models, base, folder, **params):
    given = [*models, base] if base else models
    return run_plugin(Sum(), given, folder, {"base": base is not None, **params}).report["warnings"]


def test_a_base_of_the_same_tree_is_taken(network, make, tmp_path):
    root = network("root", 0)
    tuned = network("tuned", 1, near=root, noise=0.1)
    adapter = make("cat", shapes=SHAPES, base=root)[0]
    assert merge([adapter], tuned, tmp_path / "tuned-job") == []
    assert merge([adapter], root, tmp_path / "root-job") == []


def test_a_base_that_is_another_network_is_refused(network, make, tmp_path):
    root, stranger = network("root", 0), network("stranger", 1)
    adapter = make("cat", shapes=SHAPES, base=root)[0]
    with pytest.raises(UsageError, match=r"cat grew from root, .* those of stranger correlate .* of its own tree"):
        merge([adapter], stranger, tmp_path / "job")
    assert not list((tmp_path / "job").rglob("*.safetensors"))


def test_a_distant_relative_is_warned_of(network, make, tmp_path):
    root = network("root", 0)
    far = network("far", 1, near=root, noise=2.5)  # correlation 1 / √(1 + 2.5²) = .37
    [warning] = merge([make("cat", shapes=SHAPES, base=root)[0]], far, tmp_path / "job")
    assert "cat grew from root" in warning
    assert "hardly related" in warning


def test_adapters_of_different_networks_do_not_become_one(network, make, tmp_path):
    adapters = [make(name, shapes=SHAPES, base=network(f"root-{name}", seed))[0] for seed, name in enumerate("ab")]
    with pytest.raises(UsageError, match=r"b grew from root-b, .* those of root-a"):
        merge(adapters, None, tmp_path / "job")


def test_without_evidence_shapes_decide(network, make, tmp_path):
    assert merge([make("cat", shapes=SHAPES)[0]], network("any", 0), tmp_path / "job") == []
