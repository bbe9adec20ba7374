"""Whole blocks that a denoiser can do without: which its configuration can express, and the network without them.

A *unit* is a set of module paths. What stays keeps its weights; list entries behind a removed one move up, and the
fields of the configuration that count blocks follow, so that the result is an ordinary diffusers model. Units are
tried, not believed: only those without which diffusers builds a network that takes the remaining tensors, every one
of them and no other, are offered.

- Transformers (PixArt, DiT, SD3, Flux …): each of `transformer_blocks` and `single_transformer_blocks`.
- UNet2DConditionModel: each transformer block within an attention (`transformer_layers_per_block`; the middle's are
  counted together with those of the lowest level's first attention); all attentions of a level's way down or up
  (its block type); a residual layer of the way down together with the one on the way up that reads its output
  (`layers_per_block`); the middle's attention with its second residual layer, and the middle (`mid_block_type`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_LISTS = {
    "transformer_blocks": ("num_layers",),
    "single_transformer_blocks": ("num_single_layers", "num_single_dit_layers"),
    "joint_transformer_blocks": ("num_mmdit_layers",),
}
"""Lists of a transformer's blocks → the field that counts them."""
_PLAIN = {"CrossAttnDownBlock2D": "DownBlock2D", "CrossAttnUpBlock2D": "UpBlock2D"}
_MIDDLE = "mid_block"
_DEFAULTED = "_use_default_values"
"""Fields that diffusers would ignore, because they were not given when the network was made."""


@dataclass(frozen=True)
class Unit:
    """What can be removed at once."""

    name: str
    paths: tuple[str, ...]
    position: float
    """Relative depth of its first stage in the network, 0 the first and 1 the last."""


def stages_of(network: nn.Module) -> list[str]:
    """Paths of the blocks that the network runs one after the other: a transformer's blocks, a UNet's levels."""
    if hasattr(network, "down_blocks"):
        down, up = (range(len(getattr(network, way))) for way in ("down_blocks", "up_blocks"))
        middle = [_MIDDLE] if getattr(network, _MIDDLE, None) is not None else []
        return [*(f"down_blocks.{i}" for i in down), *middle, *(f"up_blocks.{i}" for i in up)]
    order = ("joint_transformer_blocks", "transformer_blocks", "single_transformer_blocks")
    return [f"{name}.{i}" for name in order for i in range(len(getattr(network, name, ())))]


def position_of(path: str, stages: list[str]) -> float | None:
    """Relative depth in [0, 1] of the stage that a module or parameter is in; None outside of all."""
    place = next((i for i, stage in enumerate(stages) if inside(path, stage)), None)
    return None if place is None else place / max(1, len(stages) - 1)


def inside(path: str, parent: str) -> bool:
    """Whether a path is `parent` or below it."""
    return path == parent or path.startswith(f"{parent}.")


def units_of(network: nn.Module) -> list[Unit]:
    """The units of a diffusers denoiser, in order of depth; none if its class is not known."""
    stages, names = stages_of(network), list(network.state_dict())
    found: list[Unit] = []
    for candidates in _candidates(config_of(network), names, stages):
        fitting = next((paths for paths in candidates if _fits(network, paths)), None)
        if fitting is not None:
            positions = [position_of(path, stages) or 0.0 for path in fitting]
            found.append(Unit(" + ".join(_short(fitting)), fitting, min(positions)))
    return sorted(found, key=lambda unit: unit.position)


def config_of(network: nn.Module) -> dict[str, Any]:
    """The configuration that a diffusers network was made with."""
    fields: Any = network.config
    return {name: value for name, value in fields.items() if name != _DEFAULTED}


def without(network: nn.Module, removed: Collection[str]) -> nn.Module:
    """The network without the modules at the paths `removed`; it shares the weights of the one given.

    Raises:
        ValueError: diffusers builds no network that these tensors fill.
    """
    import torch

    state = network.state_dict()
    names = remaining(state, removed)
    own = config_of(network)
    config = {**own, **changes(own, list(state), removed)}
    try:
        with torch.device("meta"):
            smaller: nn.Module = type(network).from_config(config)  # type: ignore[attr-defined]
        smaller.load_state_dict({new: state[old] for old, new in names.items()}, strict=True, assign=True)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        raise ValueError(f"without {', '.join(removed)}: {error}") from error
    for old, buffer in network.named_buffers():
        if old not in state and not _gone(old, removed):  # computed by the original when it was built
            owner, _, leaf = renumbered(old, removed).rpartition(".")
            smaller.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    return smaller.eval().requires_grad_(False)


def remaining(names: Collection[str], removed: Collection[str]) -> dict[str, str]:
    """Tensors that stay → what they are called then."""
    return {name: renumbered(name, removed) for name in names if not _gone(name, removed)}


def renumbered(path: str, removed: Collection[str]) -> str:
    """The path with the entries of lists moved up by how many before them are removed."""
    parts = path.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            parents = (one.rpartition(".") for one in removed)
            home = ".".join(path.split(".")[:place])
            parts[place] = str(int(part) - sum(p == home and i.isdigit() and int(i) < int(part) for p, _, i in parents))
    return ".".join(parts)


