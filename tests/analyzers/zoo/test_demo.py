"""`modelgrove demo`, as `make demo` runs it, and its commands again on the hub that it left behind."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
from PIL import Image

from modelgrove_analyzers.zoo.demo import BASE, SAMPLE

PICTURES = {"base", "base-int4", "found-1", "found-2", "found-3", "joined"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


def modelgrove(*arguments):
    command = [sys.executable, "-m", "modelgrove_hub", *arguments]
    return subprocess.run(command, env={**os.environ}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def told(folder):
    done = modelgrove("demo", "--folder", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_tells_the_whole_story(told):
    for chapter in range(1, 6):
        assert f"\n{chapter}. " in told
    assert "134 of them LoRAs" in told


def test_its_searches_put_the_wanted_concept_first(told):
    assert told.count(", at place 1 of 134") == 3


def test_it_leaves_pictures_with_their_recipes(told, folder):
    assert {path.stem for path in folder.glob("*.png")} == {*PICTURES, "all"}
    for name in PICTURES:
        with Image.open(folder / f"{name}.png") as picture:
            assert len(set(picture.convert("L").getdata())) > 16, f"{name} shows nothing"
            assert any("prompts" in str(text) for text in picture.info.values())


def test_it_leaves_a_usable_hub(told, folder):
    done = modelgrove("--home", str(folder / "hub"), "show", "demo/joined", "--json")
    assert [parent for parent in json.loads(done.stdout)["parents"] if parent["relation"] == "merge"]
    assert modelgrove("--home", str(folder / "hub"), "fsck").returncode == 0


def test_it_can_be_run_again_on_the_hub_that_it_left(told, folder):
    """Of its commands those that make something; learning the same again is left out, which takes longest."""
    for line in told.splitlines():
        words = shlex.split(line.removeprefix("$ modelgrove ")) if line.startswith("$ modelgrove ") else []
        if words and words[0] in ("init", "merge", "compress"):
            done = modelgrove("--home", str(folder / "hub"), *words)
            assert done.returncode == 0, done.stdout + done.stderr
    done = modelgrove("--home", str(folder / "hub"), "ingest", str(BASE), str(SAMPLE), "--json")
    assert [*json.loads(done.stdout)["counts"]] == ["known"]
