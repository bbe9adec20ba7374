import pytest
import torch
from zoo_models import BASE

from modelgrove_analyzers.encoders.denoiser import open_denoiser
from modelgrove_analyzers.encoders.responses import DIRECTIONS, NEUTRAL, TIMESTEP, responses

WORDS = ("cat", "a red house", "fire")
TIME_LAYER = "down_blocks_0_resnets_0_time_emb_proj"
TEXT_LAYER = "up_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v"


@pytest.fixture(scope="module")
def denoiser():
    return open_denoiser(BASE)


def test_what_a_word_does_to_the_time_embedding_is_found(denoiser):
    """In a layer that sees no latents the response follows from the embeddings alone."""
    unet = denoiser.unet
    module = unet.get_submodule("down_blocks.0.resnets.0.time_emb_proj")

    def embedded(text):
        times = unet.time_embedding(unet.time_proj(torch.tensor([TIMESTEP])).float())
        return torch.nn.functional.silu(times + unet.add_embedding(denoiser.states([text])))

    with torch.no_grad():
        inputs = embedded(NEUTRAL)
        outputs = torch.stack([module(embedded(word)) for word in WORDS])
        updates = torch.einsum("wpo,pi->woi", outputs - outputs.mean(0), inputs)
    found = responses(denoiser, WORDS, [TIME_LAYER])[TIME_LAYER]
    expected = (updates @ found.inputs).flatten(1)
    # Float32 sums of products in another order.
    torch.testing.assert_close(found.words, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_text_states_are_answered_token_by_token(denoiser):
    """Values read the text alone, whatever the latents are."""
    module = denoiser.unet.get_submodule("up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v")
    neutral, states = denoiser.states([NEUTRAL])[0], denoiser.states(WORDS)
    outputs = states @ module.weight.T
    updates = torch.einsum("wpo,pi->woi", outputs - outputs.mean(0), neutral)
    found = responses(denoiser, WORDS, [TEXT_LAYER])[TEXT_LAYER]
    expected = (updates @ found.inputs).flatten(1)
    torch.testing.assert_close(found.words, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_the_layers_asked_for_are_those_found(denoiser):
    found = responses(denoiser, WORDS, [TIME_LAYER, TEXT_LAYER, "no_such_layer", "conv_in"])
    assert set(found) == {TIME_LAYER, TEXT_LAYER}
    for answer in found.values():
        identity = torch.eye(answer.inputs.shape[1])
        # Right singular vectors, to the precision of float32.
        torch.testing.assert_close(answer.inputs.T @ answer.inputs, identity, atol=1e-5, rtol=0)
        assert answer.inputs.shape[1] <= DIRECTIONS
        assert answer.words.shape[0] == len(WORDS)
        assert float(answer.words.mean(0).abs().max()) < 1e-3 * float(answer.words.abs().max())


def test_asking_leaves_no_hook_behind(denoiser):
    responses(denoiser, WORDS, [TIME_LAYER])
    assert not any(module._forward_hooks for module in denoiser.unet.modules())


def test_a_base_without_any_of_the_layers_is_not_asked(denoiser, monkeypatch):
    monkeypatch.setattr(denoiser.unet, "forward", None)
    assert responses(denoiser, WORDS, ["no_such_layer"]) == {}
