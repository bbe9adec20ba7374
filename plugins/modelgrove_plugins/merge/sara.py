"""What a fine-tune changed in the base's smallest weights, as a sparse adapter (SaRA).

The smallest weights by magnitude do nothing for what a model paints (Hu et al., section 3), so SaRA trains them alone.
Of a fine-tune that was trained otherwise most of the change lies elsewhere and is dropped: the report says how much.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field

from modelgrove_hub.contracts import API, Context, InputModel, Kind, LazyTensor, Output, Params, Result
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.adapter_keys import key_of
from modelgrove_hub.formats.adapter_writing import written_component
from modelgrove_hub.formats.adapters import FLOATS
from modelgrove_hub.formats.sara import FILE, SparseWriter, origin_of
from modelgrove_hub.formats.slots import parameters_of
from modelgrove_hub.tables import ModelKind, Relation
from modelgrove_plugins.merge.interference import rounded
from modelgrove_plugins.merge.mixing import matching

_ALL = 0.99
"""Less of the change than this inside the small weights is warned of."""


class SaraParams(Params):
    """Which weights of the base count as small."""

    base: bool = Field(False, description="The last input is the base that the other one was fine-tuned from.")
    threshold: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Magnitudes below it are small; if not given, by --share."
    )
    share: float = Field(0.2, gt=0, lt=1, description="Share of the base's weights that are small; 0.1 to 0.2 in SaRA.")


class Sara:
    """Keep what a fine-tune changed in the base's small weights, and say what that leaves out."""

    name: ClassVar[str] = "sara"
    kind: ClassVar[Kind] = Kind.MERGER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "A fine-tune's changes of the base's smallest weights, as a sparse adapter."
    paper: ClassVar[str] = "Hu et al., SaRA (ICLR 2025)"
    Params: ClassVar[type[Params]] = SaraParams

    def run(self, context: Context, params: SaraParams) -> Result:
        """Write the adapter; report for every tensor how much of the change's energy it holds.

        Raises:
            UsageError: there is no base, the models have other tensors, or nothing changed in the small weights.
            DataError: values are not finite; the message names the tensor.
        """
        from modelgrove_kernels.sparse import threshold_of

        model, base = _pair(context.inputs, based=params.base)
        tuned, named = matching(model, base), dict(_named(base))
        if not named:
            raise UsageError(f"{base.name} has no weights of modules, such as conv_in.weight")
        weights = (tensor.read() for tensor in base.tensors() if tensor.name in named)
        threshold = params.threshold or threshold_of(weights, params.share)
        writer, rows = SparseWriter(context.writer(FILE, {"format": "pt"}), threshold), []
        chosen = [tensor for tensor in base.tensors() if tensor.dtype in FLOATS]
        for number, tensor in enumerate(chosen):
            context.progress(number / len(chosen), tensor.name)
            rows.append(_extract(writer, tensor, tuned[tensor.name], named.get(tensor.name), threshold))
        report = _report(model.name, base.name, threshold, rows)
        for warning in report["warnings"]:
            context.log(f"warning: {warning}")
        writer.close()
        return Result((Output((FILE,), Relation.ADAPTER, name=f"{model.name}-sara", kind=ModelKind.ADAPTER),), report)


def _pair(inputs: Any, *, based: bool) -> tuple[InputModel, InputModel]:
    if not based or len(inputs) != 2:
        raise UsageError("sara compares one fine-tuned checkpoint with its base: name the one, and --base the other")
    for model in inputs:
        if model.adapter_type is not None:
            raise UsageError(
                f"{model.name} is an adapter already ({model.adapter_type}); "
                "adapters are merged, and put into a base, by another --method"
            )
    return inputs[0], inputs[1]


def _named(base: InputModel) -> Iterator[tuple[str, str]]:
    """Name of a base's tensor → name that adapters have for the parameter."""
    for stem, parameter, tensor in parameters_of(base):
        if tensor.dtype in FLOATS:
            key = key_of(stem, "")
            component = written_component(key.component, key.module)
            yield tensor.name, f"{component}.{key.module}.{parameter}".lstrip(".")


def _extract(
    writer: SparseWriter, tensor: LazyTensor, tuned: LazyTensor, name: str | None, threshold: float
) -> dict[str, Any]:
    """Write what changed below the threshold; the row of the report. `name` is None of what no adapter can change."""
    stored = tensor.read()
    weight = stored.float().flatten()
    change = tuned.read().float().flatten() - weight
    energy = float(change.square().sum())
    if not energy < float("inf"):
        raise DataError(f"tensor {tensor.name} holds NaN or infinite values in one of the models")
    row = {"tensor": tensor.name, "energy": energy, "inside": 0.0, "weights": change.numel(), "changed": 0, "bytes": 0}
    if name is None or not energy:
        return row
    places = ((weight.abs() < threshold) & (change != 0)).nonzero().flatten()
    if not len(places):
        return row
    values = change[places].to(stored.dtype)
    if not bool(values.isfinite().all()):
        raise DataError(f"tensor {tensor.name} changes by more than {tensor.dtype} holds")
    taken = writer.add(name, places, values, origin_of(stored))
    return row | {"inside": float(change[places].square().sum()), "changed": len(places), "bytes": taken}


def _report(model: str, base: str, threshold: float, rows: list[dict[str, Any]]) -> dict[str, Any]:
    energy, inside = (sum(row[key] for row in rows) for key in ("energy", "inside"))
    weights, changed, taken = (sum(row[key] for row in rows) for key in ("weights", "changed", "bytes"))
    if not changed:
        raise UsageError(
            f"{model} changes no weight of {base} that is smaller than {threshold:g}: "
            + ("all its changes are in larger ones; raise --threshold or --share" if energy else "both are the same")
        )
    kept = inside / energy
    warnings = []
    if kept < _ALL:
        warnings.append(
            f"{1 - kept:.1%} of what {model} changed (squared) lies outside the small weights and is dropped: "
            "it was not trained by SaRA with this base and threshold"
        )
    return {
        "threshold": threshold,
        "energy_kept": rounded(kept),
        "changed": changed,
        "share": rounded(changed / weights),
        "bytes": taken,
        "warnings": warnings,
        "tensors": [
            {
                "tensor": row["tensor"],
                "changed": row["changed"],
                "share": rounded(row["changed"] / row["weights"]),
                "kept": rounded(row["inside"] / row["energy"]),
                "dropped_norm": rounded(max(0.0, row["energy"] - row["inside"]) ** 0.5, 5),
            }
            for row in rows
            if row["energy"]
        ],
    }
