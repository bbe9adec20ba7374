"""Write LoRAs as diffusers, kohya's tools or PEFT name them: factors per module, whole differences where there are any.

The scale is in the factors, so every file says alpha = rank, by its own convention's means.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from modelgrove_hub.contracts import Context, TensorWriter
from modelgrove_hub.errors import UsageError
from modelgrove_hub.formats.adapter_keys import NATIVE, flat, native_root
from modelgrove_hub.formats.adapter_scale import CONFIG, METADATA
from modelgrove_hub.formats.adapters import Factors

if TYPE_CHECKING:
    from torch import Tensor, dtype

Naming = Literal["diffusers", "kohya", "peft"]

_FILES: Mapping[Naming, str] = {
    "diffusers": "pytorch_lora_weights.safetensors",
    "kohya": "lora.safetensors",
    "peft": "adapter_model.safetensors",
}
_UNET_ROOTS = ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding")
_TRANSFORMER_ROOTS = ("transformer_blocks", "single_transformer_blocks", "x_embedder", "context_embedder", "norm_out")
_KOHYA = {
    "unet": "lora_unet_",
    "transformer": "lora_transformer_",
    "prior": "lora_prior_unet_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_",
    "text_encoder_3": "lora_te3_",
    NATIVE: "lora_unet_",
    "": "lora_unet_",
}
_ALONE = "lora_te_"
"""Kohya's prefix of the text encoder where there is no second one."""
_DIFFERENCES = {"weight": ".diff", "bias": ".diff_b"}


class AdapterWriter:
    """Writes one adapter module by module; `components` are those that it will have.

    PEFT's convention has a folder for each component where there are several.
    """

    def __init__(
        self, context: Context, naming: Naming, dtype: dtype, metadata: Mapping[str, str], components: Collection[str]
    ) -> None:
        self._context, self._naming, self._dtype, self._metadata = context, naming, dtype, metadata
        self._components = components
        self._writers: dict[str, TensorWriter] = {}
        self._ranks: dict[str, dict[str, int]] = {}

    def add(self, factors: Factors) -> None:
        """Write one module's factors, as the writer's dtype.

        Raises:
            UsageError: the module's name is still flat, so no loader would find the module.
        """
        if not factors.restored:
            raise UsageError(
                f"module {factors.module}: the dots of this kohya name are not known, so it cannot be written"
            )
        component = written_component(factors.component, factors.module)
        writer, stem = self._place(component, factors.module)
        down, up, alpha = _FACTORS[self._naming]
        width = factors.down.shape[1] // prod(factors.kernel)
        ones = (1,) * len(factors.kernel)
        writer.add(stem + down, factors.down.reshape(factors.rank, width, *factors.kernel).to(self._dtype))
        writer.add(stem + up, factors.up.reshape(*factors.up.shape, *ones).to(self._dtype))
        if alpha:
            writer.add(stem + alpha, factors.up.new_tensor(float(factors.rank)).to(self._dtype))
        self._ranks.setdefault(component, {})[factors.module] = factors.rank

    def add_difference(self, component: str, module: str, parameter: str, values: Tensor) -> None:
        """Write a whole difference of the parameter "weight" or "bias", which ComfyUI and LyCORIS read."""
        writer, stem = self._place(written_component(component, module), module)
        writer.add(stem + _DIFFERENCES[parameter], values.to(self._dtype))

    def close(self) -> tuple[str, ...]:
        """Write what the loaders want to know beside the factors; returns the paths of all files."""
        described = _METADATA[self._naming](self._ranks)
        written = []
        for path, writer in self._writers.items():
            for key, value in {**described, **self._metadata}.items():
                writer.describe(key, value)
            written.append(path)
        if self._naming == "peft":
            for component, ranks in self._ranks.items():
                path = self._folder(component) + CONFIG
                fields = {"peft_type": "LORA", "base_model_name_or_path": None, "inference_mode": True} | _fields(ranks)
                self._context.path(path).write_text(json.dumps(fields, indent=2, sort_keys=True), "utf-8")
                written.append(path)
        return tuple(written)

    def _place(self, component: str, module: str) -> tuple[TensorWriter, str]:
        """The file of a component, and what begins the names of a module's tensors there."""
        path = (self._folder(component) if self._naming == "peft" else "") + _FILES[self._naming]
        if path not in self._writers:
            self._writers[path] = self._context.writer(path)
        if self._naming == "kohya":
            alone = component == "text_encoder" and "text_encoder_2" not in self._components
            return self._writers[path], (_ALONE if alone else _KOHYA[component]) + flat(module)
        if self._naming == "peft":
            return self._writers[path], f"base_model.model.{module}"
        return self._writers[path], f"{component}.{module}" if component else module

    def _folder(self, component: str) -> str:
        return f"{component}/" if len(self._components) > 1 else ""


_FACTORS: Mapping[Naming, tuple[str, str, str]] = {
    "diffusers": (".lora_A.weight", ".lora_B.weight", ""),
    "kohya": (".lora_down.weight", ".lora_up.weight", ".alpha"),
    "peft": (".lora_A.weight", ".lora_B.weight", ""),
}


def written_component(component: str, module: str) -> str:
    """The component's prefix in a file; where it is open, it follows from the module's name, or there is none."""
    root = module.split(".", 1)[0]
    if component:
        return component
    if native_root(module):
        return NATIVE
    if root == "text_model":
        return "text_encoder"
    return "unet" if root in _UNET_ROOTS else "transformer" if root in _TRANSFORMER_ROOTS else ""


def _diffusers_metadata(ranks: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """What diffusers ≥ 0.34 reads: rank and alpha of every module of every component, truthfully.

    diffusers would misread the ranks of a native naming, whose prefix it renames, so such a file
    gets none: without it, loaders take alpha = rank, which is right.
    """
    metadata = {"format": "pt"}
    if ranks and not ranks.keys() & {NATIVE, ""}:
        fields = {
            f"{place}.{field}": value for place, group in ranks.items() for field, value in _fields(group).items()
        }
        metadata[METADATA] = json.dumps(fields, sort_keys=True)
    return metadata


def _kohya_metadata(ranks: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    every = [rank for group in ranks.values() for rank in group.values()]
    metadata = {"format": "pt", "ss_network_module": "networks.lora"}
    return metadata | ({"ss_network_dim": str(max(every)), "ss_network_alpha": str(max(every))} if every else {})


def _peft_metadata(_: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    return {"format": "pt"}


_METADATA: Mapping[Naming, Callable[[Mapping[str, Mapping[str, int]]], dict[str, str]]] = {
    "diffusers": _diffusers_metadata,
    "kohya": _kohya_metadata,
    "peft": _peft_metadata,
}


def _fields(ranks: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's LoraConfig of one component, as far as it matters."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{module}": rank for module, rank in ranks.items() if rank != common}
    return {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "use_rslora": False,
        "use_dora": False,
    }
