"""`modelgrove plugin`: list, show, start and check plugins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from modelgrove_hub.cli.output import json_option, print_facts, print_json, print_table, say
from modelgrove_hub.cli.place import ask_any
from modelgrove_hub.errors import PluginError

_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


@click.group()
def plugin() -> None:
    """List, show, start and check plugins."""


@plugin.command("ls")
@json_option
def list_(as_json: bool) -> None:
    """List installed plugins, the broken ones too."""
    from modelgrove_hub.verbs.plugins import list_plugins

    found = ask_any(list_plugins)
    if as_json:
        print_json([plugin.model_dump() for plugin in found])
        return
    print_table(
        ("plugin", "state", "from", "what it does"),
        ((one.full_name, one.state, one.distribution, one.summary or one.reason) for one in found),
        empty="No plugins are installed.",
    )


@plugin.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show what plugin NAME does and its parameters."""
    from modelgrove_hub.verbs.plugins import show_plugin

    found = ask_any(show_plugin, plugin=name)
    schema = found.params
    if as_json:
        print_json(found.model_dump())
        return
    print_facts([("plugin", f"{found.kind}.{found.name}"), ("summary", found.summary), ("paper", found.paper)])
    required = set(schema.get("required", ()))
    print_table(
        ("option", "type", "default", "meaning"),
        (
            (
                f"--{field.replace('_', '-')}",
                _type(rule, schema.get("$defs", {})),
                "(required)" if field in required else _default(rule.get("default")),
                rule.get("description"),
            )
            for field, rule in schema.get("properties", {}).items()
        ),
        empty="It has no parameters.",
    )


@plugin.command()
@click.argument("name")
@click.option("--kind", type=click.Choice(["analyzer", "compressor", "merger"]), default="analyzer", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=Path(), help="Where the package's folder goes.")
def new(name: str, kind: str, folder: Path) -> None:
    """Write a package with a working plugin NAME and its test."""
    from modelgrove_hub.scaffold import write_package

    package = write_package(name, kind, folder)
    say(f"Next: pip install -e {package} && modelgrove plugin check {kind}.{name}")
    click.echo(package)


@plugin.command()
@click.argument("name")
@json_option
def check(name: str, as_json: bool) -> None:
    """Run the conformance checks on plugin NAME."""
    from modelgrove_hub.plugins import get_plugin
    from modelgrove_hub.testing import check_plugin

    results = check_plugin(get_plugin(name))
    if as_json:
        print_json([{"check": r.name, "ok": r.ok, "detail": r.detail} for r in results])
    else:
        for result in results:
            click.echo(
                f"{'ok  ' if result.ok else 'FAIL'} {result.name}{': ' + result.detail if result.detail else ''}"
            )
    if failed := [result.name for result in results if not result.ok]:
        raise PluginError(f"plugin {name!r} fails {len(failed)} of {len(results)} checks: {', '.join(failed)}")


def _type(rule: Mapping[str, Any], shared: Mapping[str, Any]) -> str:
    """A parameter's JSON schema in a few words: "number > 1", "tensor | row", "list of integer"."""
    if reference := rule.get("$ref"):
        return _type(shared[reference.rpartition("/")[2]], shared)
    if "enum" in rule:
        return " | ".join(map(str, rule["enum"]))
    if "anyOf" in rule:
        return " | ".join(_type(option, shared) for option in rule["anyOf"] if option.get("type") != "null")
    if rule.get("type") == "array":
        return f"list of {_type(rule.get('items', {}), shared)}"
    limits = (f"{sign} {rule[key]:g}" for key, sign in _LIMITS.items() if key in rule)
    return " ".join((str(rule.get("type", "any")), ", ".join(limits))).rstrip()


def _default(value: object) -> object:
    return "none" if value is None or value == [] else value
