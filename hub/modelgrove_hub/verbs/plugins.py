"""Verbs of plugins: list and describe."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from modelgrove_hub.hub import Hub
from modelgrove_hub.plugins import get_plugin, load_plugins
from modelgrove_hub.verbs.facts import Facts
from modelgrove_hub.verbs.verb import verb


class PluginFacts(Facts):
    """An installed plugin."""

    name: str
    kind: str
    full_name: str
    """Kind and name, as jobs write it: "compressor.rtn"."""
    state: str
    """ok, broken, disabled or incompatible."""
    reason: str
    """Why it is not ok."""
    distribution: str
    summary: str


class PluginDetail(BaseModel):
    """A plugin that works, and its parameters."""

    name: str
    kind: str
    api: int
    summary: str
    paper: str
    params: dict[str, Any]
    """JSON schema of its parameters."""


@verb("GET", "/plugins")
def list_plugins(hub: Hub) -> list[PluginFacts]:
    """Installed plugins, the broken ones too."""
    return [
        PluginFacts(
            name=state.name, kind=state.kind, full_name=state.full_name, state=state.state, reason=state.reason,
            distribution=state.distribution, summary=state.plugin.summary if state.plugin else "",
        )
        for state in load_plugins(hub.settings)
    ]  # fmt: skip


@verb("GET", "/plugins/{plugin}")
def show_plugin(hub: Hub, *, plugin: str) -> PluginDetail:
    """What a plugin does, and the schema of its parameters.

    Raises:
        NotFoundError: there is none.
        UsageError: the short name fits several, or it is disabled.
        PluginError: it does not work.
    """
    found = get_plugin(plugin, hub.settings)
    return PluginDetail(
        name=found.name, kind=found.kind, api=found.api, summary=found.summary, paper=found.paper,
        params=found.Params.model_json_schema(),
    )  # fmt: skip
