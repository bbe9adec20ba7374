"""Style tokens: learned words that belong to a LoRA, one for each style (merger.museum).

A token is one row of what the denoiser's cross-attention reads, (1, width) float32, so it is no textual inversion:
those are read by a text encoder, whose answer it stands beside. In a prompt it is written <name>; the text encoder
reads the prompt without it, and the row takes the last place of the states, several rows the last places, so that
shapes stay as they are. The file's metadata has the names in the order in which they were learned.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelgrove_hub.contracts import InputModel
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.adapters import read_finite

if TYPE_CHECKING:
    from torch import Tensor

FILE = "style_tokens.safetensors"
"""Beside the LoRA's file and not in it: diffusers refuses a LoRA file with any other tensor."""
KEY = "modelgrove.museum"
"""In the metadata of that file: a `Museum`."""
PREFIX = "style_tokens."
"""Of the tensors' names."""
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
"""What a token may be called."""
MOST = 4096
"""Styles in one file."""
_WRITTEN = re.compile(rf"<({NAME.pattern})>")


class Style(BaseModel):
    """One style: its token's name, and the sha256 of the row's little-endian float32 values."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    token: str = Field(pattern=rf"^{NAME.pattern}$")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Museum(BaseModel):
    """What the file says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    styles: tuple[Style, ...] = Field(min_length=1, max_length=MOST)
    """In the order of learning."""
    base: str
    """The digest of the denoiser's weight files."""
    parent: str | None
    """The digest of the version that this one grew from."""


def museum_from(metadata: Mapping[str, str], where: str) -> Museum | None:
    """What a file's metadata say of its style tokens; None if it has none.

    Raises:
        DataError: they are broken; the message begins with `where`.
    """
    if KEY not in metadata:
        return None
    try:
        return Museum.model_validate_json(metadata[KEY])
    except ValidationError as error:
        raise DataError(f"{where}: {KEY} in the metadata is broken: {error.errors()[0]['msg']}") from error


def read_museum(model: InputModel) -> tuple[Museum, dict[str, Tensor]] | None:
    """What the model's file of style tokens says, and the rows (1, width) by name; None if it has no such file.

    Raises:
        DataError: the metadata is broken, or a row is missing, of another shape or other than its hash says.
    """
    museum = museum_from(model.metadata(), model.name)
    if museum is None:
        return None
    stored = {tensor.key: tensor for tensor in model.tensors() if tensor.key.startswith(PREFIX)}
    rows: dict[str, Tensor] = {}
    for style in museum.styles:
        tensor = stored.get(PREFIX + style.token)
        if tensor is None or tensor.dtype != "F32" or len(tensor.shape) != 2 or tensor.shape[0] != 1:
            raise DataError(f"{model.name}: no F32 tensor {PREFIX}{style.token} of shape (1, width)")
        rows[style.token] = read_finite(tensor)
        if hash_of(rows[style.token]) != style.sha256:
            raise DataError(f"{model.name}: tensor {PREFIX}{style.token} is not the one that the metadata tells of")
    return museum, rows


def hash_of(row: Tensor) -> str:
    """sha256 of the row's float32 values, little-endian."""
    return hashlib.sha256(row.detach().numpy().astype("<f4").tobytes()).hexdigest()


def split_prompt(prompt: str, tokens: Mapping[str, Tensor]) -> tuple[str, list[Tensor]]:
    """The prompt without the tokens that are written in it, and their rows; <words> of no known token stay."""
    used = [tokens[name] for name in _WRITTEN.findall(prompt) if name in tokens]
    if not used:
        return prompt, []
    kept = _WRITTEN.sub(lambda found: "" if found[1] in tokens else found[0], prompt)
    return " ".join(kept.split()), used


def place_rows(states: Tensor, rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """A copy of the states (n, tokens, width) with each prompt's rows in its last places; rows keep their gradients.

    Raises:
        UsageError: the rows are not of the states' width, or more than they have places.
    """
    import torch

    found = []
    for state, own in zip(states, rows, strict=True):
        if len(own) > len(state) or any(row.shape[1] != state.shape[1] for row in own):
            raise UsageError(
                f"{len(own)} style tokens of width {[row.shape[1] for row in own]} do not fit into states "
                f"{tuple(state.shape)}: they were learned on another base, or are too many"
            )
        found.append(torch.cat([state[: len(state) - len(own)], *own]))
    return torch.stack(found)
