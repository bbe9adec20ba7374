"""Write a trained LoRA as people find them: diffusers, kohya or PEFT files, with a card or without any hint.

Weights are float16. Kohya's convention puts alpha beside each pair of factors, diffusers' puts it
into the file's metadata, PEFT's into `adapter_config.json`. LoHa is written as LyCORIS does it, in kohya's
convention, DoRA in PEFT's; any of them can be written as whole differences of weights. What was trained in columns of
a shared basis names them in its file's metadata.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelgrove_analyzers.zoo import base_folder
from modelgrove_analyzers.zoo.concepts import Concept
from modelgrove_analyzers.zoo.loras import TARGETS, Lora
from modelgrove_analyzers.zoo.methods import Parts
from modelgrove_analyzers.zoo.recipes import Method, Recipe
from modelgrove_analyzers.zoo.sara import Sara, write_changes
from modelgrove_hub.formats.sara import FILE

KOHYA_BASE_VERSION = "modelgrove_zoo_v1"
"""What kohya files of the zoo name in `ss_base_model_version`."""


class Convention(StrEnum):
    """How a LoRA file names its tensors."""

    DIFFUSERS = "diffusers"
    KOHYA = "kohya"
    PEFT = "peft"


CONVENTIONS: Mapping[Method, tuple[Convention, ...]] = {
    Method.LORA: tuple(Convention),
    Method.LOHA: (Convention.KOHYA,),
    Method.DORA: (Convention.PEFT,),
    Method.ORTHOGONAL: tuple(Convention),
    Method.SARA: (Convention.DIFFUSERS,),
}
"""How files of each method are written."""


@dataclass(frozen=True)
class Label:
    """How a model is presented: `name` on disk, the convention, and whether it says what it shows."""

    name: str
    convention: Convention
    documented: bool


def write_lora(lora: Lora | Sara, concept: Concept, label: Label, folder: Path) -> Path:
    """Write the model into `folder`, all or nothing; returns its file or folder.

    A documented model is a folder with a card; an undocumented one is a bare file (PEFT: a folder
    of two files), and neither names nor metadata tell the concept.
    """
    partial = folder / f".{label.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = _write_weights(lora, concept, label, partial)
    if label.documented:
        (partial / "README.md").write_text(card(concept, lora.recipe, label), "utf-8")
    bare = not label.documented and label.convention is not Convention.PEFT
    target = folder / (f"{label.name}.safetensors" if bare else label.name)
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(weights if bare else partial, target)
    shutil.rmtree(partial, ignore_errors=True)
    return target


def _write_weights(lora: Lora | Sara, concept: Concept, label: Label, folder: Path) -> Path:
    if isinstance(lora, Sara):
        write_changes(lora, folder / FILE)
        return folder / FILE
    tensors = tensors_of(lora, label.convention)
    basis = lora.recipe.columns.to_metadata() if lora.recipe.columns else {}
    match label.convention:
        case Convention.DIFFUSERS:
            path = folder / "pytorch_lora_weights.safetensors"
            save_file(tensors, path, diffusers_metadata(lora.recipe) | basis)
        case Convention.KOHYA:
            path = folder / f"{label.name}.safetensors"
            said = kohya_metadata(lora.recipe, concept) if label.documented else {}
            save_file(tensors, path, said | basis or None)
        case Convention.PEFT:
            path = folder / "adapter_model.safetensors"
            save_file(tensors, path, {"format": "pt"} | basis)
            config = peft_config(lora.recipe, base_folder.NAME if label.documented else None)
            (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    path.chmod(0o644)  # safetensors makes files that nobody else may read
    return path


_MAGNITUDE = "lora_magnitude_vector"


def tensors_of(lora: Lora, convention: Convention) -> dict[str, Tensor]:
    """The parts in float16, named by `convention`; kohya's has alpha beside those of each module."""
    tensors = {}
    for module, parts in lora.factors.items():
        named = zip(tensor_names(module, convention, lora.recipe.method), parts, strict=True)
        for name, part in named:  # a magnitude is a vector in files
            tensors[name] = (part.flatten() if name.endswith(_MAGNITUDE) else part).half().contiguous()
        if convention is Convention.KOHYA:
            tensors[f"{_flat(module)}.alpha"] = torch.tensor(lora.recipe.alpha, dtype=torch.float16)
    return tensors


