"""Commands say the same of a hub here and of the same hub over there: each is run both ways."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import modelgrove_analyzers.zoo
from modelgrove_hub.cli.root import main
from modelgrove_hub.hub import Hub
from modelgrove_hub.jobs.rows import list_jobs, new_owner
from modelgrove_hub.jobs.run import run_job
from modelgrove_hub.settings import Settings, settings
from modelgrove_migrations.run import upgrade

DATA = Path(modelgrove_analyzers.zoo.__file__).parent / "data"
CLI = [sys.executable, "-c", "from modelgrove_hub.cli.root import main; main()"]
CAT, WHALE, BASE = "local/cat-54a7d471", "local/whale-fe58a27e", "local/zoo-base"
HERE = {"basis", "db", "demo", "init", "serve", "sign", "up", "worker"}
ELSEWHERE = {
    "completion": "prints a script", "zoo": "makes pictures and models in folders", "token": "test_token.py has it",
    "source": "below",
    "expert": "below, as it takes a job", "ingest": "below, as it uploads", "export": "below, as it downloads",
    "compress": "below, as it makes a model", "preview": "below", "merge": "below", "mark": "below", "attack": "below",
    "verify": "below", "key": "below", "rm": "below", "analyze": "below", "diff": "below", "copies": "below",
    "tree": "below", "recipe": "below", "jobs": "below", "check-signature": "works on files of this machine",
}  # fmt: skip
SAME = [
    ["ls"], ["ls", "cat", "--json"], ["ls", "--kind", "checkpoint"], ["show", CAT], ["show", CAT, "--json"],
    ["show", CAT, "--provenance"], ["show", "nobody"], ["similar", CAT, "--limit", "2"], ["similar", "nobody"],
    ["search", "a whale", "--by", "card"], ["search", "x", "--rank", "many"],
    ["events", "--limit", "2"], ["events", "--head"], ["doctor"], ["plugin", "ls"],
    ["plugin", "show", "compressor.rtn", "--json"], ["plugin", "show", "nothing"], ["fsck"], ["gc", "--dry-run"],
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A hub with some LoRAs and their base."""
    home = tmp_path_factory.mktemp("remote") / "hub"
    upgrade(Settings(home=home).database)
    others = sorted(path for path in (DATA / "sample").iterdir() if (path / "README.md").exists())[::9]
    models = {DATA / "sample" / name.partition("/")[2] for name in (CAT, WHALE)} | set(others)
    run_in(home, "ingest", *map(str, sorted(models)), str(DATA / "zoo-base"))
    run_in(home, "expert", "embed")
    return home


@pytest.fixture(scope="module")
def url(home):
    process = subprocess.Popen(
        [*CLI, "--home", str(home), "serve", "--port", "0"], stderr=subprocess.PIPE, text=True, env=clean()
    )
    found = next(match[0] for line in process.stderr if (match := re.search(r"http://\S+", line)))
    yield found
    process.terminate()
    process.wait(20)
    process.stderr.close()


@pytest.fixture
def both(home, url, tmp_path):
    """Run a command here and over there: both answers."""

    def both(*arguments):
        here = run_in(home, *arguments, check=False)
        there = run_in(tmp_path / "nothing", "--hub", url, *arguments, check=False)
        return here, there

    return both


@pytest.fixture
def over_there(home, url):
    """Run a command over there; jobs that it makes are run by a worker of this test."""
    stop = threading.Event()

    def work():
        hub = Hub.open(Settings(home=home))
        while not stop.wait(0.05):
            for job in list_jobs(hub, state="queued"):
                run_job(hub, job.id, new_owner())
        hub.engine.dispose()

    worker = threading.Thread(target=work)
    worker.start()
    # The worker reads secrets of keys in the home that is set.
    yield lambda *arguments: run_in(home, "--hub", url, *arguments).stdout
    stop.set()
    worker.join()


@dataclass
class Done:
    """What a command said, and its exit code."""

    stdout: str
    stderr: str
    returncode: int


def clean():
    return {name: value for name, value in os.environ.items() if not name.startswith(("MODELGROVE_", "HF_"))}


