"""`modelgrove plugin new`: what it writes works as it is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from modelgrove_hub.errors import ConflictError, UsageError
from modelgrove_hub.scaffold import write_package


@pytest.mark.parametrize("kind", ["analyzer", "compressor", "merger"])
def test_a_new_package_passes_its_own_test(tmp_path, kind):
    package = write_package(f"my-{kind}", kind, tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(package), str(package)]
    done = subprocess.run(
        command, env={"PYTHONPATH": str(package), "PATH": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_an_existing_folder_is_left_alone(tmp_path):
    write_package("mine", "analyzer", tmp_path)
    with pytest.raises(ConflictError):
        write_package("mine", "analyzer", tmp_path)


@pytest.mark.parametrize("name", ["Bad", "two words", "../up", "", "9lives", "a--b"])
def test_odd_names_are_refused(tmp_path, name):
    with pytest.raises(UsageError, match="lower-case"):
        write_package(name, "analyzer", tmp_path)
