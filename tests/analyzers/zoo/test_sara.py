"""The smallest weights are trained, the others stay: against masked training of the whole network."""

import copy
from dataclasses import replace

import pytest
import torch

from modelgrove_analyzers.zoo import sara
from modelgrove_analyzers.zoo.base import v_errors
from modelgrove_analyzers.zoo.concepts import find_concept
from modelgrove_analyzers.zoo.loras import BETAS, EPSILON, Feed, learning_rate
from modelgrove_analyzers.zoo.recipes import Method, Nuisance, draw_recipe
from modelgrove_analyzers.zoo.sara import SHARE, Tuning, small, train_sara, write_changes
from modelgrove_hub.formats.sara import check_base
from modelgrove_hub.formats.updates import open_updates
from modelgrove_hub.search.text import token_states
from modelgrove_hub.testing import FolderModel


@pytest.fixture(scope="module")
def recipe(pictures):
    drawn = draw_recipe(find_concept("cat"), 1, Nuisance(method=Method.SARA), pictures)
    return replace(drawn, steps=6, learning_rate=1e-2)


@pytest.fixture(scope="module")
def trained(tiny, pictures, recipe):
    return train_sara(tiny, pictures, recipe)


def parameters(unet):
    return {name: p.detach() for name, p in unet.named_parameters() if name.endswith((".weight", ".bias"))}


def trained_in_full(tiny, pictures, recipe, threshold):
    """Adam on all weights, whose gradients are masked; the mask shrinks at half of the steps, and Adam begins anew."""
    unet = copy.deepcopy(tiny.unet).requires_grad_(True)
    own = {name: p for name, p in unet.named_parameters() if name.endswith((".weight", ".bias"))}
    masks = {name: p.detach().abs() < threshold for name, p in own.items()}
    optimizer = torch.optim.Adam(own.values(), betas=BETAS, eps=EPSILON)
    feed, states = Feed(tiny, pictures, recipe), token_states([recipe.prompt]).expand(recipe.batch, -1, -1)
    for step in range(recipe.steps):
        if step == recipe.steps // 2:
            masks = {name: masks[name] & (p.detach().abs() < threshold) for name, p in own.items()}
            optimizer = torch.optim.Adam(own.values(), betas=BETAS, eps=EPSILON)
        latents, times, epsilon = feed.draw()
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, step)
        optimizer.zero_grad()
        v_errors(unet, tiny.noise, latents, states, times, epsilon).mean().backward()
        for name, p in own.items():
            if p.grad is not None:
                p.grad *= masks[name]
        optimizer.step()
    return parameters(unet), masks


def test_without_the_penalty_it_equals_training_of_all_weights_with_masked_gradients(
    tiny, pictures, recipe, monkeypatch
):
    monkeypatch.setattr(sara, "PENALTY", 0.0)
    trained = train_sara(tiny, pictures, recipe)
    wanted, last = trained_in_full(tiny, pictures, recipe, trained.threshold)
    origins = parameters(tiny.unet)
    assert any(int(last[name].sum()) < len(places) for name, (places, _) in trained.changes.items())  # it did narrow
    for name, weight in origins.items():
        found = weight.flatten().clone()
        if name in trained.changes:
            places, values = trained.changes[name]
            found[places] += values
        # The same mathematics: float32 noise through six steps of Adam of size 1e-2.
        torch.testing.assert_close(found.view_as(weight), wanted[name], rtol=0, atol=2e-5)


def test_the_share_of_the_base_that_is_smallest_is_trained(tiny, trained):
    origins = parameters(tiny.unet)
    count = sum(weight.numel() for weight in origins.values())
    places = sum(len(own) for own, _ in trained.changes.values())
    assert 0.98 * SHARE < places / count <= SHARE
    for name, (own, values) in trained.changes.items():
        assert torch.equal(own, small(origins[name], trained.threshold))
        assert values.shape == own.shape
    assert trained.last_loss < trained.first_loss


def test_training_leaves_the_base_as_it_was(tiny, pictures, recipe):
    before = copy.deepcopy(tiny.unet.state_dict())
    train_sara(tiny, pictures, replace(recipe, steps=2))
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.unet.state_dict().items())


def test_the_penalty_is_the_nuclear_norm_of_the_small_weights_as_they_are():
    generator = torch.Generator().manual_seed(0)
    frozen = {"a.weight": torch.randn(70, 80, generator=generator), "b.weight": torch.randn(64, 90)}
    tuning = Tuning(frozen, {name: small(weight, 0.3) for name, weight in frozen.items()})
    tuning.values["a.weight"].data.normal_(generator=generator)
    norm = tuning.nuclear_norm(torch.Generator())
    mask = frozen["a.weight"].abs() < 0.3
    masked = torch.zeros(70, 80, dtype=torch.float64)
    masked[mask] = (frozen["a.weight"][mask] + tuning.values["a.weight"]).double().detach()
    U, S, Vh = torch.linalg.svd(masked, full_matrices=False)
    # One matrix alone is wide enough; singular values in float32.
    assert float(norm.detach()) == pytest.approx(float(S.sum()), rel=1e-5)
    [gradient] = torch.autograd.grad(norm, tuning.values["a.weight"])
    torch.testing.assert_close(gradient.double(), (U @ Vh)[mask], rtol=0, atol=1e-4)


def test_weights_that_have_grown_stay_and_the_others_go_on():
    frozen = {"a.weight": torch.tensor([[0.1, 0.5], [-0.2, 0.05]])}
    tuning = Tuning(frozen, {"a.weight": small(frozen["a.weight"], 0.3)})
    tuning.values["a.weight"].data = torch.tensor([0.4, -0.05, -0.4])
    narrowed = tuning.narrowed(0.3)
    assert narrowed.places["a.weight"].tolist() == [2]
    torch.testing.assert_close(narrowed.weights()["a.weight"], torch.tensor([[0.5, 0.5], [-0.25, -0.35]]))


def test_what_is_written_is_an_adapter_of_the_base(tiny, trained, tmp_path):
    write_changes(trained, tmp_path / "sara.safetensors")
    tiny.unet.save_pretrained(tmp_path / "base/unet")
    adapter = open_updates(FolderModel(tmp_path / "sara.safetensors", name="sara"))
    check_base(adapter, FolderModel(tmp_path / "base", name="base"))
    assert adapter.unmatched == ()
    for name, (places, values) in trained.changes.items():
        if bool(values.half().any()):
            update = adapter.targets[name.removesuffix(".weight")]
            assert torch.equal(update.read().flatten()[places], values.half().float())
