"""`modelgrove token`: who may talk to the hub from elsewhere."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import click

from modelgrove_hub.cli.output import json_option, print_json, print_table, say
from modelgrove_hub.cli.place import ask

_UNITS = {"h": "hours", "d": "days"}


class Duration(click.ParamType[datetime]):
    """How long from now: a number and h or d."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """The moment that far away."""
        found = re.fullmatch(r"([1-9]\d{0,4})([hd])", str(value))
        if found is None:
            self.fail(f"{value!r}: write a number and h or d, as in 12h or 90d", param, ctx)
        return datetime.now(UTC) + timedelta(**{_UNITS[found[2]]: int(found[1])})


@click.group()
def token() -> None:
    """Make, list and revoke tokens."""


@token.command()
@click.argument("name")
@click.option(
    "--scope", type=click.Choice(["read", "write", "admin"]), default="read", show_default=True,
    help="read looks, write also adds and gives work, admin does everything.",
)  # fmt: skip
@click.option("--expires", type=Duration(), metavar="90d", help="How long it is good.  [default: until revoked]")
@json_option
def create(name: str, scope: str, expires: datetime | None, as_json: bool) -> None:
    """Make a token and print it: it is shown this once, and only its hash is kept."""
    from modelgrove_hub.verbs.tokens import NewToken, create_token

    made = ask(create_token, token=NewToken(name=name, scope=scope, expires_at=expires))
    if as_json:
        print_json(made.model_dump())
        return
    click.echo(made.token)
    say(f"Keep it now, it is not shown again. Clients read it from MODELGROVE_TOKEN or HF_TOKEN. It may {scope}.")


@token.command("ls")
@json_option
def list_(as_json: bool) -> None:
    """List tokens by name, without their secrets."""
    from modelgrove_hub.verbs.tokens import list_tokens

    rows = ask(list_tokens)
    if as_json:
        print_json([row.model_dump() for row in rows])
        return
    print_table(
        ("name", "may", "state", "since", "until"),
        ((row.name, ", ".join(row.scopes), row.state, row.created_at, row.expires_at) for row in rows),
        empty="No tokens. Make one: modelgrove token create NAME",
    )


@token.command()
@click.argument("name")
def revoke(name: str) -> None:
    """Have a token be good no more, from now on."""
    from modelgrove_hub.verbs.tokens import revoke_token

    ask(revoke_token, name=name)
    say(f"Revoked {name}.")
