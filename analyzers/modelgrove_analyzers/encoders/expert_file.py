"""An expert on disk: what an encoder learned as tensors, and how to read it again as JSON in the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelgrove_analyzers.encoders.features import Shape
from modelgrove_hub.contracts import TensorWriter
from modelgrove_hub.errors import CorruptFileError

if TYPE_CHECKING:
    from torch import Tensor

FILE = "expert.safetensors"
_KEY = "modelgrove.expert"
_REFERENCE = "reference."


@dataclass(frozen=True)
class Saved:
    """What a file of an expert holds; tensors are float32 in memory, those of the reference as they were."""

    columns: int
    """Directions that were read of each layer's update."""
    shapes: Mapping[str, Shape]
    """The layers that are known."""
    tensors: Mapping[str, Tensor]
    reference: Mapping[str, Tensor] | None = None
    """By layer, what full fine-tunes are compared with; None for an expert of adapters."""


def metadata(form: str, saved: Saved) -> dict[str, str]:
    """The file's metadata; `form` names the encoder and the version of its format."""
    about = {"format": form, "columns": saved.columns, "shapes": dict(saved.shapes)}
    return {_KEY: json.dumps(about)}


def write_tensors(saved: Saved, writer: TensorWriter) -> None:
    """Write the tensors as they are, those of the reference one by one."""
    for name, tensor in saved.tensors.items():
        writer.add(name, tensor)
    for layer, tensor in (saved.reference or {}).items():
        writer.add(_REFERENCE + layer, tensor)


def read_saved(path: Path, form: str) -> Saved:
    """The expert in `path`.

    Raises:
        CorruptFileError: it is none, or one of another encoder or version.
    """
    from modelgrove_hub.store.header import read_header
    from modelgrove_hub.store.tensors import tensors_of

    try:
        about = json.loads(read_header(path).metadata[_KEY])
        if about["format"] != form:
            raise CorruptFileError(f"{path}: an expert of format {about['format']!r}, not {form!r}: fit it again")
        shapes = {layer: (int(out), int(width)) for layer, (out, width) in about["shapes"].items()}
        tensors, reference = {}, {}
        for tensor in tensors_of(path):
            if tensor.name.startswith(_REFERENCE):
                reference[tensor.name.removeprefix(_REFERENCE)] = tensor.read()
            else:
                tensors[tensor.name] = tensor.read().float()
        return Saved(int(about["columns"]), shapes, tensors, reference or None)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{path} is no expert of {form.split()[0]}: {error!r}") from error
