"""The README's first screen is real: its commands run in their order, and say what it shows."""

import contextlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import modelgrove_analyzers.zoo
from modelgrove_hub.cli.root import modelgrove

ROOT = Path(__file__).parents[2]
DATA = Path(modelgrove_analyzers.zoo.__file__).parent / "data"
BLOCK = re.search(r"```console\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)


def steps():
    """Each command with the lines that the README shows below it."""
    assert BLOCK
    found = []
    for line in BLOCK.group(1).splitlines():
        if line.startswith("$ "):
            found.append((line[2:].split("  #")[0].strip(), []))
        else:
            found[-1][1].append(line)
    return found


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each command said, in a home folder with the sample and the base in ~/loras."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(DATA / "sample", home / "loras")
    shutil.copytree(DATA / "zoo-base", home / "loras/zoo-base")
    said = {}
    # In this process: test_demo.py starts real ones, and imports take longer than most commands.
    runner = CliRunner(env={"MODELGROVE_HOME": str(home / "hub"), "COLUMNS": "120"})
    with contextlib.chdir(home):
        for command, _ in steps():
            words = shlex.split(command.replace("~", str(home)))
            done = runner.invoke(modelgrove, words[1:], catch_exceptions=False)
            assert done.exit_code == 0, f"{command}: {done.stderr}"
            said[command] = done.stdout
    yield said
    assert (home / "joined.png").exists()


def test_every_command_runs_and_says_what_is_shown(answers):
    shown = 0
    for command, lines in steps():
        for line in lines:
            # Scores move in their last digits from one processor to the next.
            words = [word for word in line.split() if not re.fullmatch(r"\d+\.\d+", word) and word != "?"]
            answer = answers[command].split()
            assert all(word in answer for word in words), f"{command} said {answers[command]!r}, not {line!r}"
            shown += 1
    assert shown > 4


def test_the_first_hit_is_the_one_shown(answers):
    (command,) = (command for command in answers if command.startswith("modelgrove search"))
    first = next(line for line in answers[command].splitlines() if line.startswith("1 "))
    assert "untitled-d52d91dc" in first
