"""Write a model anew, tensor by tensor: what compressors, editors and mergers of like models have in common."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from modelgrove_hub.contracts import Context, InputModel, LazyTensor, TensorWriter
from modelgrove_hub.ingest.discover import WEIGHT_SUFFIXES

if TYPE_CHECKING:
    from torch import Tensor


def rewrite(
    context: Context, model: InputModel, change: Callable[[LazyTensor], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> tuple[str, ...]:  # fmt: skip
    """Write every tensor of `model` as `change` returns it, under its own name in a file of the same path.

    Configurations and tokenizers come along, so that the output is a whole model. The card does not,
    which describes another model, nor do weights in other formats. Reports progress before every tensor.
    `metadata` is put into every weight file.

    Returns:
        The paths written: the `files` of an `Output`.

    Raises:
        DataError: the model has no safetensors file; and whatever `change` raises.
    """
    tensors = list(model.tensors())
    writers: dict[str, TensorWriter] = {}
    for number, tensor in enumerate(tensors):
        context.progress(number / len(tensors), tensor.name)
        if tensor.file not in writers:
            writers[tensor.file] = context.writer(tensor.file, {"format": "pt", **(metadata or {})})
        writers[tensor.file].add(tensor.key, change(tensor))
    left_out = WEIGHT_SUFFIXES | {".md"}
    others = {path: file for path, file in model.files().items() if PurePosixPath(path).suffix not in left_out}
    for path, file in others.items():
        shutil.copyfile(file, context.path(path))
    return (*writers, *others)
