"""Watch the folders of sources: what changes there makes its source due at once.

The schedule looks anyway, so nothing depends on it: a system that cannot watch (network disks, limits of inotify) only
sees changes later.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from sqlmodel import col, select, update
from watchfiles import watch

from modelgrove_hub.errors import ModelgroveError
from modelgrove_hub.hub import Hub
from modelgrove_hub.ingest.offers import folder_of
from modelgrove_hub.tables import Source, now

LOG = logging.getLogger(__name__)
_QUIET_MS = 2000
"""Changes are told together once nothing changed for this long, or after twice as long."""
_LOOK_MS = 2000
"""How often it is asked whether other folders are to be watched."""
_SECONDS_AFTER_FAULT = 60.0


class Watcher:
    """Watches in a thread from `start` to `stop`."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def start(self) -> None:
        """Begin watching."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                folders = watched(self._hub)
                if folders:
                    self._watch(folders)
                else:
                    self._stop.wait(_LOOK_MS / 1000)
            except Exception as error:  # noqa: BLE001  (whatever keeps us from watching, the schedule looks)
                LOG.warning("folders are not watched now, the schedule looks: %s", error)
                self._stop.wait(_SECONDS_AFTER_FAULT)

    def _watch(self, folders: Mapping[int, Path]) -> None:
        """Until other folders are to be watched."""
        seen = watch(
            *folders.values(), stop_event=self._stop, debounce=2 * _QUIET_MS, step=_QUIET_MS, rust_timeout=_LOOK_MS,
            yield_on_timeout=True, raise_interrupt=False, ignore_permission_denied=True,
        )  # fmt: skip
        for changes in seen:
            places = {Path(path) for _, path in changes}
            make_due(self._hub, [key for key, top in folders.items() if any(one.is_relative_to(top) for one in places)])
            if watched(self._hub) != folders:
                return


def watched(hub: Hub) -> dict[int, Path]:
    """The folders that are to be watched, by the source's id; those that are not there are left out."""
    query = select(Source).where(Source.plugin == "source.folder", col(Source.paused).is_(False))
    with hub.reading() as session:
        sources = session.exec(query.where(col(Source.next_run).is_not(None))).all()
    folders = {}
    for source in sources:
        try:
            folder = folder_of(source.url).resolve()
        except ModelgroveError:
            continue
        if (source.params or {}).get("watch", True) and source.id is not None and folder.is_dir():
            folders[source.id] = folder
    return folders


def make_due(hub: Hub, sources: Iterable[int]) -> int:
    """Make sources run at the next tick. Returns how many were not due anyway."""
    later = (col(Source.id).in_(list(sources)), col(Source.next_run) > now())
    with hub.transaction() as session:
        return session.exec(update(Source).where(*later).values(next_run=now())).rowcount