def run_in(home, *arguments, check=True):
    """The command, in this process: starting Python takes longer than most commands."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name in ("MODELGROVE_HUB", "MODELGROVE_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setenv("MODELGROVE_HOME", str(home))
        patch.setattr(sys, "argv", ["modelgrove", "--home", str(home), *arguments])
        settings.cache_clear()
        try:
            main()
        except SystemExit as end:
            code = end.code
        patch.setenv("MODELGROVE_HUB", "")
    os.environ.pop("MODELGROVE_HUB", None)
    done = Done(out.getvalue(), err.getvalue(), int(code or 0))
    assert not check or done.returncode == 0, done.stderr
    return done


def test_every_command_has_its_case():
    names = {entry.name for entry in entry_points(group="modelgrove.commands") if entry.dist.name == "modelgrove"}
    covered = {case[0] for case in SAME} | HERE | ELSEWHERE.keys()
    assert names - covered == set()


@pytest.mark.parametrize("command", SAME, ids=" ".join)
def test_a_command_says_the_same_here_and_there(both, command):
    here, there = both(*command)

    assert there.returncode == here.returncode, there.stderr
    assert there.stdout == here.stdout
    assert there.stderr.replace("error: ", "") == here.stderr.replace("error: ", "")


@pytest.mark.parametrize("command", sorted(HERE))
def test_what_is_about_this_machine_is_refused_in_one_line(url, tmp_path, command):
    done = run_in(tmp_path, "--hub", url, command, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: `modelgrove {command}` works on this machine")
    assert len(done.stderr.splitlines()) == 1


def test_nobody_at_the_url_is_one_line(tmp_path):
    done = run_in(tmp_path, "--hub", "http://127.0.0.1:9", "ls", check=False)
    assert done.returncode == 7
    assert len(done.stderr.splitlines()) == 1


def test_work_is_done_over_there_and_what_it_left_comes_here(over_there, both, tmp_path):
    assert over_there("compress", BASE, "--bits", "4", "--wait").strip() == "local/zoo-base-rtn"
    assert "is an int4 copy of" in over_there("diff", BASE, "zoo-base-rtn")
    plan = json.loads(over_there("compress", BASE, "--dry-run", "--json"))
    assert plan["method"] == "rtn"
    joined = over_there("merge", CAT, WHALE, "--method", "sum", "--name", "me/joined", "--wait")
    assert joined.strip() == "me/joined"
    here, there = both("recipe", "me/joined")
    assert here.stdout == there.stdout != ""
    assert "interfere" not in over_there("merge", CAT, WHALE, "--plan", "--wait")
    over_there("copies")
    assert "local/zoo-base-rtn" in over_there("tree", BASE)
    assert json.loads(over_there("analyze", CAT, WHALE, "--wait"))["models"] == 2
    jobs = json.loads(both("jobs", "ls", "--json")[1].stdout)
    assert {job["state"] for job in jobs} == {"done"}
    shown, told = both("jobs", "show", jobs[0]["id"])
    assert shown.stdout == told.stdout
    over_there("export", "me/joined", str(tmp_path / "out"))
    assert any(file.suffix == ".safetensors" for file in (tmp_path / "out").iterdir())
    over_there("rm", "me/joined")
    assert both("show", "me/joined")[1].returncode == 3


def test_pictures_are_painted_over_there_and_come_here(over_there, tmp_path):
    out = tmp_path / "cat.png"
    over_there("preview", BASE, "--prompt", "a cat", "--images", "1", "--steps", "1", "--out", str(out))
    assert out.read_bytes().startswith(b"\x89PNG")


def test_sources_are_kept_over_there(over_there, both, tmp_path):
    (tmp_path / "drop").mkdir()
    over_there("source", "add", "drop", str(tmp_path / "drop"))
    here, there = both("source", "ls")
    assert here.stdout == there.stdout
    assert "drop" in there.stdout
    over_there("source", "rm", "drop")


def test_marks_are_made_and_found_with_keys_that_stay_over_there(over_there, home):
    facts = json.loads(over_there("key", "new", "ours", "--json"))
    assert Path(facts["secret_file"]).is_relative_to(home)
    over_there("mark", CAT, "--key", "ours", "--name", "me/marked", "--wait")
    assert "verified" in over_there("verify", "me/marked", "--key", "ours", "--wait")


def test_experts_are_fitted_over_there(over_there, both):
    over_there("expert", "fit", "--tree", "zoo", "--no-ask", "--wait")
    here, there = both("expert", "ls")
    assert here.stdout == there.stdout
    assert "gram-ridge" in there.stdout


def test_models_of_this_machine_are_uploaded_and_not_twice(url, home, tmp_path):
    def upload(path):
        command = [*CLI, "--home", str(tmp_path / "nothing"), "--hub", url, "ingest", str(path)]
        return subprocess.run(command, capture_output=True, text=True, env=clean(), check=False)

    shutil.copytree(DATA / "sample/tree-4e9edf1d", tmp_path / "you/tree")
    assert upload(tmp_path / "you").stdout.split() == ["new", "local/tree", "adapter", "lora", "zoo"]
    assert upload(tmp_path / "you").stdout.split() == ["known", "local/tree", "adapter", "lora", "zoo"]
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    refused = upload(tmp_path / "broken.safetensors")
    assert refused.returncode == 5
    assert "too short for a safetensors file" in refused.stdout
    assert "broken" not in run_in(home, "ls").stdout
