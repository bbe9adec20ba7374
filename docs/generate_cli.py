"""Write docs/cli.md from the commands themselves: `make docs`; a test compares."""

from __future__ import annotations

from pathlib import Path

import click

from modelgrove_hub.cli.root import modelgrove

TARGET = Path(__file__).parent / "cli.md"
_HEAD = """# Command line

Made from the commands by `make docs`; do not edit. Every command also takes `--help`.
"""


def reference() -> str:
    """The whole reference as Markdown."""
    context = click.Context(modelgrove, info_name="modelgrove", max_content_width=100)
    return "\n".join([_HEAD, *_sections(modelgrove, context)])


def _sections(command: click.Command, context: click.Context) -> list[str]:
    lines = [f"## {context.command_path}\n", "```text", command.get_help(context).rstrip(), "```\n"]
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None:
                lines += _sections(child, click.Context(child, info_name=name, parent=context, max_content_width=100))
    return lines


if __name__ == "__main__":
    TARGET.write_text(reference(), "utf-8")
