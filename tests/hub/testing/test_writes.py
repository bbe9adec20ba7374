"""Writes outside of one folder are noticed, whatever call makes them."""

import os
import shutil

import pytest

from modelgrove_hub.testing.writes import watch_writes


@pytest.fixture
def places(tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    (tmp_path / "old").write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


CALLS = {
    "open": lambda: open("new", "w").close(),  # noqa: PTH123
    "append": lambda: open("old", "a").close(),  # noqa: PTH123
    "os.open": lambda: os.close(os.open("new", os.O_CREAT | os.O_WRONLY)),
    "mkdir": lambda: os.mkdir("new"),  # noqa: PTH102
    "remove": lambda: os.remove("old"),  # noqa: PTH107
    "move out": lambda: shutil.move("old", "inside/old"),
    "link": lambda: os.symlink("old", "new"),  # noqa: PTH211
}


@pytest.mark.parametrize("call", CALLS)
def test_a_change_outside_is_noticed(call, places):
    with watch_writes(places / "inside") as outside:
        CALLS[call]()
    assert outside


def test_changes_inside_and_reading_anywhere_are_not(places):
    with watch_writes(places / "inside") as outside:
        (places / "inside/new").write_text("x")
        (places / "inside/new").unlink()
        (places / "old").read_text()
    assert outside == []


def test_nothing_is_noticed_after_the_block(places):
    with watch_writes(places / "inside") as outside:
        pass
    (places / "new").write_text("x")
    assert outside == []
