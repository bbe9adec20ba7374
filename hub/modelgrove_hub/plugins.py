"""Finding plugins: entry points of the group `modelgrove.plugins`, each loaded behind a guard.

A plugin that does not load, lies about what it is or clashes with another one is listed with
the reason and never stops the others.
"""

from __future__ import annotations

import sys
import traceback
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from pydantic import ValidationError

from modelgrove_hub import contracts
from modelgrove_hub.contracts import Kind, Params, Plugin
from modelgrove_hub.entries import OWN, disabled, distribution_of
from modelgrove_hub.errors import NotFoundError, PluginError, UsageError
from modelgrove_hub.settings import Settings, settings

GROUP = "modelgrove.plugins"
_METHODS = {Kind.EMBEDDER: ("run", "embed"), Kind.SOURCE: ("offers", "fetch")}
"""What a plugin of a kind must have; others have `run`."""


class State(StrEnum):
    """Whether a plugin can be used, and if not, who keeps it from being used."""

    OK = "ok"
    BROKEN = "broken"
    DISABLED = "disabled"
    INCOMPATIBLE = "incompatible"


@dataclass(frozen=True)
class PluginState:
    """One installed plugin: what it is called, where it comes from and whether it works."""

    name: str
    kind: str
    state: State
    reason: str
    distribution: str
    plugin: type[Plugin] | None = None

    @property
    def full_name(self) -> str:
        """Kind and name, as the entry point and job rows write it: "compressor.rtn"."""
        return f"{self.kind}.{self.name}" if self.kind else self.name


def load_plugins(config: Settings | None = None) -> tuple[PluginState, ...]:
    """Every installed plugin with its state, sorted by full name. Never raises for a plugin's fault."""
    config = config or settings()
    return _load(config.plugins, config.distributions, config.safe_mode, tuple(sys.path))


def get_plugin(name: str, config: Settings | None = None) -> type[Plugin]:
    """The plugin called "kind.name", or "name" where that is unambiguous.

    Raises:
        NotFoundError: there is none; the message lists near names.
        UsageError: the short name fits several, or the plugin is disabled.
        PluginError: it is broken or incompatible.
    """
    state = find_plugin(name, config)
    if state.plugin is not None:
        return state.plugin
    message = f"plugin {state.full_name!r} of {state.distribution!r} is {state.state}: {state.reason}"
    raise UsageError(message) if state.state is State.DISABLED else PluginError(message)


def find_plugin(name: str, config: Settings | None = None) -> PluginState:
    """The state of the plugin called "kind.name" or "name", working or not.

    Raises:
        NotFoundError: there is none; the message lists near names.
        UsageError: the short name fits plugins of several kinds.
    """
    states = load_plugins(config)
    found = [state for state in states if name in (state.full_name, state.name)]
    if not found:
        raise NotFoundError(f"no plugin {name!r}; {_nearest(name, states)}")
    names = sorted({state.full_name for state in found})
    if len(names) > 1:
        raise UsageError(f"plugin {name!r} is ambiguous: say {' or '.join(names)}")
    return next((state for state in found if state.state is State.OK), found[0])


def check_params(plugin: type[Plugin], values: Mapping[str, Any]) -> Params:
    """`values` as the plugin's own `Params`.

    Raises:
        UsageError: a value does not fit; one line names each parameter, what is wrong and what was given.
        PluginError: the plugin's own validation failed.
    """
    try:
        return plugin.Params.model_validate(dict(values))
    except ValidationError as error:
        raise UsageError(f"{plugin.kind}.{plugin.name}: {_complaints(plugin, error)}") from error
    except Exception as error:  # a validator of a stranger may raise anything
        message = f"plugin {plugin.kind}.{plugin.name} cannot check its parameters: {type(error).__name__}: {error}"
        raise PluginError(message) from error


@cache
def _load(allowed: str, distributions: str, safe_mode: bool, _path: tuple[str, ...]) -> tuple[PluginState, ...]:
    # sys.path is a part of the key, so that a distribution on a new path is seen.
    config = Settings(plugins=allowed, distributions=distributions, safe_mode=safe_mode)
    wanted = frozenset(part.strip() for part in allowed.split(",") if part.strip())
    rivals: dict[str, list[EntryPoint]] = defaultdict(list)
    for entry in entry_points(group=GROUP):
        rivals[entry.name].append(entry)
    return tuple(
        _examine(entry, [distribution_of(rival) for rival in entries if rival is not entry], wanted, config)
        for _, entries in sorted(rivals.items())
        for entry in sorted(entries, key=distribution_of)
    )


