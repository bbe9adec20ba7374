"""The text encoder against sentence-transformers, which reads the same files in its own way."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from modelgrove_hub.search.text import TOKENS, WIDTH, embed_texts, model_folder, token_states

TEXTS = [
    "a king's crown", "", "  A Cat\twith UPPER case ", "naïve café 漢字 🍎", "x" * 300, "word " * 400,
    *(f"a picture of {number} things" + " and more" * (number % 7) for number in range(60)),
]  # fmt: skip
ROUNDING = 1e-5
"""Both compute in float32, padded to other lengths: sums of 384 products in another order, six layers deep."""


@pytest.fixture(scope="module")
def reference():
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(model_folder()), device="cpu", local_files_only=True)


def test_sentence_vectors_are_those_of_sentence_transformers(reference):
    wanted = reference.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    vectors = embed_texts(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, wanted, atol=ROUNDING)


def test_token_states_are_those_of_sentence_transformers(reference):
    states = token_states(TEXTS)
    assert states.shape == (len(TEXTS), TOKENS, WIDTH)
    for text, found in zip(TEXTS[:6], states[:6], strict=True):
        tokens = reference[0].tokenizer(text, truncation=True, max_length=TOKENS, return_tensors="pt")
        with torch.no_grad():
            wanted = reference[0].auto_model(**tokens).last_hidden_state[0]
        torch.testing.assert_close(found[: len(wanted)], wanted, atol=10 * ROUNDING, rtol=0)  # states are up to 10 long
        assert not found[len(wanted) :].any()


def test_states_can_be_trained_with():
    weight = torch.ones(WIDTH, requires_grad=True)
    (token_states(["a cat"]) * weight).sum().backward()
    assert weight.grad is not None


def test_no_texts_give_no_vectors():
    assert embed_texts([]).shape == (0, WIDTH)


def test_sentence_transformers_is_not_imported():
    code = "import sys; from modelgrove_hub.search.text import embed_texts; embed_texts(['a']); "
    code += "print('sentence_transformers' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "False"
