"""Entry points of installed distributions: which of them may be imported, in every group that modelgrove reads."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelgrove_hub.settings import Settings

OWN = "modelgrove"


def distribution_of(entry: EntryPoint) -> str:
    """The name of the distribution that declares it."""
    return entry.dist.name if entry.dist else "unknown"


def disabled(distribution: str, config: Settings) -> str:
    """Why nothing of this distribution may be imported, or an empty text. Ours always may."""
    if distribution == OWN:
        return ""
    if config.safe_mode:
        return "safe mode loads modelgrove's own plugins only"
    allowed = {_plain(part) for part in config.distributions.split(",") if part.strip()}
    if allowed and _plain(distribution) not in allowed:
        return f"distribution {distribution!r} is not in the allow-list (setting `distributions`)"
    return ""


def usable(group: str, config: Settings | None = None) -> dict[str, EntryPoint]:
    """A group's entry points by name: those that may be imported. No stranger takes a name of ours.

    The settings are only read where a stranger is installed.
    """
    found = list(entry_points(group=group))
    ours = {entry.name: entry for entry in found if distribution_of(entry) == OWN}
    strangers = [entry for entry in found if distribution_of(entry) != OWN]
    if strangers and config is None:
        from modelgrove_hub.settings import settings  # the command line starts without

        config = settings()
    allowed = {entry.name: entry for entry in strangers if config and not disabled(distribution_of(entry), config)}
    return allowed | ours


def _plain(name: str) -> str:
    """A distribution's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
