"""The documents are true: the CLI reference is fresh, links lead somewhere, commands exist."""

import re
import shlex
import sys
from pathlib import Path

import click
import pytest

from modelgrove_hub.cli.root import modelgrove

ROOT = Path(__file__).parents[2]
PAGES = [
    *(
        ROOT / page
        for page in ("README.md", "CHANGELOG.md", "bench/README.md", "examples/README.md", "tests/README.md")
    ),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def test_the_cli_reference_is_fresh():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from generate_cli import TARGET, reference
    finally:
        sys.path.pop(0)
    assert TARGET.read_text("utf-8") == reference(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def commands(page):
    """Lines of shell blocks that call modelgrove."""
    for block in re.findall(r"```(?:sh|console)\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        for line in block.splitlines():
            line = line.removeprefix("$ ").split("  #")[0].split(" | ")[0]
            if line.startswith("modelgrove "):
                yield line


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_the_documents_parse(page):
    # Parsing needs the command, its options and its arguments to be real; running them is the
    # business of each command's own tests and of the demo test.
    for line in commands(page):
        words = shlex.split(line)[1:]
        context = modelgrove.make_context("modelgrove", list(words))
        arguments = [*context._protected_args, *context.args]
        command: click.Command = modelgrove
        while isinstance(command, click.Group) and arguments:
            child = command.get_command(context, arguments[0])
            assert child is not None, f"{page.name}: no command in {line!r}"
            command, arguments = child, arguments[1:]
            context = command.make_context(command.name, list(arguments), parent=context)
            arguments = [*context._protected_args, *context.args] if isinstance(command, click.Group) else []
