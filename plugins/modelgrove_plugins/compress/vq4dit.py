"""VQ4DiT (Deng et al., AAAI 2025, arXiv 2408.17131): neighbouring weights share a code, at 2 to 4 bits each.

Codebooks are found by k-means. Then codebook and assignments are learned together, block by block, on what the
denoiser's blocks are given while the model itself paints; without `--iterations` they stay as k-means left them. The
arithmetic is in kernels/codebook.py.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from modelgrove_hub.contracts import API, Context, Kind, LazyTensor, Params, Result
from modelgrove_hub.errors import DataError
from modelgrove_plugins.compress.packed import Stored, axes_of, describe, matrix_of, predict
from modelgrove_plugins.compress.reconstructing import LearnedParams, learned
from modelgrove_plugins.compress.streaming import compress

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_hub.formats.quantized import PackedTensor
    from modelgrove_kernels.codebook import Assignment, Codebook

_BOOKS = {2: (8, 4), 3: (6, 2), 4: (8, 2)}
"""Bits of a weight → bits of a code, weights that share it: the published codebooks of 256 and 64 entries."""


class Vq4DitParams(LearnedParams):
    """How large the codebooks are, and how long they are learned."""

    bits: Literal[2, 3, 4] = Field(
        3, description="Bits of a weight: 2 (256 entries of 4 weights), 3 (64 of 2) or 4 (256 of 2)."
    )


class Vq4Dit:
    """Replace groups of neighbouring weights by entries of a codebook; learn which, and the entries."""

    name: ClassVar[str] = "vq4dit"
    kind: ClassVar[Kind] = Kind.COMPRESSOR
    api: ClassVar[int] = API
    summary: ClassVar[str] = "VQ4DiT: a codebook a layer, 2 to 4 bits a weight, learned block by block."
    paper: ClassVar[str] = "Deng et al., VQ4DiT (AAAI 2025, arXiv 2408.17131)"
    Params: ClassVar[type[Params]] = Vq4DitParams

    def choose(self, tensor: LazyTensor, params: Vq4DitParams) -> PackedTensor | None:
        """What `run` will make of a tensor."""
        if not params.takes(tensor):
            return None
        code, vector = _BOOKS[params.bits]
        columns = prod(tensor.shape[1:])
        return predict(tensor, layout="lut", bits=code, vector=vector, group=columns + -columns % vector)

    def run(self, context: Context, params: Vq4DitParams) -> Result:
        """Learn block by block, then write; layers that were learned report how many assignments k-means had wrong.

        Layers outside the denoiser (a text encoder's, say) are as k-means leaves them.

        Raises:
            UsageError: the model cannot paint, has nothing to quantize, or is an adapter or quantized already.
            DataError: a weight is NaN or infinite; the message names it.
        """
        found: dict[str, tuple[dict[str, Tensor], float]] = {}

        def relax(name: str, weight: Tensor) -> Assignment:
            from modelgrove_kernels.codebook import Assignment

            return Assignment(_book(name, weight, context, params), weight.shape, axes_of(weight))

        if params.iterations:
            for name, weight in learned(context, context.inputs[0], params, relax):
                moved = float((weight.decided() != weight.candidates[:, 0]).float().mean())
                found[name] = weight.book.parts(weight), moved

        def quantize(tensor: LazyTensor) -> Stored | None:
            if not params.takes(tensor):
                return None
            values = tensor.read()
            parts, moved = found.pop(tensor.name, (None, 0.0))
            stored = _described(values, parts or _book(tensor.name, values, context, params).parts(), params)
            return Stored(stored.entry, stored.parts, {"moved": round(moved, 4)} if parts else {})

        tag = f"vq{params.bits}"
        return compress(context, self.name, params.recorded(), quantize, tag, fidelity=params.fidelity)


def _book(name: str, weight: Tensor, context: Context, params: Vq4DitParams) -> Codebook:
    from modelgrove_kernels.codebook import Codebook

    try:
        return Codebook(matrix_of(weight), *_BOOKS[params.bits], context.generator())
    except ValueError as error:
        raise DataError(f"tensor {name}: {error}") from error


def _described(values: Tensor, parts: dict[str, Tensor], params: Vq4DitParams) -> Stored:
    code, vector = _BOOKS[params.bits]
    columns = values[0].numel()
    return describe(values, parts, layout="lut", bits=code, vector=vector, group=columns + -columns % vector)
