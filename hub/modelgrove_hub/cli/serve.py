"""`modelgrove serve`: the web page, the REST API and the Hugging Face API of this hub."""

from __future__ import annotations

import ipaddress

import click

from modelgrove_hub.cli.output import say
from modelgrove_hub.cli.place import only_here
from modelgrove_hub.cli.work import open_hub

PORT = 8765


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0 takes a free one.")
def serve(host: str, port: int) -> None:
    """Serve this hub over HTTP until stopped: web page, REST API, and what Hugging Face clients ask for.

    On loopback everybody who reaches it may do everything; on any other address it demands tokens.
    """
    only_here("`modelgrove serve`")
    from modelgrove_hub.api.app import create_app
    from modelgrove_hub.api.server import run

    hub = open_hub()
    open_to_all = is_loopback(host)
    if open_to_all:
        say("Open to everybody on this machine, without tokens.")
    else:
        say("Demands tokens: make one with `modelgrove token create NAME --scope read`.")
    run(create_app(hub, open_to_all=open_to_all), host, port, lambda url: say(f"Serving {hub.settings.home} at {url}"))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
