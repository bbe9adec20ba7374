"""Write a key's mark into weights: 128 bits, by the smallest change that is read back with a margin.

A network is marked in its matrices and convolutions, streamed: one pass reads what the bits are by chance, a second one
writes. A LoRA is marked in its products BA, by a change of the factors at their rank; a mark in A alone would die when
(B, A) becomes (BG, G⁻¹A), which is the same adapter. The mathematics is in kernels/weight_mark.py.

What was written is opened again as every job opens a registered model, and its bits are read from there. A file that
does not show all of them fails the job, and so nothing is registered.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field

from modelgrove_hub.contracts import API, Context, InputModel, Kind, LazyTensor, Output, Params, Result, TensorWriter
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.quantized import KEY as PACKED
from modelgrove_hub.registry.inputs import RegisteredModel
from modelgrove_hub.rewriting import rewrite
from modelgrove_hub.tables import Relation
from modelgrove_plugins.compress.comparing import SHEET, compare, seek
from modelgrove_plugins.verify.measuring import KEY, committed, measure, rounded_to, told
from modelgrove_plugins.verify.reading import Changed, carrying_slots, factors_of, matrices_of

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_hub.formats.slots import Slot
    from modelgrove_kernels.weight_mark import MarkKey

REHEARSED = {"bfloat16": 16, "int8": 8, "int4": 4}
"""What the written file is rounded to, and read again: name → bits."""


class MarkParams(Params):
    """The key, and how strong its mark is."""

    key: str = Field(pattern="^[0-9a-f]{64}$", description=KEY)
    margin: float = Field(
        4.0, gt=0, le=100, description="Least strength of a bit, in standard deviations of unmarked weights."
    )
    fidelity: bool | None = Field(
        None, description="Compare with the original on the same seeds; unset: denoisers that take moments."
    )


class WeightMark:
    """Embed a key's bits into a network or a LoRA."""

    name: ClassVar[str] = "weight-mark"
    kind: ClassVar[Kind] = Kind.EDITOR
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Mark weights, or a LoRA's products, with the bits of a secret key."
    paper: ClassVar[str] = "Uchida et al., Embedding Watermarks into Deep Neural Networks (ICMR 2017)"
    Params: ClassVar[type[Params]] = MarkParams

    def run(self, context: Context, params: MarkParams) -> Result:
        """Write the marked model; report the change, what it does to the output, and the bits of the written file.

        Raises:
            NotFoundError: the key was not committed, or its secret is not here.
            UsageError: the model is packed, or has no room for the bits.
            DataError: a value is not finite, or the written file does not show the mark.
        """
        model = context.inputs[0]
        if PACKED in model.metadata():
            raise UsageError(f"model {model.name} is packed: mark the model that it was compressed from")
        public, key, _ = committed(params.key)
        evidence = seek(model, list(model.tensors()), params.fidelity)
        with Closing(context) as written:
            inside = cast("Context", written)
            mark = _mark_adapter if model.adapter_type is not None else _mark_network
            files, change = mark(inside, model, key, params.margin)
        again = _reopened(context, model, files)
        read = _read_back(context, again, key)
        if read["as written"]["agreeing"] != key.bits:
            raise DataError(
                f"the written file shows {read['as written']['agreeing']} of {key.bits} bits: ask for a larger margin"
            )
        if evidence.component:
            for tensor in again.tensors():
                if tensor.name.startswith(f"{evidence.component}/"):
                    evidence.keep(tensor.name, tensor.read())
        fidelity = compare(context, evidence, (), "marked")
        report = {
            "key": {"name": public.name, "commitment": public.id, "committed_at": public.committed_at.isoformat()},
            "bits": key.bits,
            "margin": params.margin,
            "change": change,
            "read_back": read,
            "fidelity": fidelity,
        }
        return Result((Output(files, Relation.EDIT),), report, artefacts=(SHEET,) if "error" in fidelity else ())