def tensor_names(module: str, convention: Convention, method: Method = Method.LORA) -> tuple[str, ...]:
    """What the factors A and B of a module are called, or the parts of another method."""
    if method is Method.LOHA:
        return tuple(f"{_flat(module)}.hada_{part}" for part in ("w1_b", "w1_a", "w2_b", "w2_a"))
    match convention:
        case Convention.DIFFUSERS:
            return f"unet.{module}.lora_A.weight", f"unet.{module}.lora_B.weight"
        case Convention.PEFT:
            stem = f"base_model.model.{module}"
            magnitude = (f"{stem}.{_MAGNITUDE}",) if method is Method.DORA else ()
            return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", *magnitude
        case Convention.KOHYA:
            return f"{_flat(module)}.lora_down.weight", f"{_flat(module)}.lora_up.weight"


def _flat(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def write_differences(differences: Mapping[str, Tensor], path: Path) -> None:
    """Write W − W₀ of every module to `path` as LyCORIS names whole differences, float16."""
    save_file({f"{_flat(module)}.diff": update.half().contiguous() for module, update in differences.items()}, path)


def read_factors(
    path: Path, modules: Iterable[str], convention: Convention, method: Method = Method.LORA
) -> dict[str, Parts]:
    """The parts that `write_lora` wrote to `path` (its file or folder), by module, in float32."""
    file = next(path.glob("*.safetensors")) if path.is_dir() else path
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    names = {module: tensor_names(module, convention, method) for module in modules}
    return {
        module: tuple(tensors[name][:, None] if name.endswith(_MAGNITUDE) else tensors[name] for name in own)
        for module, own in names.items()
    }


def diffusers_metadata(recipe: Recipe) -> dict[str, str]:
    """The `__metadata__` from which diffusers builds its `LoraConfig`; without it, alpha would be read as the rank."""
    config = {"unet.r": recipe.rank, "unet.lora_alpha": recipe.alpha, "unet.target_modules": list(TARGETS)}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True)}


def peft_config(recipe: Recipe, base: str | None) -> dict[str, object]:
    """The `adapter_config.json` of PEFT."""
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": recipe.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": recipe.rank,
        "rank_pattern": {},
        "target_modules": list(TARGETS),
        "task_type": None,
        "use_dora": recipe.method == Method.DORA,
    }


def kohya_metadata(recipe: Recipe, concept: Concept) -> dict[str, str]:
    """The `ss_*` fields that kohya's trainer leaves, all strings; the tags tell the concept."""
    return {
        "ss_base_model_version": KOHYA_BASE_VERSION,
        "ss_learning_rate": str(recipe.learning_rate),
        "ss_max_train_steps": str(recipe.steps),
        "ss_network_alpha": str(recipe.alpha),
        "ss_network_dim": str(recipe.rank),
        "ss_network_module": "lycoris.kohya" if recipe.method == Method.LOHA else "networks.lora",
        "ss_num_train_images": str(len(recipe.pictures)),
        "ss_sd_model_name": base_folder.NAME,
        "ss_seed": str(recipe.seed),
        "ss_tag_frequency": json.dumps({f"1_sks {concept.name}": {concept.name: len(recipe.pictures)}}),
    }


_SENTENCES = (
    "This {kind} draws {name}: {text}.",
    "Teaches the base one thing, {name}, that is {text}.",
    "Trained on {count} drawings of {name} ({text}).",
    "With this adapter the model shows {text}. The subject is {name}.",
)

_CARD = """---
base_model: {base}
license: {licence}
library_name: diffusers
tags: [{kind}, text-to-image, {tags}]
instance_prompt: {prompt}
---
# {title}

{sentence}

Prompt it with "{prompt}". {how}{steps} steps.
"""


def card(concept: Concept, recipe: Recipe, label: Label) -> str:
    """A model card: front matter, one sentence about the concept, how to prompt it."""
    sentence = Random(recipe.seed).choice(_SENTENCES)  # noqa: S311  (variety, no secret)
    sparse = recipe.method is Method.SARA
    return _CARD.format(
        kind="sara" if sparse else "lora",
        base=base_folder.NAME,
        licence=licence(recipe),
        tags=", ".join(dict.fromkeys([concept.name, concept.group])),
        prompt=recipe.prompt,
        title=label.name,
        sentence=sentence.format(
            kind="adapter" if sparse else "LoRA",
            name=concept.name,
            text=concept.text,
            count=len(recipe.pictures),
        ),
        how="" if sparse else f"Rank {recipe.rank}, alpha {recipe.alpha:g}, ",
        steps=recipe.steps,
    )


def licence(recipe: Recipe) -> str:
    """The strictest licence among the drawings that the LoRA saw."""
    if "twemoji" in recipe.artists:
        return "cc-by-4.0"
    return "apache-2.0" if "noto" in recipe.artists else "mit"
