"""Modules as Flux's, Stable Diffusion 3's and OpenCLIP's authors name them → as diffusers does, by naming/native.toml.

The authors fuse matrices that diffusers keeps apart (queries, keys and values), so a module may become several, each
with its rows.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from modelgrove_hub.formats.naming import FOLDER


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a module's matrix belong to the module that diffusers calls `module`."""

    module: str
    start: int
    stop: int


@dataclass(frozen=True)
class _Rule:
    pattern: re.Pattern[str]
    targets: tuple[str, ...]
    widths: bool
    times: int | None


def pieces(module: str, shape: tuple[int, int]) -> tuple[Piece, ...]:
    """What diffusers calls the module of a matrix (out, in·kernel) or of a vector (1, n); nothing if it is not known.

    Nor if its rows cannot be shared out. Of a vector (a bias) the n numbers are shared out as the rows of a square
    block's matrix are.
    """
    rows = shape[1] if shape[0] == 1 else shape[0]
    for rule in _rules():
        match = rule.pattern.fullmatch(module)
        if match and rule.times in (None, shape[0] / shape[1]):
            bounds = _bounds(rule, rows, shape)
            if (not rule.widths and rows % len(rule.targets)) or any(a >= b for a, b in pairwise(bounds)):
                return ()
            names = [target.replace("#", match[1] if match.groups() else "") for target in rule.targets]
            return tuple(Piece(name, start, stop) for name, start, stop in zip(names, bounds, bounds[1:], strict=False))
    return ()


def _bounds(rule: _Rule, rows: int, shape: tuple[int, int]) -> list[int]:
    # Flux: three times the width, and an inner layer of four times the width. A bias knows its length alone.
    width = shape[1] if shape[0] > 1 else rows // 7
    share = width if rule.widths else rows // len(rule.targets)
    return [*(share * place for place in range(len(rule.targets))), rows]


@cache
def _rules() -> tuple[_Rule, ...]:
    table = tomllib.loads((FOLDER / "native.toml").read_text("utf-8"))
    return tuple(
        _Rule(_compiled(rule["from"]), tuple(rule["to"]), rule.get("widths", False), rule.get("times"))
        for rule in table["modules"]
    )


def _compiled(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\#", r"(\d{1,3})"))
