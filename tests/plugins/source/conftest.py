"""A hub that fills itself from real files and servers."""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save_file

from modelgrove_hub.hub import Hub
from modelgrove_hub.jobs.run import run_local
from modelgrove_hub.settings import Settings
from modelgrove_hub.verbs.sources import NewSource, Run, create_run, create_source
from modelgrove_migrations.run import upgrade


@pytest.fixture
def hub(tmp_path):
    opened = Hub.open(Settings(home=tmp_path / "hub"))
    upgrade(opened.settings.database)
    yield opened
    opened.engine.dispose()


@pytest.fixture
def lora():
    """Write a LoRA of the zoo's base."""

    def write(path, seed=0):
        stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"{stem}.lora_A.weight": torch.randn(4, 160, generator=generator),
            f"{stem}.lora_B.weight": torch.randn(160, 4, generator=generator),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
        return path

    return write


@pytest.fixture
def run(hub):
    """Run a source here and now; its report without what is only shown."""

    def run(name="shelf", dry_run=False):
        job = run_local(hub, create_run(hub, name, Run(dry_run=dry_run, key=None)).id)
        assert job.state == "done", job.error
        report = dict(job.outputs["report"])
        return {what: number for what, number in report.items() if type(number) is int}

    return run


@pytest.fixture
def add(hub):
    def add(url, name="shelf", **params):
        return create_source(hub, NewSource(name=name, url=str(url), plugin="", schedule="", params=params), local=True)

    return add


@pytest.fixture
def served(tmp_path):
    """A folder on a real web server that lists its files; what was asked for is in `asked`."""
    folder = tmp_path / "www"
    folder.mkdir()
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(f"{self.command} {self.path}")

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}/", asked
    server.shutdown()
    server.server_close()
