"""The choices that all mergers share."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from modelgrove_hub.contracts import Params

_BLOCK = re.compile(r"(?:(\d+):)?([\w.]+)=(.+)")


class MergeParams(Params):
    """What is merged how strongly, into what, and how large the result may be."""

    weights: tuple[float, ...] = Field((), description="One strength for each model, in order; 1 each if not given.")
    blocks: tuple[str, ...] = Field(
        (), description="PREFIX=FACTOR, or N:PREFIX=FACTOR for the Nth model alone: strength of modules named so."
    )
    base: bool = Field(False, description="The last input is the base: adapters are baked into it.")
    rank: int | None = Field(None, ge=1, description="Largest rank of the result; as exact as possible if not given.")
    energy: float | None = Field(
        None, gt=0, le=1, description="Keep the fewest directions of each layer with this share of its squared norm."
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="What an adapter is stored as.")
    naming: Literal["diffusers", "kohya", "peft"] = Field("diffusers", description="How an adapter names its tensors.")
    seed: int | None = Field(None, ge=0, description="Of methods that draw random numbers; the job's if not given.")

    unrecorded: ClassVar[frozenset[str]] = frozenset({"weights", "base", "seed"})
    """Not among a recipe's parameters: it says them elsewhere, or what is made does not depend on them."""

    @field_validator("weights")
    @classmethod
    def _finite(cls, weights: tuple[float, ...]) -> tuple[float, ...]:
        if any(not abs(weight) < float("inf") for weight in weights):
            raise ValueError("a weight is a finite number")
        return weights

    @field_validator("blocks")
    @classmethod
    def _understood(cls, blocks: tuple[str, ...]) -> tuple[str, ...]:
        for block in blocks:
            found = _BLOCK.fullmatch(block)
            try:
                finite = found is not None and abs(float(found[3])) < float("inf")
            except ValueError:
                finite = False
            if not finite:
                raise ValueError(f"{block!r} is not PREFIX=FACTOR or N:PREFIX=FACTOR, as in up_blocks.1=0.5")
        return blocks

    def strength(self, place: int, module: str) -> float:
        """The factor for a module of the input at `place`: the product of those whose prefixes begin its name."""
        factor = 1.0
        for block in self.blocks:
            number, prefix, value = _BLOCK.fullmatch(block).groups()  # type: ignore[union-attr]  # validated
            inside = module == prefix or module.startswith(f"{prefix}.")
            if inside and (number is None or int(number) == place + 1):
                factor *= float(value)
        return factor
