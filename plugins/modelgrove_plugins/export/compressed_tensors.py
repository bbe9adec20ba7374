"""The layout of the `compressed-tensors` project, which vLLM and transformers read.

int8 → `int-quantized`: weight (int8), weight_scale. int4 → `pack-quantized`: weight_packed (int32: eight codes, the
first in the lowest bits), weight_scale, weight_zero_point (packed along the rows), weight_shape. Codes keep their
values; theirs are signed and stored with 8 added, which are ours. Readers multiply in the scale's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from modelgrove_hub.contracts import InputModel
from modelgrove_hub.formats.quantized import KEY
from modelgrove_hub.store.header import read_header
from modelgrove_hub.store.writer import SafetensorsWriter
from modelgrove_plugins.compress.packed import Stored
from modelgrove_plugins.export.folder import dense, full_name, report_of, stored_in, uneven, weights_of, write_others

if TYPE_CHECKING:
    from torch import Tensor

_SUFFIX = ".weight"
_FORMATS = {8: "int-quantized", 4: "pack-quantized"}


class CompressedTensors:
    """Linear layers keep their codes; convolutions and all that is no even grid are unpacked."""

    name: ClassVar[str] = "compressed-tensors"
    summary: ClassVar[str] = "int8 and int4 linear layers as vLLM and transformers read them."

    def run(self, model: InputModel, folder: Path) -> Mapping[str, Any]:
        """Write the model, one tensor in memory at a time, and say in config.json which layers are quantized how.

        Raises:
            DataError: there are no safetensors weights, or a scale is not finite; the message names the tensor.
        """
        fates: dict[str, str] = {}
        schemes: dict[str, dict[tuple[int, int | None], list[str]]] = {}
        for path, source in weights_of(model).items():
            metadata = {key: value for key, value in read_header(source).metadata.items() if key != KEY}
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            groups = schemes.setdefault(path.rpartition("/")[0], {})
            with SafetensorsWriter(folder / path, metadata) as writer:
                for key, tensor in stored_in(source):
                    why = ""
                    if isinstance(tensor, Stored) and not (why := uneven(key, tensor) or _unfit(key, tensor)):
                        for name, part in parts_of(key, tensor).items():
                            writer.add(name, part)
                        entry = tensor.entry
                        width = None if entry.group >= entry.matrix[1] else entry.group
                        groups.setdefault((entry.bits, width), []).append(key.removesuffix(_SUFFIX))
                        fates[full_name(path, key)] = _FORMATS[entry.bits]
                    else:
                        writer.add(key, dense(key, tensor))
                        fates[full_name(path, key)] = f"unpacked: {why}" if why else "as it was"
        write_others(model, folder, {place: _config(groups) for place, groups in schemes.items() if groups})
        return report_of(folder, fates)


def parts_of(key: str, stored: Stored) -> dict[str, Tensor]:
    """The stored tensors of one layer, by their names in the file."""
    import torch

    from modelgrove_kernels.packing import unpack_nibbles

    entry, parts = stored.entry, stored.parts
    rows, columns = entry.matrix
    # Readers compute in the scale's dtype: float32 unless the product is to be float16 anyway.
    scales = parts["scales"] if entry.dtype == "F16" else parts["scales"].float()
    if entry.layout == "int8":
        return {key: parts["codes"][:, :columns], f"{key}_scale": scales}
    codes, zeros = unpack_nibbles(parts["codes"])[:, :columns], parts["zeros"]
    return {
        f"{key}_packed": _words(codes),
        f"{key}_scale": scales,
        f"{key}_zero_point": _words(zeros.T).T,
        f"{key}_shape": torch.tensor([rows, columns]),
    }


def _words(codes: Tensor) -> Tensor:
    """uint8 (rows, n) below 16 → int32 (rows, ⌈n / 8⌉)."""
    import torch

    from modelgrove_kernels.packing import pack_nibbles

    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8)).contiguous()
    return pack_nibbles(padded).view(torch.int32)


def _unfit(key: str, stored: Stored) -> str:
    entry = stored.entry
    if not key.endswith(_SUFFIX):
        return "no layer's weight"
    if entry.group < entry.matrix[1] and entry.matrix[1] % entry.group:
        return "the last group of a row is shorter"
    return ""


def _config(groups: Mapping[tuple[int, int | None], list[str]]) -> dict[str, Any]:
    """The `quantization_config` of one folder: a group of the configuration for each (bits, group width)."""
    named = {
        f"group_{index}": {
            "targets": layers,
            "format": _FORMATS[bits],
            "weights": {
                "num_bits": bits, "type": "int", "symmetric": bits == 8, "dynamic": False,
                "strategy": "group" if width else "channel", "group_size": width,
            },
        }
        for index, ((bits, width), layers) in enumerate(sorted(groups.items(), key=repr))
    }  # fmt: skip
    formats = {_FORMATS[bits] for bits, _ in groups}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": named,
        "ignore": [],
    }
