"""The encoders' formulas against plain ones on the formed matrix, in float64 where rounding would hide a mistake."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from modelgrove_analyzers.encoders import dense, mvprobe, probex, statnn
from modelgrove_analyzers.encoders.features import Updates
from modelgrove_analyzers.encoders.heads import logits, validation_models
from modelgrove_analyzers.encoders.learning import Encoder, place
from modelgrove_analyzers.encoders.probes import responses
from modelgrove_analyzers.encoders.statnn import SAMPLED, statistics
from modelgrove_hub.search.background import Background

OUT, IN, RANK, MODELS = 12, 9, 3, 4


@pytest.fixture
def updates() -> Updates:
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(MODELS, OUT, RANK, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(MODELS, IN, RANK, generator=generator)).Q
    S = torch.rand(MODELS, RANK, generator=generator) + 0.5
    U[1, :, 2], S[1, 2], V[1, :, 2] = 0, 0, 0  # a model of a lower rank is padded
    return Updates(U, S, V)


def formed(updates: Updates) -> torch.Tensor:
    return updates.U @ torch.diag_embed(updates.S) @ updates.V.mT


@pytest.mark.parametrize("view", ["X", "T", "squared", "T.squared"])
@pytest.mark.parametrize("standardise", [False, True])
def test_responses_are_those_of_the_formed_matrix(updates, view, standardise):
    X = formed(updates)
    chosen, matrix = {
        "X": (updates, X),
        "T": (updates.T, X.mT),
        "squared": (updates.squared, X @ X.mT),
        "T.squared": (updates.T.squared, X.mT @ X),
    }[view]
    generator = torch.Generator().manual_seed(1)
    probes = torch.randn(matrix.shape[2], 5, generator=generator)
    projection = torch.randn(matrix.shape[1], 6, generator=generator)
    heard = matrix @ probes
    if standardise:
        heard = (heard - heard.mean((1, 2), keepdim=True)) / heard.std((1, 2), keepdim=True, correction=0)
    expected = (projection.T @ heard).mT
    # float32 sums of a dozen terms of size one.
    torch.testing.assert_close(
        responses(chosen, probes, projection, standardise=standardise), expected, atol=1e-4, rtol=1e-4
    )


def test_probex_is_the_sum_over_probes_of_its_source(updates):
    parameters = probex.start((OUT, IN), 4, torch.Generator().manual_seed(2))
    X = formed(updates)
    expected = parameters["b"].repeat(MODELS, 1)
    for number in range(4):
        heard = (X @ parameters["U"][:, number] @ parameters["V"]).relu()
        expected = expected + heard @ parameters["M"].view(4, 4, 4)[:, number].T
    torch.testing.assert_close(probex.encode(parameters, updates), expected)


def test_dense_is_a_linear_map_of_all_entries(updates):
    parameters = dense.start((OUT, IN), 4, torch.Generator().manual_seed(2))
    weights = parameters["W"].view(4, OUT, IN)
    expected = torch.einsum("koi,noi->nk", weights, formed(updates)) + parameters["b"]
    torch.testing.assert_close(dense.encode(parameters, updates), expected)


def test_mvprobe_does_not_hear_strength(updates):
    parameters = mvprobe.start((OUT, IN), 4, torch.Generator().manual_seed(2))
    louder = Updates(updates.U, 7 * updates.S, updates.V)
    torch.testing.assert_close(
        mvprobe.encode(parameters, louder), mvprobe.encode(parameters, updates), atol=1e-5, rtol=1e-4
    )


def test_the_vector_ranks_models_for_every_text_as_the_learned_head_does(updates):
    """z-scores of Tᵀe order models for one text as logits less their mean over the background do."""
    generator = torch.Generator().manual_seed(4)
    prompts = torch.randn(50, 10, generator=generator)
    background = Background(prompts.numpy(), "test")
    texts = torch.randn(7, 10, generator=generator)
    parameters = probex.start((OUT, IN), 6, generator) | {
        "head.weight": torch.randn(6, 10, generator=generator), "head.bias": torch.zeros(6)
    }  # fmt: skip
    vectors = place(Encoder(probex.start, probex.encode), parameters, updates)
    encoded = probex.encode(parameters, updates)
    found = vectors @ texts.T
    lengths = (encoded @ parameters["head.weight"]).norm(dim=1) / encoded.norm(dim=1)
    heads = texts @ parameters["head.weight"].T
    # The logit is the cosine with the head's text, whose length is the same for all models.
    expected = logits(parameters, encoded, texts) * heads.norm(dim=1)
    torch.testing.assert_close(found * lengths[:, None], expected, atol=1e-5, rtol=1e-4)
    assert (background.scores(vectors.numpy(), texts.numpy()).shape) == (MODELS, 7)


def test_logits_are_cosines_times_the_temperature():
    generator = torch.Generator().manual_seed(0)
    parameters = {
        "head.weight": torch.randn(3, 5, generator=generator),
        "head.bias": torch.randn(3, generator=generator),
    }
    encoded, texts = torch.randn(2, 3, generator=generator), torch.randn(4, 5, generator=generator)
    heads = texts @ parameters["head.weight"].T + parameters["head.bias"]
    expected = cosine_similarity(encoded[:, None], heads[None], dim=2)
    torch.testing.assert_close(logits(parameters, encoded, texts), expected)
    torch.testing.assert_close(
        logits({**parameters, "temperature": torch.tensor(2.0)}, encoded, texts), expected * 2.718281828**2
    )


def test_one_model_of_each_label_that_has_others_is_kept_for_validation():
    names = [0, 0, 0, 1, 1, 2]
    kept = validation_models(names, torch.Generator().manual_seed(0)).tolist()
    assert sorted(names[i] for i in kept) == [0, 1]
    assert len(validation_models(list(range(30)), torch.Generator().manual_seed(0))) == 3


def test_statistics_are_those_of_the_formed_matrix(updates):
    X = formed(updates).flatten(1)
    found = statistics(updates)
    torch.testing.assert_close(found[:, 0], X.mean(1), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found[:, 1], X.var(1, correction=0), atol=1e-6, rtol=1e-4)
    # Places are drawn 38 times as often as there are entries, so hardly one is missed, and the extremes are there.
    assert SAMPLED > 30 * OUT * IN
    torch.testing.assert_close(found[:, [2, 6]], torch.stack([X.min(1).values, X.max(1).values], 1))
    # A quantile of 4,096 draws is within five standard errors, 5·√(p(1−p)/4096) < 0.04, of its own rank.
    for column, share in ((3, 0.25), (4, 0.5), (5, 0.75)):
        ranks = (found[:, [column]] + 1e-6 >= X).float().mean(1)
        assert (ranks - share).abs().max() < 0.04 + 1 / (OUT * IN) * 2
    assert statnn.QUANTILES == (0.0, 0.25, 0.5, 0.75, 1.0)
