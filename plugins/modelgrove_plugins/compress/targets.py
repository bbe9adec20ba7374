"""Which tensors a compressor takes, and the parameters that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from pydantic import Field

from modelgrove_hub.contracts import LazyTensor, Params

FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
SKIP = (
    "vae/*", "*norm*", "*embed*", "*bias",
    "*conv_in.weight", "*conv_out.weight", "*input_blocks.0.0.weight", "out.2.weight", "*.out.2.weight",
)  # fmt: skip
"""Kept by default: norms, embeddings, biases, the first and the last layer, and the autoencoder."""
DENOISERS = ("unet", "transformer")
"""Components of a pipeline that predict noise."""
_NOT_RECORDED = {"skip", "fidelity"}


class CompressorParams(Params):
    """What is left alone, and whether the result is compared; a method's own parameters come on top."""

    skip: tuple[str, ...] = Field(SKIP, description="Patterns of folder/tensor names that are kept as they are.")
    smallest: int = Field(4096, ge=0, description="Tensors with fewer values than this are kept as they are.")
    fidelity: bool | None = Field(
        None, description="Compare with the original on the same seeds; unset: denoisers that take moments."
    )

    def takes(self, tensor: LazyTensor) -> bool:
        """Whether a tensor is to be compressed: a matrix or convolution of floats that no pattern skips."""
        return tensor.dtype in FLOATS and self.takes_shape(tensor.name, tensor.shape)

    def takes_shape(self, name: str, shape: Sequence[int]) -> bool:
        """The same of a tensor of floats, by its name ("unet/…") and shape."""
        wanted = len(shape) >= 2 and prod(shape) >= max(1, self.smallest)
        return wanted and not any(fnmatchcase(name, pattern) for pattern in self.skip)

    def recorded(self) -> dict[str, Any]:
        """The parameters that decide a packed tensor, for the manifest."""
        return self.model_dump(mode="json", exclude=_NOT_RECORDED)