def _examine(entry: EntryPoint, rivals: Sequence[str], wanted: frozenset[str], config: Settings) -> PluginState:
    kind, _, name = entry.name.rpartition(".")
    distribution = distribution_of(entry)

    def verdict(state: State, reason: str = "", plugin: type[Plugin] | None = None) -> PluginState:
        return PluginState(name, kind, state, reason, distribution, plugin)

    if reason := disabled(distribution, config):
        return verdict(State.DISABLED, reason)
    if wanted and not wanted & {entry.name, name}:
        return verdict(State.DISABLED, "not in the allow-list (setting `plugins`)")
    if distribution != OWN and OWN in rivals:
        return verdict(State.BROKEN, f"{entry.name} is one of modelgrove's own: choose another name")
    if distribution != OWN and rivals:
        return verdict(State.BROKEN, f"declared by {distribution} and by {', '.join(rivals)}: uninstall one of them")
    try:
        plugin = entry.load()
        spoken = getattr(plugin, "api", None)
        if type(spoken) is int and spoken != contracts.API:
            return verdict(State.INCOMPATIBLE, f"speaks contract {spoken}, this hub speaks {contracts.API}")
        fault = _fault(plugin, entry.name)
    except (Exception, SystemExit) as error:  # noqa: BLE001  (a stranger's module may do anything when imported)
        return verdict(State.BROKEN, _where(error))
    return verdict(State.BROKEN, fault) if fault else verdict(State.OK, plugin=cast("type[Plugin]", plugin))


def _fault(plugin: Any, entry_name: str) -> str:
    """What `plugin` lacks to be a plugin, or nothing."""
    if not isinstance(plugin, type):
        return f"is a {type(plugin).__name__}, not a class"
    if type(getattr(plugin, "api", None)) is not int:
        return f"`api` must be the integer {contracts.API}, not {getattr(plugin, 'api', None)!r}"
    for fact in ("name", "summary", "paper"):
        if not isinstance(getattr(plugin, fact, None), str):
            return f"`{fact}` must be text, not {getattr(plugin, fact, None)!r}"
    facts: Any = plugin
    if getattr(plugin, "kind", None) not in list(Kind):
        return f"`kind` must be one of {', '.join(Kind)}, not {getattr(plugin, 'kind', None)!r}"
    if entry_name != f"{Kind(facts.kind)}.{facts.name}":
        return f"the entry point is called {entry_name!r} but the class says {Kind(facts.kind)}.{facts.name}"
    params = getattr(plugin, "Params", None)
    if not (isinstance(params, type) and issubclass(params, Params)):
        return "`Params` must be a subclass of modelgrove_hub.contracts.Params"
    params.model_json_schema()  # what forms and options are made from; raises for a type that JSON lacks
    needed = _METHODS.get(facts.kind, ("run",))
    missing = [method for method in needed if not callable(getattr(plugin, method, None))]
    return f"has no method `{missing[0]}`" if missing else ""


def _where(error: BaseException) -> str:
    """The error and the place it came from, in one line."""
    message = " ".join(f"{type(error).__name__}: {error}".split())
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    return f"{message} ({frames[-1].filename}:{frames[-1].lineno})" if frames else message


def _nearest(name: str, states: Sequence[PluginState]) -> str:
    kind, _, short = name.rpartition(".")
    close = get_close_matches(short, {state.name for state in states}, n=3)
    near = {state.full_name for state in states if state.name in close}
    near = {full_name for full_name in near if full_name.startswith(f"{kind}.")} or near
    if near:
        return f"near: {', '.join(sorted(near))}"
    return f"there is: {', '.join(sorted({state.full_name for state in states})) or 'none'}"


def _complaints(plugin: type[Plugin], error: ValidationError) -> str:
    parts = []
    for fault in error.errors(include_url=False):
        place = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = ", ".join(plugin.Params.model_fields) or "no parameter"
            parts.append(f"no parameter {place!r}; there is: {known}")
        elif fault["type"] == "missing":
            parts.append(f"parameter {place!r} is needed")
        else:
            parts.append(f"{place or 'parameters'}: {fault['msg']}, got {fault['input']!r}")
    return "; ".join(parts)
