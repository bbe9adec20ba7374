"""A folder as a source: what changes on disk is seen, and nothing else is read."""

from __future__ import annotations

import os

import pytest
from sqlmodel import select

from modelgrove_hub.errors import UsageError
from modelgrove_hub.registry.models import files_of, find, find_revision, remove
from modelgrove_hub.store.fsck import check
from modelgrove_hub.tables import Model
from modelgrove_hub.verbs.sources import show_source


def names(hub):
    with hub.reading() as session:
        return sorted(session.exec(select(Model.name)))


def place(hub, name):
    with hub.reading() as session:
        [file] = files_of(session, find_revision(session, name))
        return file["place"]


def test_what_is_new_is_taken_in_and_the_rest_is_not_read(hub, add, run, lora, tmp_path, monkeypatch):
    lora(tmp_path / "in/me/cat.safetensors")
    add(tmp_path / "in")
    assert run(dry_run=True) == {"new": 1}
    assert names(hub) == []
    assert run() == {"new": 1}
    assert names(hub) == ["me/cat"]
    monkeypatch.setattr("modelgrove_hub.ingest.prepare.prepare", lambda found: pytest.fail(f"{found.root} was read"))
    assert run() == {"unchanged": 1}
    lora(tmp_path / "in/me/dog.safetensors", 1)
    monkeypatch.undo()
    assert run() == {"new": 1, "unchanged": 1}


def test_a_moved_and_renamed_file_is_the_same_model_and_is_not_read(hub, add, run, lora, tmp_path, monkeypatch):
    file = lora(tmp_path / "in/me/cat.safetensors")
    add(tmp_path / "in")
    run()
    (tmp_path / "in/you").mkdir()
    file.rename(tmp_path / "in/you/tiger.safetensors")
    monkeypatch.setattr("modelgrove_hub.ingest.prepare.prepare", lambda found: pytest.fail(f"{found.root} was read"))
    assert run(dry_run=True) == {"moved": 1}
    assert run() == {"moved": 1}
    assert names(hub) == ["me/cat"]
    assert place(hub, "me/cat") == str(tmp_path / "in/you/tiger.safetensors")
    assert list(check(hub)) == []
    assert run() == {"unchanged": 1}


def test_a_file_that_was_copied_elsewhere_and_deleted_is_recognised_by_its_hash(hub, add, run, lora, tmp_path):
    file = lora(tmp_path / "in/me/cat.safetensors")
    add(tmp_path / "in")
    run()
    (tmp_path / "in/me/copy.safetensors").write_bytes(file.read_bytes())
    file.unlink()
    assert run() == {"moved": 1}
    assert place(hub, "me/cat") == str(tmp_path / "in/me/copy.safetensors")
    assert run() == {"unchanged": 1}


def test_a_copy_beside_its_original_is_a_model_of_its_own(hub, add, run, lora, tmp_path):
    file = lora(tmp_path / "in/me/cat.safetensors")
    add(tmp_path / "in")
    run()
    (tmp_path / "in/me/copy.safetensors").write_bytes(file.read_bytes())
    assert run() == {"new": 1, "unchanged": 1}
    assert names(hub) == ["me/cat", "me/copy"]


def test_a_deleted_file_leaves_its_model_and_comes_back(hub, add, run, lora, tmp_path):
    file = lora(tmp_path / "in/me/cat.safetensors")
    add(tmp_path / "in")
    run()
    file.rename(tmp_path / "away")
    assert run() == {"gone": 1}
    assert run() == {}
    assert names(hub) == ["me/cat"]
    [lost] = show_source(hub, name="shelf").gone
    assert lost.key == "me/cat.safetensors"
    [finding] = check(hub)
    assert finding.level == "warning"
    assert "gone since" in finding.problem

    (tmp_path / "away").rename(file)
    assert run() == {"back": 1}
    assert show_source(hub, name="shelf").gone == []
    assert list(check(hub)) == []


def test_changed_content_is_the_models_next_revision(hub, add, run, lora, tmp_path):
    file = lora(tmp_path / "in/me/cat.safetensors")
    add(tmp_path / "in")
    run()
    with hub.reading() as session:
        before = find_revision(session, "me/cat").digest
    lora(file, 1)
    assert run() == {"changed": 1}
    with hub.reading() as session:
        assert find_revision(session, "me/cat").digest != before
    assert names(hub) == ["me/cat"]


