"""The `modelgrove` command: finds its subcommands by entry point and says errors in one line.

A command module imports only click and `cli.*` at its top; everything heavier is imported
inside the command, so that `modelgrove --help` stays fast.
"""

from __future__ import annotations

import os
import sys
import traceback
from importlib.metadata import EntryPoint, version

import click

from modelgrove_hub.entries import distribution_of, usable
from modelgrove_hub.errors import ModelgroveError, PluginError, UsageError

GROUP = "modelgrove.commands"
INTERRUPTED = 130
_HERE = frozenset({"basis", "db", "demo", "init", "serve", "sign", "up", "worker"})
"""Commands about this machine, its files and its keys: no other hub answers them."""


class Commands(click.Group):
    """Subcommands are entry points; a broken third-party command is listed as broken and harms nobody."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The names of all installed commands."""
        return sorted(self._entries())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import and return one command."""
        entry = self._entries().get(cmd_name)
        if entry is None:
            return None
        try:
            command = entry.load()
        except Exception as error:  # noqa: BLE001  (a stranger's module may raise anything)
            return _broken(entry, error)
        return command if isinstance(command, click.Command) else _broken(entry, TypeError("not a click command"))

    @staticmethod
    def _entries() -> dict[str, EntryPoint]:
        return usable(GROUP)


def _broken(entry: EntryPoint, error: Exception) -> click.Command:
    distribution = distribution_of(entry)
    reason = f"command {entry.name!r} of {distribution} does not load: {type(error).__name__}: {error}"

    @click.command(
        entry.name, short_help=f"(broken, from {distribution})", context_settings={"ignore_unknown_options": True}
    )
    @click.argument("arguments", nargs=-1)
    def command(arguments: tuple[str, ...]) -> None:  # noqa: ARG001
        raise PluginError(reason)

    return command


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 ok, 1 internal error, 2 usage, 3 not found, 4 conflict, 5 bad file or failed check, "
    "6 job or plugin failed, 7 storage or service unreachable, 130 interrupted.",
)
@click.option("--home", type=click.Path(file_okay=False), help="The hub's folder (MODELGROVE_HOME).")
@click.option("--hub", "url", metavar="URL", help="Ask the hub served there, not this machine's (MODELGROVE_HUB).")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(version("modelgrove"), prog_name="modelgrove")
@click.pass_context
def modelgrove(context: click.Context, home: str | None, url: str | None, debug: bool) -> None:
    """A self-hosted model hub that understands weights."""
    if home:
        from modelgrove_hub.settings import settings

        os.environ["MODELGROVE_HOME"] = home  # workers started from here inherit it
        settings.cache_clear()
    if url:
        os.environ["MODELGROVE_HUB"] = url
    if context.invoked_subcommand in _HERE and (there := os.environ.get("MODELGROVE_HUB")):
        what = f"`modelgrove {context.invoked_subcommand}` works on this machine"
        raise UsageError(f"{what}: leave out --hub (MODELGROVE_HUB), or run it where {there} is")
    if debug:
        os.environ["MODELGROVE_DEBUG"] = "1"


def main() -> None:
    """Run the command line: the one place where errors become a line and an exit code."""
    debug = "--debug" in sys.argv
    try:
        modelgrove.main(standalone_mode=False)
    except ModelgroveError as error:
        _fail(f"error: {error}", error.exit_code, debug)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", INTERRUPTED, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` closed our output
        sys.exit(1)
    except Exception as error:  # noqa: BLE001  (the last line of defence)
        _fail(f"internal error: {type(error).__name__}: {error} (run again with --debug for the traceback)", 1, debug)


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    click.echo(message, err=True)
    sys.exit(code)
