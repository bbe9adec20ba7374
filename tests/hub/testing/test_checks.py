"""The conformance kit passes good plugins and tells what is wrong with bad ones."""

import importlib
import sys

import pytest

from modelgrove_hub.contracts import Kind
from modelgrove_hub.scaffold import write_package
from modelgrove_hub.testing import FolderModel, check_plugin

MODULE = '''
"""Plugins that each break one promise."""
from pathlib import Path
from typing import ClassVar

{top}
from pydantic import Field

from modelgrove_hub.contracts import API, Kind, Output, Params, Result
from modelgrove_hub.tables import Relation


class SomeParams(Params):
    """Choices."""

    size: int = Field(1, description="A size.")
    {params}


class Method:
    """Copies the first tensor."""

    name: ClassVar[str] = "method"
    kind: ClassVar[Kind] = Kind.ANALYZER
    api: ClassVar[int] = {api}
    summary: ClassVar[str] = "Copies a tensor."
    paper: ClassVar[str] = ""
    Params = SomeParams
    runs = 0

    def run(self, context, params):
        """Copy."""
        {run}
        return Result({result})
'''
GOOD = {
    "top": "", "params": "", "api": "API", "run": "context.progress(0.5)", "result": "report={'done': 1}",
}  # fmt: skip
FAULTS = {
    "the wrong contract": ({"api": "99"}, "says what it is", "`api` must be 1"),
    "a heavy import": ({"top": "import torch"}, "imports in an instant", "torch"),
    "a parameter without a word": ({"params": "other: int = 2"}, "has parameters that survive JSON", "other"),
    "a required parameter": ({"params": "other: int = Field(description='x')"}, "has parameters", "'other' is needed"),
    "an error": ({"run": "raise RuntimeError('oops')"}, "runs on tiny models", "RuntimeError: oops"),
    "no result": ({"run": "context.progress(1); return 3"}, "returns a result", "returns a int"),
    "a report that is no JSON": ({"result": "report={'x': float('nan')}"}, "returns a result", "not JSON"),
    "a missing file": ({"result": "(Output(('x',), Relation.EDIT),)"}, "returns a result", "named but not written: x"),
    "a lost file": (
        {"run": "context.progress(1); context.path('x').write_text('x')"}, "returns a result", "named in no output",
    ),
    "a broken safetensors file": (
        {"run": "context.progress(1); context.path('x.safetensors').write_text('x')", "result": "artefacts=('x.safetensors',)"},
        "returns a result", "x.safetensors",
    ),
    "chance": ({"run": "context.progress(1); Method.runs += 1", "result": "report={'n': Method.runs}"}, "does the same", "report"),
    "other files": (
        {"run": "context.progress(1); Method.runs += 1; context.path('x').write_text(str(Method.runs))",
         "result": "artefacts=('x',)"}, "does the same", "other files",
    ),
    "no progress": ({"run": "pass"}, "honours a cancel", "call `context.progress`"),
    "a swallowed cancel": (
        {"run": "\n        try: context.progress(1)\n        except Exception: pass"}, "honours a cancel", "runs to its end",
    ),
    "a file elsewhere": (
        {"run": "context.progress(1); Path('left-behind').write_text('x')"}, "writes only into its output folder", "left-behind",
    ),
    "a changed input": (
        {"run": "context.progress(1); context.inputs[0].files()['config.json'].write_text('{}')"},
        "writes only into its output folder", "config.json",
    ),
}  # fmt: skip


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Import source text as a module that a child process can import too."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names = []

    def load(source):
        name = f"plugin_under_test_{abs(hash(source))}"
        names.append(name)
        (tmp_path / f"{name}.py").write_text(source, "utf-8")
        return importlib.import_module(name)

    yield load
    for name in names:
        sys.modules.pop(name, None)


def failed(checks):
    return {check.name: check.detail for check in checks if not check.ok}


def test_a_good_plugin_passes_every_check(load):
    checks = check_plugin(load(MODULE.format(**GOOD)).Method)
    assert failed(checks) == {}
    assert len(checks) == 8


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_named(fault, load):
    changes, check, message = FAULTS[fault]
    found = failed(check_plugin(load(MODULE.format(**{**GOOD, **changes})).Method))
    [name] = [name for name in found if name.startswith(check)]
    assert message in found[name]


@pytest.mark.parametrize("kind", ["analyzer", "compressor", "merger"])
def test_new_packages_pass_the_checks(kind, tmp_path, monkeypatch):
    package = write_package(f"fresh-{kind}", kind, tmp_path)
    monkeypatch.syspath_prepend(str(package))
    module = importlib.import_module(f"modelgrove_fresh_{kind}")
    assert failed(check_plugin(getattr(module, f"Fresh{kind.title()}"))) == {}


def test_kinds_that_need_more_than_random_weights_are_run_on_given_inputs(load, tmp_path):
    sampler = load(MODULE.format(**GOOD).replace("Kind.ANALYZER", "Kind.SAMPLER")).Method
    assert sampler.kind is Kind.SAMPLER
    untried = check_plugin(sampler)
    assert "not tried" in untried[-1].detail
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    assert len(check_plugin(sampler, inputs=[FolderModel(tmp_path / "model")])) == 8


def test_a_class_that_is_nothing_like_a_plugin_is_told_so():
    checks = check_plugin(dict)
    assert not checks[0].ok
    assert "`name` must be text" in checks[0].detail
