"""What a compression would make, from the headers of the files: nothing is read, written or queued."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from modelgrove_hub.contracts import InputModel, LazyTensor, Planner, Plugin
from modelgrove_hub.errors import UsageError
from modelgrove_hub.formats.quantized import PackedTensor
from modelgrove_hub.plugins import check_params
from modelgrove_hub.store.dtypes import DTYPES


def plan(plugin: type[Plugin], model: InputModel, values: Mapping[str, Any]) -> dict[str, Any]:
    """The plan as JSON values: bytes of all tensors before and after, and the layers that would be packed.

    Bytes are those of the tensors, as in the report of the finished job; a scale that does not fit into float16
    adds two.

    Raises:
        UsageError: the method decides by the weights' values, so that it has no plan; or `values` do not fit.
        DataError: the model has no safetensors weights.
    """
    params, method = check_params(plugin, values), plugin()
    if not isinstance(method, Planner):
        raise UsageError(f"{plugin.kind}.{plugin.name} decides by the values of the weights: it has no plan beforehand")
    before = after = kept = 0
    layers = []
    for tensor in model.tensors():
        size = size_of(tensor)
        entry = method.choose(tensor, params)
        packed = entry is not None and entry.bytes < size
        before, after, kept = before + size, after + (entry.bytes if entry and packed else size), kept + (not packed)
        if entry and packed:
            layers.append({"name": tensor.name, "bytes_before": size, **shown(entry)})
    sizes = {"bytes_before": before, "bytes_after": after, "quantized": len(layers), "kept": kept}
    return {"method": plugin.name, "parameters": params.model_dump(mode="json"), **sizes, "layers": layers}


def size_of(tensor: LazyTensor) -> int:
    """Bytes of a tensor as it is stored."""
    return prod(tensor.shape) * DTYPES[tensor.dtype].bits // 8


def shown(entry: PackedTensor) -> dict[str, Any]:
    """What tables of layers show of an entry: shape, layout and bytes, and all else that is not the default."""
    fields = entry.model_dump(mode="json", exclude={"dtype", "axes", "error", "bytes"}, exclude_defaults=True)
    order = ("shape", "layout", "bits", "group")
    return {**{name: fields.pop(name) for name in order}, **fields, "bytes": entry.bytes}