def changes(config: Mapping[str, Any], names: Collection[str], removed: Collection[str]) -> dict[str, Any]:
    """The fields of a denoiser's configuration that differ without `removed`; `names` are those of its tensors."""
    kept = [name for name in names if not _gone(name, removed)]
    if "down_block_types" in config:
        return _unet_changes(config, kept, removed)
    changed: dict[str, Any] = {}
    for blocks, fields in _LISTS.items():
        field = next((name for name in fields if name in config), None)
        if field and any(inside(path, blocks) for path in removed):
            changed[field] = len(_entries(kept, blocks))
    if "dual_attention_layers" in config and "num_layers" in changed:
        left = _entries(kept, "transformer_blocks")
        changed["dual_attention_layers"] = [left.index(i) for i in config["dual_attention_layers"] if i in left]
    return changed


def _unet_changes(config: Mapping[str, Any], kept: Collection[str], removed: Collection[str]) -> dict[str, Any]:
    levels = range(len(config["down_block_types"]))
    changed: dict[str, Any] = {}
    for way in ("down", "up"):
        types = [
            name if _entries(kept, f"{way}_blocks.{i}.attentions") else _PLAIN.get(name, name)
            for i, name in enumerate(config[f"{way}_block_types"])
        ]
        changed[f"{way}_block_types"] = types
    if any(".resnets." in path and not inside(path, _MIDDLE) for path in removed):
        changed["layers_per_block"] = [len(_entries(kept, f"down_blocks.{i}.resnets")) for i in levels]
    if any(inside(path, _MIDDLE) for path in removed):
        if _MIDDLE in removed:
            changed["mid_block_type"] = None
        elif not _entries(kept, f"{_MIDDLE}.attentions"):
            changed["mid_block_type"] = "UNetMidBlock2D"
    if config.get("reverse_transformer_layers_per_block") or any(".transformer_blocks." in path for path in removed):
        down, up = ([_counts(kept, f"{way}_blocks.{i}") for i in levels] for way in ("down", "up"))
        middle = _counts(kept, _MIDDLE)
        changed["transformer_layers_per_block"] = [*down[:-1], down[-1] or middle]
        changed["reverse_transformer_layers_per_block"] = up
    return {name: value for name, value in changed.items() if value != _plain(config.get(name))}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _counts(kept: Collection[str], block: str) -> list[int]:
    """Transformer blocks in each attention of a UNet's block."""
    attentions = _entries(kept, f"{block}.attentions")
    return [len(_entries(kept, f"{block}.attentions.{j}.transformer_blocks")) for j in attentions]


def _entries(names: Collection[str], parent: str) -> list[int]:
    """The indices that a list of modules has among the names of tensors, ascending."""
    depth = parent.count(".") + 1
    return sorted({int(name.split(".")[depth]) for name in names if name.startswith(f"{parent}.")})


def _gone(name: str, removed: Collection[str]) -> bool:
    return any(inside(name, path) for path in removed)


def _fits(network: nn.Module, paths: tuple[str, ...]) -> bool:
    try:
        without(network, paths)
    except ValueError:
        return False
    return True


def _candidates(config: Mapping[str, Any], names: list[str], stages: list[str]) -> Iterator[list[tuple[str, ...]]]:
    """Paths to remove together, several ways for each unit: the first that fits is taken."""
    if "down_block_types" not in config:
        for stage in stages:
            if len(_entries(names, stage.rpartition(".")[0])) > 1:
                yield [(stage,)]
        return
    lowest = f"down_blocks.{len(config['down_block_types']) - 1}.attentions.0.transformer_blocks"
    for stage in stages:
        attentions = _entries(names, f"{stage}.attentions")
        for j in attentions:
            blocks = f"{stage}.attentions.{j}.transformer_blocks"
            for k in _entries(names, blocks):
                alone, tied = (f"{blocks}.{k}",), (f"{lowest}.{k}", f"{_MIDDLE}.attentions.0.transformer_blocks.{k}")
                yield [alone, tied] if blocks == lowest else [alone]
        if attentions and stage != _MIDDLE:
            yield [(f"{stage}.attentions",)]
    for i in range(len(config["down_block_types"])):
        yield from _layers(names, i, len(config["down_block_types"]) - 1 - i)
    if _MIDDLE in stages:
        yield [(f"{_MIDDLE}.attentions", f"{_MIDDLE}.resnets.1")]
        yield [(_MIDDLE,)]


def _layers(names: list[str], down: int, up: int) -> Iterator[list[tuple[str, ...]]]:
    """Residual layers of a level with the one above that reads their output, or else another of that level."""
    layers = _entries(names, f"down_blocks.{down}.resnets")
    for j in layers if len(layers) > 1 else ():
        readers = sorted(_entries(names, f"up_blocks.{up}.resnets"), key=lambda m: m != len(layers) - 1 - j)
        yield [
            tuple(
                f"{block}.{part}.{index}"
                for block, index in ((f"down_blocks.{down}", j), (f"up_blocks.{up}", m))
                for part in ("resnets", "attentions")
                if _entries(names, f"{block}.{part}")
            )
            for m in readers
        ]


def _short(paths: tuple[str, ...]) -> list[str]:
    """Paths for people: a residual layer's attention goes without saying."""
    layers = {path.replace(".attentions.", ".resnets.") for path in paths if ".transformer_blocks." not in path}
    return [path for path in paths if path.replace(".attentions.", ".resnets.") not in layers - {path}]