def test_what_a_person_corrected_or_removed_stays_so(hub, add, run, lora, tmp_path):
    file, other = lora(tmp_path / "in/me/cat.safetensors"), lora(tmp_path / "in/me/dog.safetensors", 1)
    card = tmp_path / "in/me/cat.md"
    card.write_text("---\nlicense: mit\nbase_model: a/b\ntags: [cat]\n---\nA cat.\n")
    add(tmp_path / "in")
    run()
    facts = {"licence": "cc0-1.0", "declared_base": "c/d", "tags": ["tiger"], "card": "Mine.", "kind": "component",
             "family": "other", "adapter_type": "loha"}  # fmt: skip
    with hub.transaction() as session:
        model = find(session, "me/cat")
        for field, value in facts.items():
            setattr(model, field, value)
        remove(session, "me/dog")
    card.write_text("---\nlicense: apache-2.0\nbase_model: e/f\ntags: [kitten]\n---\nAnother cat.\n")
    lora(file, 2)
    assert run() == {"changed": 1, "unchanged": 1}
    with hub.reading() as session:
        model = find(session, "me/cat")
        assert {field: getattr(model, field) for field in facts} == facts
    lora(other, 3)
    run()
    assert names(hub) == ["me/cat", "me/dog"]


def test_what_is_refused_is_told_once_and_stops_nothing(hub, add, run, lora, tmp_path):
    lora(tmp_path / "in/b.safetensors")
    (tmp_path / "in/a.safetensors").write_bytes(b"no weights at all")
    os.mkfifo(tmp_path / "in/c.safetensors")
    add(tmp_path / "in")
    assert run() == {"new": 1, "refused": 2}
    assert run() == {"refused before": 2, "unchanged": 1}
    detail = show_source(hub, name="shelf")
    assert [item.key for item in detail.refused] == ["a.safetensors", "c.safetensors"]
    assert detail.models == 1
    (tmp_path / "in/a.safetensors").unlink()
    lora(tmp_path / "in/a.safetensors", 4)
    assert run() == {"new": 1, "refused before": 1, "unchanged": 1}


def test_filters_leave_out_and_limits_take_the_rest_later(hub, add, run, lora, tmp_path):
    for number in range(4):
        lora(tmp_path / f"in/me/cat{number}.safetensors", number)
    lora(tmp_path / "in/you/dog.safetensors", 9)
    add(tmp_path / "in", include="me/*", exclude="*cat3*", max_models=2)
    assert run() == {"left for the next run": 1, "left out by exclude": 1, "left out by include": 1, "new": 2}
    assert run() == {"left out by exclude": 1, "left out by include": 1, "new": 1, "unchanged": 2}


def test_a_folder_that_is_not_there_loses_no_model(hub, add, run, lora, tmp_path):
    lora(tmp_path / "in/cat.safetensors")
    add(tmp_path / "in")
    run()
    (tmp_path / "in").rename(tmp_path / "unmounted")
    with pytest.raises(AssertionError, match="is its disk mounted"):
        _ = run_once(hub)
    assert show_source(hub, name="shelf").gone == []


def run_once(hub):
    from modelgrove_hub.jobs.rows import get
    from modelgrove_hub.jobs.run import run_job
    from modelgrove_hub.verbs.sources import Run, create_run

    job = create_run(hub, "shelf", Run(dry_run=False, key=None))
    run_job(hub, job.id, "me")
    raise AssertionError(get(hub, job.id).error)


@pytest.mark.parametrize("url", ["relative/folder", "file://relative"])
def test_an_address_that_is_no_folder_is_refused(hub, add, run, url):
    add(url)
    with pytest.raises(AssertionError, match="absolute path"):
        run()


def test_what_was_ingested_by_hand_is_the_same_model(hub, add, run, lora, tmp_path):
    from modelgrove_hub.ingest.pipeline import ingest

    lora(tmp_path / "in/me/cat.safetensors")
    [_] = ingest(hub, [tmp_path / "in"], "reference")
    add(tmp_path / "in")
    run()
    assert names(hub) == ["me/cat"]


def test_options_that_no_plugin_has_are_refused(add, tmp_path):
    with pytest.raises(UsageError, match="no parameter 'colour'"):
        add(tmp_path, colour="red")
