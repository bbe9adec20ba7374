"""The conformance kit passes good plugins and tells what is wrong with bad ones."""

import importlib
import sys

import pytest

from modelgrove_hub.contracts import Kind
from modelgrove_hub.scaffold import write_package
from modelgrove_hub.testing import FolderModel, check_plugin

HEAD = '''
"""Plugins that each break one promise."""
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from modelgrove_hub.contracts import API, Kind, Output, Params, Result
from modelgrove_hub.tables import Relation
'''
CLASS = '''

class {name}Params(Params):
    """Choices."""

    size: int = Field(1, description="A size.")
    {params}


class {name}:
    """Does nothing much."""

    name: ClassVar[str] = "method"
    kind: ClassVar[Kind] = Kind.{kind}
    api: ClassVar[int] = {api}
    summary: ClassVar[str] = "Does nothing much."
    paper: ClassVar[str] = ""
    Params = {name}Params
    runs = 0

    def run(self, context, params):
        """Do it."""
        {run}
        return Result({result})
'''
GOOD = {
    "kind": "ANALYZER",
    "params": "",
    "api": "API",
    "run": "context.progress(0.5)",
    "result": "report={'done': 1}",
}
FAULTS = {
    "the wrong contract": ({"api": "99"}, "says what it is", "`api` must be 1"),
    "a parameter without a word": ({"params": "other: int = 2"}, "has parameters that survive JSON", "other"),
    "an error": ({"run": "raise RuntimeError('oops')"}, "runs on tiny models", "RuntimeError: oops"),
    "no result": ({"run": "context.progress(1); return 3"}, "returns a result", "returns a int"),
    "a report that is no JSON": ({"result": "report={'x': float('nan')}"}, "returns a result", "not JSON"),
    "a missing file": ({"result": "(Output(('x',), Relation.EDIT),)"}, "returns a result", "named but not written: x"),
    "a lost file": (
        {"run": "context.progress(1); context.path('x').write_text('x')"},
        "returns a result",
        "named in no output",
    ),
    "a broken safetensors file": (
        {
            "run": "context.progress(1); context.path('x.safetensors').write_text('x')",
            "result": "artefacts=('x.safetensors',)",
        },
        "returns a result",
        "x.safetensors",
    ),
    "chance": (
        {"run": "context.progress(1); type(self).runs += 1", "result": "report={'n': type(self).runs}"},
        "does the same",
        "report",
    ),
    "other files": (
        {
            "run": "context.progress(1); type(self).runs += 1; context.path('x').write_text(str(type(self).runs))",
            "result": "artefacts=('x',)",
        },
        "does the same",
        "other files",
    ),
    "no progress": ({"run": "pass"}, "honours a cancel", "call `context.progress`"),
    "a swallowed cancel": (
        {"run": "\n        try: context.progress(1)\n        except Exception: pass"},
        "honours a cancel",
        "runs to its end",
    ),
    "a file elsewhere": (
        {"run": "context.progress(1); Path('left-behind').write_text('x')"},
        "writes only into its output folder",
        "left-behind",
    ),
    "a changed input": (
        {"run": "context.progress(1); context.inputs[0].files()['config.json'].write_text('{}')"},
        "writes only into its output folder",
        "config.json",
    ),
}


SOURCE = HEAD + "".join(
    CLASS.format(name=f"Method{place}", **{**GOOD, **changes}) for place, (changes, _, _) in enumerate(FAULTS.values())
)
SOURCE += CLASS.format(name="Good", **GOOD)
SOURCE += CLASS.format(name="Sampler", **{**GOOD, "kind": "SAMPLER"})
SOURCE += CLASS.format(name="Choosy", **{**GOOD, "params": "other: int = Field(description='Choose.')"})


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Import source text as a module that a child process can import too."""
    folder = tmp_path_factory.mktemp("plugins")
    sys.path.insert(0, str(folder))

    def load(name, source):
        (folder / f"{name}.py").write_text(source, "utf-8")
        return importlib.import_module(name)

    yield load
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def methods(load):
    return load("plugins_under_test", SOURCE)


@pytest.fixture(autouse=True)
def _somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def failed(checks):
    return {check.name: check.detail for check in checks if not check.ok}


def test_a_good_plugin_passes_every_check(methods):
    checks = check_plugin(methods.Good)
    assert failed(checks) == {}
    assert len(checks) == 8


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_named(fault, methods):
    _, check, message = FAULTS[fault]
    found = failed(check_plugin(getattr(methods, f"Method{list(FAULTS).index(fault)}")))
    [name] = [name for name in found if name.startswith(check)]
    assert message in found[name]


def test_a_module_that_imports_torch_is_too_heavy(load):
    module = load("heavy_under_test", HEAD + "import torch\n" + CLASS.format(name="Heavy", **GOOD))
    assert "torch" in failed(check_plugin(module.Heavy))["imports in an instant"]


@pytest.mark.parametrize("kind", ["analyzer", "compressor", "merger"])
def test_new_packages_pass_the_checks(kind, tmp_path, monkeypatch):
    package = write_package(f"fresh-{kind}", kind, tmp_path)
    monkeypatch.syspath_prepend(str(package))
    module = importlib.import_module(f"modelgrove_fresh_{kind}")
    assert failed(check_plugin(getattr(module, f"Fresh{kind.title()}"))) == {}


def test_kinds_that_need_more_than_random_weights_are_run_on_given_inputs(methods, tmp_path):
    assert methods.Sampler.kind is Kind.SAMPLER
    assert "not tried" in check_plugin(methods.Sampler)[-1].detail
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    assert len(check_plugin(methods.Sampler, inputs=[FolderModel(tmp_path / "model")])) == 8


def test_a_plugin_whose_user_must_choose_is_run_when_the_choice_is_given(methods):
    checks = check_plugin(methods.Choosy)
    assert failed(checks) == {}
    assert "not tried: give other" in checks[-1].detail
    assert len(check_plugin(methods.Choosy, params={"other": 3})) == 8


def test_a_class_that_is_nothing_like_a_plugin_is_told_so():
    checks = check_plugin(dict)
    assert not checks[0].ok
    assert "`name` must be text" in checks[0].detail
