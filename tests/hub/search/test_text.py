"""The text space against the arithmetic of its paper: mean of the last hidden states, length one."""

import numpy as np
import pytest
import torch

from modelgrove_hub.search.text import TOKENS, WIDTH, embed_texts, model_folder, token_states

TEXTS = ["a king's crown", "", "  A Cat\twith UPPER case ", "naïve café 漢字 🍎", "word " * 400]
LONGEST = 256
ROUNDING = 1e-5
"""Both compute in float32, padded to other lengths: sums of 384 products in another order, six layers deep."""


@pytest.fixture(scope="module")
def hidden_states():
    """Text and limit → last hidden states (t, 384), by transformers alone, one text at a time."""
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)
    network = BertModel.from_pretrained(model_folder(), local_files_only=True).eval()

    def states(text, longest):
        with torch.no_grad():
            tokens = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
            return network(**tokens).last_hidden_state[0]

    return states


def test_sentence_vectors_are_mean_states_of_length_one(hidden_states):
    vectors = embed_texts(TEXTS)
    assert vectors.dtype == np.float32
    wanted = torch.stack([hidden_states(text, LONGEST).mean(0) for text in TEXTS])
    np.testing.assert_allclose(vectors, torch.nn.functional.normalize(wanted, dim=1), atol=ROUNDING)


def test_token_states_are_cut_and_padded_with_zeros(hidden_states):
    states = token_states(TEXTS)
    assert states.shape == (len(TEXTS), TOKENS, WIDTH)
    for text, found in zip(TEXTS, states, strict=True):
        wanted = hidden_states(text, TOKENS)
        torch.testing.assert_close(found[: len(wanted)], wanted, atol=10 * ROUNDING, rtol=0)  # states are up to 10 long
        assert not found[len(wanted) :].any()


def test_states_can_be_trained_with():
    weight = torch.ones(WIDTH, requires_grad=True)
    (token_states(["a cat"]) * weight).sum().backward()
    assert weight.grad is not None
