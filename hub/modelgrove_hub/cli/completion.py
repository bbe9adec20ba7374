"""`modelgrove completion`: the script that makes the shell complete commands."""

from __future__ import annotations

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script; as in `eval "$(modelgrove completion bash)"`."""
    from click.shell_completion import get_completion_class

    from modelgrove_hub.cli.root import modelgrove

    script = get_completion_class(shell)
    if script is None:
        raise click.BadParameter(f"no completion for {shell}")
    click.echo(script(modelgrove, {}, "modelgrove", "_MODELGROVE_COMPLETE").source())
