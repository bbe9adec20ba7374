"""Web servers and file systems as sources."""

from __future__ import annotations

import os

import fsspec
import pytest
from sqlmodel import select

from modelgrove_hub.errors import UsageError
from modelgrove_hub.store.fsck import check
from modelgrove_hub.tables import Model
from modelgrove_hub.verbs.sources import NewSource, add_source


def names(hub):
    with hub.reading() as session:
        return sorted(session.exec(select(Model.name)))


def test_the_files_that_a_page_lists_are_fetched_once(hub, add, run, lora, served):
    folder, url, asked = served
    lora(folder / "cat one.safetensors")
    (folder / "notes.txt").write_text("no weights")
    add(url)
    assert run() == {"new": 1}
    assert names(hub) == ["local/cat-one"]
    assert list(check(hub, full=True)) == []
    asked.clear()
    assert run() == {"unchanged": 1}
    assert not [line for line in asked if line.startswith("GET") and line != "GET /"]
    lora(folder / "cat one.safetensors", 1)
    os.utime(folder / "cat one.safetensors", (1, 1))
    assert run() == {"changed": 1}
    assert names(hub) == ["local/cat-one"]
    assert list(hub.settings.incoming.glob("source-*")) == []


def test_a_single_file_is_an_address_too(hub, add, run, lora, served):
    folder, url, _ = served
    lora(folder / "cat.safetensors")
    lora(folder / "dog.safetensors", 1)
    add(f"{url}cat.safetensors")
    assert run() == {"new": 1}
    assert names(hub) == ["local/cat"]


def test_one_that_is_not_sent_stops_nothing_and_is_tried_again(hub, add, run, lora, served):
    folder, url, _ = served
    lora(folder / "cat.safetensors")
    (folder / "dog.safetensors").write_bytes(b"x" * 100)
    add(url, max_bytes=10_000)
    assert run() == {"new": 1, "refused": 1}
    assert run() == {"unchanged": 1, "refused before": 1}


def test_a_file_system_of_fsspec(hub, add, run, lora, tmp_path):
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/me/cat.safetensors", lora(tmp_path / "cat.safetensors").read_bytes())
    add("memory://bucket")
    assert run() == {"new": 1}
    assert names(hub) == ["me/cat"]
    assert run() == {"unchanged": 1}
    system.pipe("/bucket/me/cat.safetensors", lora(tmp_path / "cat.safetensors", 1).read_bytes())
    assert run() == {"changed": 1}
    system.rm("/bucket/me/cat.safetensors")
    system.pipe("/bucket/me/dog.safetensors", lora(tmp_path / "dog.safetensors", 2).read_bytes())
    assert run() == {"new": 1, "gone": 1}
    assert names(hub) == ["me/cat", "me/dog"]
    assert list(check(hub)) == []


def test_what_was_added_over_the_network_may_not_look_at_this_machine(hub, run, lora, served):
    folder, url, asked = served
    lora(folder / "cat.safetensors")
    add_source(hub, source=NewSource(name="shelf", url=url, plugin="", schedule=""))
    with pytest.raises(AssertionError, match=r"127\.0\.0\.1.*not public"):
        run()
    assert asked == []


def test_nobody_calls_a_source_local_from_afar(hub, served):
    _, url, _ = served
    with pytest.raises(UsageError, match="local is not an option"):
        add_source(hub, source=NewSource(name="a", url=url, plugin="", schedule="", params={"local": True}))
