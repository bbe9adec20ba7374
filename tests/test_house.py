"""What is true of the whole repository."""

import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("hub", "plugins", "analyzers", "workers", "kernels", "migrations")
BANNED = {"utils", "helpers", "common", "base_class", "manager", "core", "misc"}
MODULES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_top_level_folders_are_not_packages():
    assert [folder for folder in FOLDERS if (ROOT / folder / "__init__.py").exists()] == []


def test_each_folder_holds_one_package_named_after_it():
    for folder in FOLDERS:
        packages = [path.parent.name for path in (ROOT / folder).glob("*/__init__.py")]
        assert packages == [f"modelgrove_{folder}"]


def test_transformers_and_diffusers_import_from_the_repository_root():
    # They probe for Hugging Face's `kernels` by importing that name, and we have such a folder.
    done = run_python("import transformers, diffusers; from diffusers import UNet2DConditionModel")
    assert done.returncode == 0, done.stderr


HEAVY = ("torch", "diffusers", "transformers", "faiss", "celery", "sentence_transformers")
LIGHT = "import sys; {what}; print([m for m in {heavy!r} if m in sys.modules])"


def test_the_command_line_starts_without_heavy_packages():
    code = "from modelgrove_hub.cli.root import modelgrove; modelgrove.main(['--help'], standalone_mode=False)"
    done = run_python(LIGHT.format(what=code, heavy=HEAVY))
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr


def test_that_test_can_fail():
    done = run_python(LIGHT.format(what="import torch", heavy=HEAVY))
    assert "torch" in done.stdout


def test_listing_plugins_imports_nothing_heavy():
    code = "from modelgrove_hub.plugins import load_plugins; load_plugins()"
    done = run_python(LIGHT.format(what=code, heavy=HEAVY))
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr


@pytest.mark.parametrize(
    "group", ["modelgrove.commands", "modelgrove.plugins", "modelgrove.exporters", "modelgrove.dispatchers"]
)
def test_every_entry_point_of_ours_loads(group):
    ours = [entry for entry in entry_points(group=group) if entry.dist and entry.dist.name == "modelgrove"]
    assert ours
    for entry in ours:
        assert entry.load() is not None


def test_plugin_entry_names_say_kind_and_name():
    for entry in entry_points(group="modelgrove.plugins"):
        if entry.dist and entry.dist.name == "modelgrove":
            plugin = entry.load()
            assert entry.name == f"{plugin.kind}.{plugin.name}"


def test_every_folder_has_a_short_readme():
    for folder in FOLDERS:
        text = (ROOT / folder / "README.md").read_text("utf-8")
        assert len(text.splitlines()) <= 14
        assert "Read first" in text
        assert "May import" in text
    for folder in ("bench", "docs", "examples", "tests"):
        assert (ROOT / folder / "README.md").is_file()


def test_modules_are_small_and_named_by_nouns():
    assert {str(path) for path in MODULES if len(path.read_text("utf-8").splitlines()) > 400} == set()
    assert {str(path) for path in MODULES if path.stem in BANNED} == set()


def test_every_seed_of_a_plugin_is_named_in_its_docstring():
    for entry in entry_points(group="modelgrove.plugins"):
        if entry.dist and entry.dist.name == "modelgrove":
            plugin = entry.load()
            assert plugin.summary.endswith(".")
            assert plugin.__doc__


def test_every_dependency_is_explained():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    listed = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    explained = (ROOT / "docs/dependencies.md").read_text("utf-8")
    names = {re.split(r"[\[<>=!~ ]", one)[0] for one in listed}
    assert {name for name in names if f"`{name}`" not in explained} == set()
