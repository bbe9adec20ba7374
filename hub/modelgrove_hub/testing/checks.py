"""The conformance kit: what every plugin must do, tried on tiny models in a temporary folder."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from modelgrove_hub.contracts import API, Cancelled, InputModel, Kind, Params, Plugin, Result
from modelgrove_hub.errors import ModelgroveError
from modelgrove_hub.plugins import check_params
from modelgrove_hub.store.tensors import tensors_of
from modelgrove_hub.tables import Relation
from modelgrove_hub.testing.local import LocalContext
from modelgrove_hub.testing.tiny import tiny_inputs
from modelgrove_hub.testing.writes import watch_writes

HEAVY = ("torch", "diffusers", "transformers", "peft", "sentence_transformers", "faiss", "celery")
_IMPORT = (
    "import importlib, sys; importlib.import_module({module!r}); print([m for m in {heavy!r} if m in sys.modules])"
)
_IMPORT_SECONDS = 120


@dataclass(frozen=True)
class Check:
    """One thing that a plugin must do, whether this one does it, and if not, what it does instead."""

    name: str
    ok: bool
    detail: str = ""


@dataclass
class _Attempt:
    """What one run did."""

    result: Any = None
    error: BaseException | None = None
    files: dict[str, str] = field(default_factory=dict)
    """Path in the output folder → sha256."""
    faults: list[str] = field(default_factory=list)


def check_plugin(
    plugin: Plugin | type[Plugin], inputs: Sequence[InputModel] | None = None, params: Mapping[str, Any] | None = None
) -> tuple[Check, ...]:
    """Check everything that the contract promises. Nothing is raised for a plugin's faults.

    `inputs` are models to run on; by default tiny ones are made, for the kinds where that makes
    sense. A plugin is only run if all its parameters have defaults or are given by `params`.
    """
    kind = plugin if isinstance(plugin, type) else type(plugin)
    checks = [
        _try("says what it is", lambda: _facts(kind)),
        _try("imports in an instant", lambda: _import_fault(kind.__module__)),
    ]
    checks.append(_try("has parameters that survive JSON", lambda: _params(kind, params or {})))
    if all(check.ok for check in (checks[0], checks[2])):
        checks += _runs(kind() if isinstance(plugin, type) else plugin, inputs, params or {})
    return tuple(checks)


def _try(name: str, find_fault: Callable[[], str]) -> Check:
    try:
        fault = find_fault()
    except Exception as error:  # noqa: BLE001  (a stranger's code may raise anything)
        fault = _said(error)
    return Check(name, not fault, fault)


def _facts(kind: type[Plugin]) -> str:
    """What is missing or wrong in the class, or nothing."""
    for name in ("name", "summary", "paper"):
        if not isinstance(getattr(kind, name, None), str):
            return f"`{name}` must be text, not {getattr(kind, name, None)!r}"
    if not kind.name or not kind.summary or not kind.__doc__:
        return "`name`, `summary` and the docstring must not be empty"
    if getattr(kind, "kind", None) not in list(Kind):
        return f"`kind` must be one of {', '.join(Kind)}"
    if getattr(kind, "api", None) != API:
        return f"`api` must be {API}, not {getattr(kind, 'api', None)!r}"
    if not (isinstance(getattr(kind, "Params", None), type) and issubclass(kind.Params, Params)):
        return "`Params` must be a subclass of modelgrove_hub.contracts.Params"
    return "" if callable(getattr(kind, "run", None)) else "there is no method `run`"


@cache
def _import_fault(module: str) -> str:
    code = _IMPORT.format(module=module, heavy=HEAVY)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"importing {module} takes more than {_IMPORT_SECONDS} s"
    if done.returncode:
        return f"{module} cannot be imported by itself: {done.stderr.strip().rpartition(chr(10))[2]}"
    heavy = done.stdout.strip().splitlines()[-1]
    return "" if heavy == "[]" else f"importing {module} imports {heavy}: import them inside `run`"


def _params(kind: type[Plugin], values: Mapping[str, Any]) -> str:
    json.dumps(kind.Params.model_json_schema())
    if not _missing(kind, values):
        params = check_params(kind, values)
        again = kind.Params.model_validate(json.loads(params.model_dump_json()))
        if again != params:
            return f"{params!r} comes back from JSON as {again!r}"
    bare = [name for name, rule in kind.Params.model_fields.items() if not rule.description]
    return f"parameters without a description: {', '.join(bare)}" if bare else ""


def _missing(kind: type[Plugin], values: Mapping[str, Any]) -> list[str]:
    """Parameters that have no default and are not given."""
    return [name for name, rule in kind.Params.model_fields.items() if rule.is_required() and name not in values]


def _runs(plugin: Plugin, inputs: Sequence[InputModel] | None, values: Mapping[str, Any]) -> Iterator[Check]:
    if missing := _missing(type(plugin), values):
        yield Check("runs on tiny models", True, f"not tried: give {', '.join(missing)} in `params`")
        return
    with TemporaryDirectory(prefix="modelgrove-check-") as name:
        folder = Path(name).resolve()
        models = inputs if inputs is not None else tiny_inputs(Kind(plugin.kind), folder / "inputs")
        if models is None:
            yield Check("runs on tiny models", True, f"not tried: give inputs to check a {plugin.kind}")
            return
        params = check_params(type(plugin), values)
        before = _hashes([path for model in models for path in model.files().values()])
        first = _attempt(plugin, models, params, folder / "first")
        yield Check("runs on tiny models", first.error is None, _said(first.error))
        if first.error is not None:
            return
        yield Check("returns a result that can be kept", not first.faults, "; ".join(first.faults))
        # Watched the second time: the first run may fill caches of the libraries it imports.
        with watch_writes(folder / "second") as outside:
            second = _attempt(plugin, models, params, folder / "second")
        yield _try("does the same again with the same seed", lambda: _difference(first, second))
        yield _try("honours a cancel", lambda: _cancel_fault(plugin, models, params, folder / "cancelled"))
        if _hashes(list(before)) != before:
            outside.append("its inputs were changed")
        yield Check("writes only into its output folder", not outside, ", ".join(sorted(set(outside))[:5]))


def _attempt(plugin: Plugin, inputs: Sequence[InputModel], params: Params, folder: Path) -> _Attempt:
    attempt = _Attempt()
    context = LocalContext(folder, inputs)
    try:
        with context:
            attempt.result = plugin.run(context, params)
    except Exception as error:  # noqa: BLE001  (a stranger's code may raise anything)
        attempt.error = error
        return attempt
    written = {path.relative_to(context.out).as_posix(): path for path in context.out.rglob("*") if path.is_file()}
    attempt.files = dict(zip(written, _hashes(list(written.values())).values(), strict=True))
    attempt.faults = list(_result_faults(attempt.result, written))
    return attempt


def _result_faults(result: Any, written: Mapping[str, Path]) -> Iterator[str]:
    if not isinstance(result, Result):
        yield f"`run` returns a {type(result).__name__}, not a Result"
        return
    named = {path for output in result.outputs for path in output.files} | set(result.artefacts)
    if missing := sorted(named - written.keys()):
        yield f"named but not written: {', '.join(missing)}"
    if lost := sorted(written.keys() - named):
        yield f"written but named in no output and no artefact: {', '.join(lost)}"
    for output in result.outputs:
        if output.relation not in list(Relation):
            yield f"relation {output.relation!r} is none of {', '.join(Relation)}"
    try:
        json.dumps(dict(result.report), allow_nan=False)
    except (TypeError, ValueError) as error:
        yield f"the report is not JSON: {error}"
    for path in written.values():
        if path.suffix == ".safetensors":
            try:
                yield from _not_finite(path)
            except ModelgroveError as error:
                yield str(error)


def _not_finite(path: Path) -> Iterator[str]:
    for tensor in tensors_of(path):
        values = tensor.read()
        if values.is_floating_point() and not bool(values.double().isfinite().all()):
            yield f"{path.name}: tensor {tensor.name} holds NaN or infinite values, and the inputs had none"
            return


def _difference(first: _Attempt, second: _Attempt) -> str:
    if second.error is not None:
        return _said(second.error)
    changed = sorted(name for name, digest in first.files.items() if second.files.get(name) != digest)
    if changed or first.files.keys() != second.files.keys():
        return f"other files than the first time: {', '.join(changed) or sorted(second.files)}"
    same = json.dumps(first.result.report, default=str) == json.dumps(second.result.report, default=str)
    return "" if same else "another report than the first time"


def _cancel_fault(plugin: Plugin, inputs: Sequence[InputModel], params: Params, folder: Path) -> str:
    try:
        with LocalContext(folder, inputs, cancel_after=0) as context:
            plugin.run(context, params)
    except Cancelled:
        return ""
    return "it runs to its end: call `context.progress` at every step and let `Cancelled` pass"


def _hashes(paths: Sequence[Path]) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _said(error: BaseException | None) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()) if error is not None else ""
