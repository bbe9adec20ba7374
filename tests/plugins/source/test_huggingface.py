"""The real client of Hugging Face against a real modelgrove server, with faults in between."""

from __future__ import annotations

import http.client
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import HfApi
from sqlmodel import select

from modelgrove_hub.errors import UsageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.ingest.pipeline import ingest
from modelgrove_hub.jobs.rows import get
from modelgrove_hub.jobs.run import run_job
from modelgrove_hub.registry.models import find, find_revision
from modelgrove_hub.settings import Settings
from modelgrove_hub.store.fsck import check
from modelgrove_hub.tables import Model
from modelgrove_hub.verbs.sources import NewSource, Run, add_source, create_run, show_source
from modelgrove_migrations.run import upgrade
from modelgrove_plugins.source.huggingface import HuggingFace, _read

CLI = [sys.executable, "-c", "from modelgrove_hub.cli.root import main; main()"]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another modelgrove: its hub, and the address that it serves at."""
    home = tmp_path_factory.mktemp("other")
    config = Settings(home=home)
    upgrade(config.database)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MODELGROVE_", "HF_"))}
    log = home / "serve.log"
    with log.open("w") as written:
        command = [*CLI, "--home", str(home), "serve", "--port", "0"]
        process = subprocess.Popen(command, stderr=written, env=environment)
    while not (found := re.search(r"at http://(\S+)\n", log.read_text())):
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    hub = Hub.open(config)
    yield hub, found[1].rstrip("/")
    process.terminate()
    process.wait()
    hub.engine.dispose()


@pytest.fixture
def between(other):
    """A proxy before the other hub. `faults` are what becomes of the next requests: a status, or "cut"."""
    _, address = other
    faults, asked = [], []

    class Proxy(BaseHTTPRequestHandler):
        def _pass(self):
            asked.append(f"{self.command} {self.path}")
            file = "/resolve/" in self.path and self.command == "GET"
            fault = faults.pop(0) if faults and (faults[0] != "cut" or file) else None
            if isinstance(fault, int):
                self.send_response(fault)
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            there = http.client.HTTPConnection(address)
            there.request(self.command, self.path, headers=dict(self.headers))
            answer = there.getresponse()
            body = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
            there.close()
            self.close_connection = True

        do_GET = do_HEAD = _pass  # noqa: N815

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"hf+http://127.0.0.1:{server.server_port}", faults, asked
    server.shutdown()
    server.server_close()


def publish(other, lora, folder, owner, **models):
    for name, seed in models.items():
        lora(folder / owner / f"{name}.safetensors", seed)
    assert {item.outcome for item in ingest(other[0], [folder], "reference")} <= {"new", "known"}


def names(hub):
    with hub.reading() as session:
        return sorted(session.exec(select(Model.name)))


def test_an_authors_models_come_through_every_fault_and_changes_follow(
    hub, add, run, lora, other, between, tmp_path
):  # fmt: skip
    address, faults, asked = between
    publish(other, lora, tmp_path / "there", "ann", cat=1, dog=2)
    publish(other, lora, tmp_path / "there", "bob", owl=3)
    add(f"{address}/ann")
    faults += [429, 503, "cut", "cut"]
    assert run() == {"new": 2}
    assert faults == []
    assert names(hub) == ["ann/cat", "ann/dog"]
    assert list(check(hub, full=True)) == []
    with hub.reading() as here, other[0].reading() as there:
        assert find_revision(here, "ann/cat").values_hash == find_revision(there, "ann/cat").values_hash

    asked.clear()
    assert run() == {"unchanged": 2}
    assert not [line for line in asked if "/resolve/" in line]

    publish(other, lora, tmp_path / "there", "ann", cat=4, eel=5)
    assert run() == {"changed": 1, "new": 1, "unchanged": 1}
    with hub.reading() as here, other[0].reading() as there:
        assert find_revision(here, "ann/cat").values_hash == find_revision(there, "ann/cat").values_hash
        assert find(here, "ann/eel").kind == "adapter"


def test_a_single_model(hub, add, run, lora, other, between, tmp_path):
    publish(other, lora, tmp_path / "there", "cem", fox=11, gnu=12)
    add(f"{between[0]}/cem/fox")
    assert run() == {"new": 1}
    assert names(hub) == ["cem/fox"]


def test_a_search(hub, add, run, lora, other, between, tmp_path):
    publish(other, lora, tmp_path / "there", "dot", zebra=21, yak=22)
    add(f"{between[0]}/search/zebra")
    assert run() == {"new": 1}
    assert names(hub) == ["dot/zebra"]


def test_what_changes_after_it_was_listed_is_fetched_as_listed(hub, add, run, lora, other, between, tmp_path):
    api = HfApi(endpoint=f"http://{other[1]}", token=False)
    api.create_repo("eve/ram")
    file = lora(tmp_path / "ram.safetensors", 31)
    before = file.read_bytes()
    api.upload_file(path_or_fileobj=file, path_in_repo=file.name, repo_id="eve/ram")
    params = HuggingFace.Params(url=f"{between[0]}/eve", local=True)
    [offer] = HuggingFace().offers(None, params)
    lora(file, 32)
    api.upload_file(path_or_fileobj=file, path_in_repo=file.name, repo_id="eve/ram")
    place = HuggingFace().fetch(None, offer, params, tmp_path / "fetched")
    assert (place / "ram.safetensors").read_bytes() == before
    assert file.read_bytes() != before


def test_a_hub_that_does_not_answer_takes_nothing_to_be_gone(hub, add, run, lora, other, between, tmp_path):
    publish(other, lora, tmp_path / "there", "fay", hen=41)
    address, faults, _ = between
    add(f"{address}/fay")
    run()
    faults += [500] * 40
    job = create_run(hub, "shelf", Run(dry_run=False, key=None))
    assert run_job(hub, job.id, "me") == "queued"  # and tried again later
    assert get(hub, job.id).error
    assert show_source(hub, name="shelf").gone == []


def test_over_the_network_another_hub_may_not_be_this_machine(hub, run, between):
    address, _, asked = between
    add_source(hub, source=NewSource(name="shelf", url=f"{address}/ann", plugin="", schedule=""))
    with pytest.raises(AssertionError, match="not public"):
        run()
    assert asked == []


@pytest.mark.parametrize("url", ["hf://", "hf://a/b/c", "ftp://a/b", "hf+https://host", "hf://collections/a"])
def test_an_address_that_names_nothing_is_refused(url):
    with pytest.raises(UsageError):
        _read(url)
