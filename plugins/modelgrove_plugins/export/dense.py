"""Unpacked weights in their original dtypes, as diffusers and all others read them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from modelgrove_hub.contracts import InputModel
from modelgrove_hub.formats.quantized import KEY
from modelgrove_hub.store.header import read_header
from modelgrove_hub.store.writer import SafetensorsWriter
from modelgrove_plugins.compress.packed import Stored
from modelgrove_plugins.export.folder import dense, full_name, report_of, stored_in, weights_of, write_others


class Dense:
    """Unpack every tensor; files keep their paths and shards."""

    name: ClassVar[str] = "dense"
    summary: ClassVar[str] = "Unpacked to the original dtypes: diffusers' from_pretrained reads it."

    def run(self, model: InputModel, folder: Path) -> Mapping[str, Any]:
        """Write the model, one tensor in memory at a time.

        Raises:
            DataError: there are no safetensors weights, or a packed tensor is broken; the message names it.
        """
        fates = {}
        for path, source in weights_of(model).items():
            metadata = {key: value for key, value in read_header(source).metadata.items() if key != KEY}
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with SafetensorsWriter(folder / path, metadata) as writer:
                for key, tensor in stored_in(source):
                    writer.add(key, dense(key, tensor))
                    fates[full_name(path, key)] = "unpacked" if isinstance(tensor, Stored) else "as it was"
        write_others(model, folder, {})
        return report_of(folder, fates)