def _mark_network(
    context: Context, model: InputModel, key: MarkKey, margin: float
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Read once, then write; returns the files and the relative change."""
    import torch

    from modelgrove_kernels.weight_mark import amounts, dithered, relative_change

    matrices = matrices_of(model)
    (before,) = measure(context, [key], matrices, span=(0.0, 0.3))
    gram = torch.zeros(key.bits, key.bits, dtype=torch.float64)
    for matrix in matrices:
        gram += key.carriers(matrix.name, matrix.shape).gram()
    try:
        given = amounts(before.values(), key.message(), gram, before.size, margin)
    except ValueError as error:
        raise UsageError(f"model {model.name}: {error}") from error
    by_tensor: dict[str, list[tuple[str, Slot]]] = {}
    for name, slot in carrying_slots(model).items():
        by_tensor.setdefault(slot.tensor.name, []).append((name, slot))
    generator = context.generator()

    def change(tensor: LazyTensor) -> Tensor:
        stored = tensor.read()
        if tensor.name not in by_tensor:
            return stored
        values = stored.float().clone()
        for name, slot in by_tensor[tensor.name]:
            part = slot.part_of(values)
            part.copy_(key.carriers(name, slot.shape).added(part.reshape(slot.shape), given).reshape(part.shape))
        return dithered(values, stored.dtype, generator)

    files = rewrite(context, model, change, model.metadata())
    return files, {
        "relative": _digits(relative_change(given * before.size**0.5, gram, before.size)),
        "matrices": len(matrices),
        "weights": before.size,
    }


def _mark_adapter(
    context: Context, model: InputModel, key: MarkKey, margin: float
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Change factors in memory, then write them where they were, with the scale that the file gives them."""
    from modelgrove_kernels.lowrank import LowRank, inner, stack
    from modelgrove_kernels.weight_mark import marked_updates

    targets = factors_of(model)
    if not targets:
        raise UsageError(f"model {model.name} has no plain factors to mark: bake it into its base, and mark that")
    updates = {}
    for number, (name, target) in enumerate(targets.items()):
        context.progress(0.2 * number / len(targets), f"reading {name}")
        factors = target.read()
        updates[name] = LowRank(factors.up, factors.down)
    living = {name: update for name, update in updates.items() if inner(update, update) > 0}
    try:
        marked = marked_updates(key, living, margin)
    except ValueError as error:
        raise UsageError(f"model {model.name}: {error}") from error
    moved, size, new = 0.0, 0, dict[str, "Tensor"]()
    for name, update in marked.items():
        target, old = targets[name], updates[name]
        count = target.shape[0] * target.shape[1]
        moved += inner(*[stack([update, old], [1.0, -1.0])] * 2) / inner(old, old) * count
        size += count
        new[target.down.name] = update.down.reshape(target.down.shape)
        new[target.up.name] = (update.up / (target.scale or 1.0)).reshape(target.up.shape)

    def change(tensor: LazyTensor) -> Tensor:
        stored = tensor.read()
        return new[tensor.name].to(stored.dtype) if tensor.name in new else stored

    files = rewrite(context, model, change, model.metadata())
    relative = _digits((max(0.0, moved) / size) ** 0.5)
    ranks = sorted({target.rank for target in targets.values()})
    return files, {"relative": relative, "matrices": len(marked), "weights": size, "ranks": ranks}


def _read_back(context: Context, again: InputModel, key: MarkKey) -> dict[str, Any]:
    """The bits of the written file, and of what it becomes when it is rounded."""
    report = {}
    rounds = {"as written": None, **REHEARSED}
    for number, (name, bits) in enumerate(rounds.items()):
        seen = again if bits is None else cast("InputModel", Changed(again, rounded_to(bits)))
        span = (0.6 + 0.3 * number / len(rounds), 0.6 + 0.3 * (number + 1) / len(rounds))
        (found,) = measure(context, [key], matrices_of(seen), span=span, what=f"{name}:")
        report[name] = told(key, found)
    return report


def _reopened(context: Context, model: InputModel, files: tuple[str, ...]) -> RegisteredModel:
    """What was written, as jobs are given registered models."""
    return RegisteredModel(
        name=model.name, family=model.family, adapter_type=model.adapter_type, revision_id=0, summary=model.summary,
        card="", tags=(), paths={path: context.path(path) for path in files},
    )  # fmt: skip


class Closing:
    """A context whose weight files are whole when the block ends, so that a job can read what it wrote."""

    def __init__(self, context: Context) -> None:
        self._context, self._writers = context, ExitStack()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def __enter__(self) -> Closing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writers.__exit__(kind, error, trace)

    def writer(self, path: str, metadata: Mapping[str, str] | None = None) -> TensorWriter:
        """A streaming safetensors writer, closed at the end of the block; on an exception nothing is left of it."""
        from modelgrove_hub.store.writer import SafetensorsWriter

        return self._writers.enter_context(SafetensorsWriter(self._context.path(path), metadata))


def _digits(value: float) -> float:
    return float(f"{value:.3e}")
