"""The names of tensors in LoRA files: which module of which component they belong to, and as what.

A canonical module name is the path in diffusers' naming, relative to the component, as in
"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q". Kohya writes underscores for dots;
the dots come back by a vocabulary of module names, and where a word is unknown the name stays
flat. Blocks in Stability's naming (input_blocks…) of the UNets with two layers a block (SD1, SD2,
SDXL) are renamed to diffusers'. Other native namings (Flux's double_blocks…) are left as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.resources import files

from modelgrove_hub.formats.naming import adapter_names
from modelgrove_hub.formats.patterns import any_of

NATIVE = "diffusion_model"
"""The component of modules that keep their authors' naming, as ComfyUI writes it."""

DENOISERS = frozenset({"", "unet", "transformer", "prior", NATIVE})
"""Components whose modules are named without a prefix: a file has one of them."""

_COMPONENTS = {
    "lora_unet_": "unet",
    "unet.": "unet",
    "lora_transformer_": "transformer",
    "transformer.": "transformer",
    "transformer_2.": "transformer_2",
    "transformer_ref.": "transformer_ref",
    "lora_prior_unet_": "prior",
    "prior.": "prior",
    "diffusion_model.": NATIVE,
    "model.diffusion_model.": NATIVE,
}
"""Prefixes that say which denoiser it is; the other prefixes of denoisers leave it open."""
_LOW_RANK = "lora"
_EMBEDDING = "lora_embedding"
_TUCKER = "mid"
_NATIVE_ROOTS = frozenset({
    "joint_blocks", "double_blocks", "single_blocks", "img_in", "txt_in", "time_in", "vector_in", "guidance_in",
    "final_layer",
})  # fmt: skip
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_BLOCK = re.compile(r"^(input_blocks|output_blocks)\.(\d{1,3})\.([012])\.(.+)$|^middle_block\.([012])\.(.+)$")


class Role(StrEnum):
    """What a tensor is to its module."""

    DOWN = "down"  # the values are the words of naming/adapters.toml
    UP = "up"
    ALPHA = "alpha"


@dataclass(frozen=True)
class Key:
    """A tensor's name, understood. `restored` is false where a flat name could not get its dots back."""

    component: str
    module: str
    role: Role
    convention: str
    """How the file names its modules: kohya, diffusers, peft, comfyui…; "bare" without a prefix."""
    restored: bool = True

    @property
    def target(self) -> str:
        """The canonical name: of a denoiser's module the bare path, of any other component's with its prefix."""
        return self.module if self.component in DENOISERS else f"{self.component}.{self.module}"


def parse_key(name: str) -> Key | None:
    """Understand one tensor's name, or None if it is not a part of a plain LoRA."""
    path, suffix = adapter_names().split(name) or ("", "")
    part = _parts().get(suffix)
    if part not in list(Role) or suffix.startswith(f".{_EMBEDDING}"):
        return None
    key = _locate(_attention_path(path) if suffix.startswith("_") else path, Role(part))
    return key if key.module else None


def module_of(path: str) -> str:
    """The canonical name of the module at `path` in a checkpoint, as the target of an adapter would be named."""
    return _locate(path, Role.UP).target


def key_of(path: str, suffix: str) -> Key:
    """The module at `path` of an adapter's tensor that ends in `suffix`, whatever its part in it."""
    return _locate(_attention_path(path) if suffix.startswith("_") else path, Role.UP)


def foreign_method(name: str) -> str | None:
    """The adapter method that this tensor proves, if it is no plain LoRA: "loha", "dora"… Bias differences are none."""
    _, suffix = adapter_names().split(name) or ("", "")
    if _parts().get(suffix) == _TUCKER:
        return "lora with a Tucker core (lora_mid)"
    for kind in adapter_names().kinds:
        if kind.name != _LOW_RANK and suffix in kind.core and kind.core[suffix] != "bias":
            return kind.name
    if marked := adapter_names().marked(name):
        return marked[1]
    for special in adapter_names().special:
        if any_of((special.pattern,)).fullmatch(name):
            return special.adapter_type
    return None


@cache
def _parts() -> dict[str, str]:
    """Suffix of a LoRA's tensor → its part in the formula."""
    kind = next(kind for kind in adapter_names().kinds if kind.name == _LOW_RANK)
    return kind.extra | kind.core


def flat(module: str) -> str:
    """The name as kohya writes it; two names of one module are equal in this form."""
    return module.replace(".", "_")


def native_root(module: str) -> bool:
    """Whether a module is named by its authors' convention and not by diffusers'."""
    return module.split(".", 1)[0] in _NATIVE_ROOTS


def _locate(path: str, role: Role) -> Key:
    component, convention, flattened = "", "", False
    while prefix := next((one for one in adapter_names().prefixes if path.startswith(one.prefix)), None):
        path = path.removeprefix(prefix.prefix)
        named = _COMPONENTS.get(prefix.prefix, "" if prefix.section == "denoiser" else prefix.section)
        component = named or component  # PEFT's own prefix, inside of a component's, names none
        convention, flattened = convention or prefix.convention, prefix.flat
        if flattened:  # PEFT's prefix may hide another one, but a flat name begins after its own
            break
    module = _unflatten(path) if flattened and "." not in path else path
    if module is None:
        return Key(component, path, role, convention, restored=False)
    module = _from_stability(module)
    if flattened and native_root(module):
        component = NATIVE
    return Key(component, module, role, convention or "bare")


def _attention_path(path: str) -> str:
    """diffusers before 0.22: `attn1.processor.to_out_lora` stands for `attn1.to_out.0`, in CLIP for `out_proj`."""
    path = path.replace(".processor.", ".")
    head, _, last = path.rpartition(".")
    if head.endswith("self_attn"):
        last = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}.get(last, last)
    return f"{head}.{'to_out.0' if last == 'to_out' else last}"


@cache
def _words() -> frozenset[str]:
    lines = files("modelgrove_hub.formats").joinpath("adapter_words.txt").read_text("utf-8").splitlines()
    return frozenset(word for line in lines if not line.startswith("#") for word in line.split())


@cache
def _longest() -> int:
    return max(word.count("_") + 1 for word in _words())


def _unflatten(name: str) -> str | None:
    """Put the dots back: numbers and the longest known words are the segments. None at an unknown word."""
    tokens = name.split("_")
    segments: list[str] = []
    place = 0
    while place < len(tokens):
        for width in range(min(_longest(), len(tokens) - place), 0, -1):
            word = "_".join(tokens[place : place + width])
            if word in _words() or (width == 1 and word.isdecimal()):
                break
        else:
            return None
        segments.append(word)
        place += width
    return ".".join(segments)


def _from_stability(module: str) -> str:
    """Rename a module of Stability's UNet (two layers a block) to diffusers' naming; any other is returned as is."""
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    match = _BLOCK.match(module)
    if match is None:
        return module
    if match[5]:
        return (
            f"mid_block.{('resnets.0', 'attentions.0', 'resnets.1')[int(match[5])]}.{_RESNET.get(match[6], match[6])}"
        )
    number, part, rest = int(match[2]), match[3], match[4]
    down = match[1] == "input_blocks"
    block, layer = divmod(number - 1 if down else number, 3)
    side = "down_blocks" if down else "up_blocks"
    if rest == "op":
        return f"{side}.{block}.downsamplers.0.conv"
    if rest == "conv":
        return f"{side}.{block}.upsamplers.0.conv"
    return f"{side}.{block}.{'attentions' if part == '1' else 'resnets'}.{layer}.{_RESNET.get(rest, rest)}"
