"""Pickles are converted when that is wished; what one of the three gates does not call clean stays where it is."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load, load_file

from modelgrove_hub.cli.ingest import ingest
from modelgrove_hub.errors import UnsafeFileError
from modelgrove_hub.formats.plain_pickles import check_plain
from modelgrove_hub.hub import Hub
from modelgrove_hub.ingest import unpickling
from modelgrove_hub.registry.attestations import attestations_of, subjects_of
from modelgrove_hub.registry.inputs import load_input
from modelgrove_hub.registry.lineage import parents
from modelgrove_hub.registry.models import find, find_revision, list_models
from modelgrove_hub.store.fsck import check
from modelgrove_hub.store.gc import find_leftovers
from modelgrove_hub.tables import AttestationKind


@pytest.fixture(scope="module", autouse=True)
def rehearsed() -> None:
    """What the process does before it reads anything."""
    unpickling.rehearse()


def attempt(data: bytes) -> tuple[dict, bytes]:
    target = io.BytesIO()
    return unpickling.attempt(io.BytesIO(data), target, len(data)), target.getvalue()


def test_plain_weights_of_all_kinds_come_out_as_they_are(pickled: ModuleType):
    for name, data, wanted in pickled.benign():
        report, written = attempt(data)
        assert report.get("refused") is None, name
        found = load(written)
        assert found.keys() == wanted.keys(), name
        for key, value in wanted.items():
            assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape)
            assert found[key].tolist() == value.tolist(), (name, key)


def test_nothing_hostile_is_converted_and_nothing_is_run(pickled: ModuleType):
    cases = list(pickled.hostile())
    said = {name: attempt(data) for name, data in cases}
    assert len(said) == len(cases) > 120
    assert [name for name, (report, _) in said.items() if "refused" not in report] == []
    assert [name for name, (_, written) in said.items() if written] == []
    assert not pickled.was_run()
    assert "os.mkdir" in said["zip-os.mkdir.pt"][0]["refused"]
    assert "STACK_GLOBAL" in said["stack-global.pt"][0]["refused"]


@pytest.mark.parametrize("gate", ["our scan", "picklescan", "weights_only"])
def test_each_gate_alone_refuses_a_call(gate: str, pickled: ModuleType, monkeypatch: pytest.MonkeyPatch):
    if gate != "our scan":
        monkeypatch.setattr(unpickling, "check_plain", lambda *_: None)
    if gate != "picklescan":
        monkeypatch.setattr(unpickling, "check_with_picklescan", lambda _: None)
    data = pickled.in_zip(pickled.call("os.mkdir", pickled.OWNED))
    assert {"our scan": "imports", "picklescan": "picklescan", "weights_only": "weights_only"}[gate] in attempt(data)[
        0
    ]["refused"]
    assert not pickled.was_run()


def test_a_later_protocol_is_refused_with_its_number(pickled: ModuleType):
    assert "protocol 4" in attempt(pickled.saved(pickled.state(), pickle_protocol=4))[0]["refused"]


def test_what_is_left_out_and_what_is_tied_is_told(pickled: ModuleType):
    shared = torch.ones(3)
    report, _ = attempt(pickled.saved({"state_dict": {"a": shared, "b": shared, "note": "x"}, "epoch": 3}))
    assert report == {"tensors": 2, "left_out": ["epoch", "note"], "tied": ["b = a"]}


def run(*options: str) -> list[dict]:
    done = CliRunner().invoke(ingest, [*options, "--json"])
    assert done.exception is None, done.exception
    return json.loads(done.stdout)["models"]


def test_a_folder_is_converted_on_wish_and_the_new_model_knows_its_pickle(
    own_hub: Hub, pickled: ModuleType, tmp_path: Path
):
    folder = tmp_path / "in"
    (folder / "pipe/unet").mkdir(parents=True)
    (folder / "pipe/model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "X"]}'
    )
    (folder / "pipe/unet/config.json").write_text("{}")
    (folder / "pipe/unet/diffusion_pytorch_model.bin").write_bytes(pickled.saved(pickled.state()))
    (folder / "bad.pt").write_bytes(pickled.in_zip(pickled.call("os.mkdir", pickled.OWNED)))

    assert {item["outcome"] for item in run(str(folder))} == {"new"}  # not without being told
    first = run(str(folder), "--convert-pickles")
    assert {(item["outcome"], item["name"], item["trust"]) for item in first} == {
        ("known", "local/bad", "quarantined"), ("unconverted", "local/bad", ""),
        ("known", "local/pipe", "quarantined"), ("converted", "local/pipe-safetensors", "ok"),
    }  # fmt: skip
    assert [item["outcome"] for item in run(str(folder), "--convert-pickles")].count("converted") == 0

    with own_hub.reading() as session:
        bad, revision = find(session, "bad"), find_revision(session, "pipe-safetensors")
        assert bad.trust == "quarantined"
        assert any(
            "os.mkdir" in reason and "not converted" in reason
            for reason in find_revision(session, "bad").summary["reasons"]
        )
        [link] = [link for link in parents(session, revision) if link.model.name == "local/pipe"]
        [sha256] = link.edge.evidence["pickles"].values()
        [document] = attestations_of(session, revision.id, AttestationKind.PROVENANCE)
    assert sha256 == hashlib.sha256((folder / "pipe/unet/diffusion_pytorch_model.bin").read_bytes()).hexdigest()
    assert sha256 in own_hub.store.path(document).read_text()
    model = load_input(own_hub, revision.id)
    assert set(subjects_of(own_hub.store.path(document).read_bytes())) == set(model.files())
    weights = load_file(model.files()["unet/diffusion_pytorch_model.safetensors"])
    assert {name: value.tolist() for name, value in weights.items()} == {
        name: value.tolist() for name, value in pickled.state().items()
    }
    assert [finding for finding in check(own_hub) if finding.level == "error"] == []
    assert list((own_hub.settings.home / "tmp").iterdir()) == []
    assert not pickled.was_run()


def test_code_beside_the_weights_keeps_them_in_quarantine(own_hub: Hub, pickled: ModuleType, tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/config.json").write_text('{"auto_map": {"AutoModel": "modeling.Model"}}')
    (tmp_path / "in/modeling.py").write_text("raise SystemExit")
    (tmp_path / "in/pytorch_model.bin").write_bytes(pickled.saved(pickled.state()))

    assert [item["outcome"] for item in run(str(tmp_path / "in"), "--convert-pickles")] == ["new", "unconverted"]
    with own_hub.reading() as session:
        assert [model.trust for model in list_models(session)] == ["quarantined"]


def test_kill_9_leaves_no_model_no_process_and_nothing_that_gc_does_not_see(
    own_hub: Hub, pickled: ModuleType, tmp_path: Path
):
    (tmp_path / "weights.pt").write_bytes(pickled.saved(pickled.state()))
    program = "from modelgrove_hub.cli.root import main; main()"
    ingesting = subprocess.Popen(
        [sys.executable, "-c", program, "ingest", str(tmp_path / "weights.pt"), "--convert-pickles"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while not children and ingesting.poll() is None and time.monotonic() < deadline:
        children = psutil.Process(ingesting.pid).children()
    assert children
    ingesting.kill()
    ingesting.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []

    with own_hub.reading() as session:
        assert [model.name for model in list_models(session)] == ["local/weights"]
    left = list((own_hub.settings.home / "tmp").iterdir())
    object.__setattr__(own_hub.settings, "gc_grace_seconds", 0.0)
    assert find_leftovers(own_hub) == left


TRIED = {
    "write a file": "open('made', 'w')",
    "read a file": "open('/etc/passwd')",
    "a socket": "__import__('_socket').socket()",
    "another process": "os.fork()",
    "a program": "os.execv('/bin/true', ['true'])",
    "remove a file": "os.unlink('kept')",
    "a folder": "os.mkdir('made')",
    "rename": "os.rename('kept', 'made')",
    "a signal": "os.kill(os.getppid(), 0)",
    "much memory": "bytearray(2**31)",
    "a large file": "kept.write(bytes(2**20)), kept.flush()",
}


@pytest.mark.parametrize("what", TRIED)
def test_a_confined_process_can_compute_and_use_what_is_open_only(what: str, tmp_path: Path):
    (tmp_path / "kept").write_bytes(b"")
    program = f"""
        import os, signal, _socket
        from modelgrove_hub.ingest.confined import confine
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        kept = open("kept", "wb")
        confine(2**28, 60, 2**16)
        bytearray(2**20), kept.write(b"x"), kept.flush()
        try:
            {TRIED[what]}
        except (OSError, MemoryError) as error:
            os._exit(7)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, check=False)
    assert done.returncode == 7
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_confined_process_is_stopped_when_its_time_is_over(tmp_path: Path):
    program = "from modelgrove_hub.ingest.confined import confine\nconfine(2**28, 1, 0)\nwhile True: pass"
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode in (-signal.SIGXCPU, -signal.SIGKILL)


def test_a_place_beyond_what_files_can_have_is_a_damaged_archive(pickled: ModuleType):
    far = dict(pickled.abusing())["far.pt"]
    with pytest.raises(UnsafeFileError, match="damaged"):
        check_plain(io.BytesIO(far), len(far), "far.pt")
