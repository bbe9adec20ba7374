"""Keep all libraries of a bench to the instructions of smaller machines."""

from __future__ import annotations

import os
import sys

_AVX2 = {
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MODELGROVE_ISA": "avx2",
}


def keep_to(isa: str | None) -> None:
    """Start the bench anew if it runs with other instructions: the libraries read their limits when they are loaded."""
    if isa and os.environ.get("MODELGROVE_ISA") != isa:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | _AVX2)
