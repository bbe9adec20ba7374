"""Build hook: compiles `kernels/modelgrove_kernels/csrc/*.c` to one shared library beside the package's modules.

`pip install` runs it, for editable installs too; `python hatch_build.py` compiles again after a change of the C files.
Without a C compiler the build goes on: the package then computes in plain torch, and says so.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = Path("kernels/modelgrove_kernels")
LIBRARY = PACKAGE / "_native.so"
FLAGS = ["-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]


class NativeKernels(BuildHookInterface[Any]):
    """Adds the compiled library to the wheel, and tags the wheel with the platform that it runs on."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile before hatchling collects the files."""
        problem = compile_library(Path(self.root))
        if problem:
            self.app.display_warning(f"modelgrove's CPU kernels were not built: {problem}")
            return
        build_data["artifacts"].append(LIBRARY.as_posix())
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def compile_library(root: Path) -> str | None:
    """Compile all C files; what stood in the way, or None. No library of older sources is left behind."""
    target = root / LIBRARY
    problem = _compile(sorted((root / PACKAGE / "csrc").glob("*.c")), target)
    if problem:
        target.unlink(missing_ok=True)
    return problem


def _compile(sources: list[Path], target: Path) -> str | None:
    if os.name != "posix" or platform.machine().lower() not in {"x86_64", "amd64"}:
        return f"they are written for x86-64 and POSIX, this is {platform.machine()} with {platform.system()}"
    compiler = _compiler()
    if compiler is None:
        return "no C compiler was found (cc, gcc or clang; the variable CC names another)"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        output = Path(folder, target.name)
        command = [*compiler, *FLAGS, *map(str, sources), "-lm", "-o", str(output)]
        problem = _run([*command, "-fopenmp"]) and _run(command)
        if problem is None:
            # Processes that run keep the file that they have mapped.
            output.replace(target)
    return problem


def _compiler() -> list[str] | None:
    named = shlex.split(os.environ.get("CC", ""))
    candidates = [named] if named else [["cc"], ["gcc"], ["clang"]]
    return next((command for command in candidates if shutil.which(command[0])), None)


def _run(command: list[str]) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"{shlex.join(command)} failed:\n{done.stderr.strip()}"


if __name__ == "__main__":
    sys.exit(compile_library(Path(__file__).parent))
