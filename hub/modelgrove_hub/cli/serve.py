"""`modelgrove serve`: the web page, the REST API and the Hugging Face API of this hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from modelgrove_hub.cli.output import say
from modelgrove_hub.cli.work import open_hub

if TYPE_CHECKING:
    from modelgrove_hub.api.server import Place
    from modelgrove_hub.settings import Settings

PORT = 8765
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
Command = TypeVar("Command", bound=Callable[..., Any])
_FILE = click.Path(dir_okay=False)


def place_options(command: Command) -> Command:
    """The options of a command that serves: where, and how."""
    for option in (
        click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True,
                     help="Processes that answer; each holds the search index in memory."),
        click.option("--tls-key", type=_FILE, help="Its private key, where that is in another file."),
        click.option("--tls-cert", type=_FILE, help="Certificate chain (PEM): serve HTTPS."),
        click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True,
                     help="0 takes a free one."),
        click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@place_options
def serve(**options: Any) -> None:
    """Serve this hub over HTTP until stopped: web page, REST API, and what Hugging Face clients ask for.

    On loopback everybody who reaches it may do everything; on any other address it demands tokens.
    """
    for name in _THREADS:
        os.environ.setdefault(name, "1")  # requests run side by side already; read when numpy and torch are imported
    from modelgrove_hub.api import server

    hub = open_hub()
    place = place_of(**options)
    with server.listen(place) as listener:
        say_where(hub.settings, place, place.url(listener))
        server.serve(hub, place, listener)


def place_of(*, host: str, port: int, tls_cert: str | None, tls_key: str | None, workers: int) -> Place:
    """Where to serve, from the options.

    Raises:
        UsageError: a key without a certificate.
    """
    from modelgrove_hub.api.server import Place
    from modelgrove_hub.errors import UsageError

    if tls_key and not tls_cert:
        raise UsageError("--tls-key needs --tls-cert")
    return Place(host, port, tls_cert, tls_key, workers)


def say_where(config: Settings, place: Place, url: str) -> None:
    """Say where it is, and who may do what there."""
    if place.is_open(config):
        say("Open to everybody on this machine, without tokens.")
    else:
        say("Demands tokens: make one with `modelgrove token create NAME --scope read`.")
    say(f"Serving {config.home} at {url}")
