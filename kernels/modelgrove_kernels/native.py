"""The compiled kernels: loading them, and which instruction set they use.

The library is built with the package (`hatch_build.py`). Where it is missing, or the CPU is too old, `library()` is
None, `absence()` says why, and the operators compute in plain torch. The variable MODELGROVE_ISA chooses: `avx2`,
`avx512vnni`, or `none` for plain torch.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch  # noqa: F401  (first, so that the library shares torch's OpenMP threads)

PATH = Path(__file__).with_name("_native.so")
ISAS = {"avx2": 1, "avx512vnni": 2}
"""Names of the instruction sets and their numbers in C, each contains those before it."""


def library() -> ctypes.CDLL | None:
    """The library, or None if there is none, the CPU has none of `ISAS`, or MODELGROVE_ISA=none."""
    return None if absence() else _load()[0]


def isa() -> str:
    """The instruction set in use, of `ISAS`: the CPU's best or what MODELGROVE_ISA names; `none` without a library.

    Raises:
        ValueError: MODELGROVE_ISA names one that is unknown, or that this CPU does not have.
    """
    wanted, best = _wanted(), _best()
    if best is None or wanted == "none":
        return "none"
    if wanted is not None and ISAS[wanted] > ISAS[best]:
        raise ValueError(f"MODELGROVE_ISA={wanted}, but this CPU has {best} only")
    return wanted or best


def absence() -> str | None:
    """Why the compiled kernels are not used, None if they are.

    Raises:
        ValueError: MODELGROVE_ISA names an instruction set that is unknown, or that this CPU does not have.
    """
    if isa() != "none":
        return None
    if _wanted() == "none":
        return "MODELGROVE_ISA=none asks for plain torch"
    return _load()[1] or "this CPU has no AVX2 with FMA"


def _wanted() -> str | None:
    value = os.environ.get("MODELGROVE_ISA") or None
    if value not in {None, "none", *ISAS}:
        raise ValueError(f"MODELGROVE_ISA={value} is unknown, only {', '.join([*ISAS, 'none'])}")
    return value


@cache
def _best() -> str | None:
    loaded = _load()[0]
    number = loaded.mg_best_isa() if loaded else 0
    return next((name for name, known in ISAS.items() if known == number), None)


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why it cannot be loaded."""
    if not PATH.exists():
        return None, (
            f"{PATH} does not exist: the package was built without a C compiler, or for another kind of processor. "
            "Install one (cc, gcc or clang) and install the package again"
        )
    try:
        return ctypes.CDLL(str(PATH)), None
    except OSError as error:
        return None, f"{PATH} cannot be loaded: {error}"
