"""Write a new plugin package from the templates that ship with the hub."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from string import Template

from modelgrove_hub.errors import ConflictError, UsageError

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def write_package(name: str, kind: str, folder: Path) -> Path:
    """Write `folder/modelgrove-NAME`: pyproject, one plugin module, one test. Returns its path.

    Raises:
        UsageError: the name is not lower-case words joined by dashes.
        ConflictError: the package's folder exists.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"plugin name {name!r}: use lower-case words joined by dashes, as in 'layer-norms'")
    package = folder / f"modelgrove-{name}"
    if package.exists():
        raise ConflictError(f"{package} exists: choose another name or folder")
    module = f"modelgrove_{name.replace('-', '_')}"
    words = {
        "name": name,
        "kind": kind,
        "module": module,
        "title": "".join(part.title() for part in name.split("-")),
    }
    for template, target in (
        ("pyproject.toml", "pyproject.toml"),
        (f"{kind}.py", f"{module}.py"),
        ("test.py", f"tests/test_{module}.py"),
    ):
        text = files("modelgrove_hub").joinpath(f"templates/plugin/{template}.txt").read_text("utf-8")
        path = package / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template(text).substitute(words), "utf-8")
    return package
