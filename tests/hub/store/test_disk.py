from __future__ import annotations

import os
from pathlib import Path

import pytest

from modelgrove_hub.errors import DataError, NotFoundError, StorageError
from modelgrove_hub.store.disk import create_temporary, make_folder, open_regular, publish, storage_errors


def test_a_regular_file_is_opened(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"content")

    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"content"


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(DataError, match="pipe: not a regular file"):
        open_regular(tmp_path / "pipe")


def test_a_folder_and_a_device_are_refused(tmp_path: Path):
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(DataError, match="not a regular file"):
            open_regular(path)


def test_a_missing_file_and_a_link_in_a_circle_are_told_apart(tmp_path: Path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")

    with pytest.raises(NotFoundError, match="no such file"):
        open_regular(tmp_path / "missing")
    with pytest.raises(StorageError, match="circle"):
        open_regular(tmp_path / "circle")


def test_a_published_file_replaces_the_old_one_at_once(tmp_path: Path):
    target = tmp_path / "new" / "folder" / "file"
    for content in (b"first", b"second"):
        file, temporary = create_temporary(tmp_path)
        file.write(content)
        assert temporary.name.startswith(".")
        publish(file, temporary, target)

        assert target.read_bytes() == content
        assert not temporary.exists()


def test_two_makers_of_one_folder_do_not_disturb_each_other(tmp_path: Path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")

    assert (tmp_path / "a" / "b").is_dir()


def test_an_os_error_names_its_subject():
    with pytest.raises(StorageError, match="the subject: No space left"), storage_errors("the subject"):
        raise OSError(28, "No space left on device")
