"""Models are added once, found by what people type, listed by filters, and removed whole."""

from __future__ import annotations

import hashlib

import pytest
from sqlmodel import Session, select

from modelgrove_hub.errors import ConflictError, DataError, NotFoundError, UsageError
from modelgrove_hub.registry.lineage import add_edge
from modelgrove_hub.registry.models import (
    digest_of,
    files_of,
    find,
    find_revision,
    latest_revision,
    list_models,
    remove,
)
from modelgrove_hub.tables import (
    Blob,
    Edge,
    Embedding,
    Event,
    Job,
    JobState,
    Model,
    Relation,
    Report,
    Revision,
    RevisionFile,
)


def test_a_digest_is_the_hash_of_sorted_lines() -> None:
    files = {"b": "2" * 64, "a": "1" * 64}
    expected = hashlib.sha256(f"a\0{'1' * 64}\nb\0{'2' * 64}\n".encode()).hexdigest()

    assert digest_of(files) == expected


def test_a_new_model_has_its_revision_and_files(session: Session, add) -> None:
    model, revision, created = add("zoo/apple", "1", tags=["fruit"], summary={"rank": [4]})

    assert created
    assert latest_revision(session, model) == revision
    assert {name: revision.summary[name] for name in ("rank", "trust")} == {"rank": [4], "trust": "ok"}
    assert files_of(session, revision) == [
        {"path": "model.safetensors", "size": 7, "sha256": f"{1:064x}", "place": None}
    ]


def test_a_file_may_have_a_manifest(session: Session, add) -> None:
    session.add(Blob(sha256="e" * 64, size=1))
    add("zoo/apple", manifests={"model.safetensors": "e" * 64})

    assert session.exec(select(RevisionFile.manifest)).one() == "e" * 64


def test_the_same_content_gives_the_same_revision(session: Session, add) -> None:
    _, first, _ = add("zoo/apple", "1")
    _, second, created = add("zoo/apple", "1")

    assert not created
    assert second.id == first.id


def test_other_content_is_a_new_revision_of_the_same_model(session: Session, add) -> None:
    model, first, _ = add("zoo/apple", "1")
    same, second, created = add("zoo/apple", "2")

    assert created
    assert same.id == model.id
    assert latest_revision(session, model).id == second.id != first.id


def test_what_a_person_corrected_survives_and_empty_fields_are_filled(session: Session, add) -> None:
    model, _, _ = add("zoo/apple", "1", family="unknown")
    model.card, model.tags = "Written by hand.", ["mine"]
    session.flush()

    add("zoo/apple", "2", card="From the file", tags=["theirs"], licence="mit", family="sd1")

    session.refresh(model)
    assert (model.card, model.tags, model.licence, model.family) == ("Written by hand.", ["mine"], "mit", "sd1")


def test_trust_follows_the_newest_content(session: Session, add) -> None:
    model, _, _ = add("zoo/apple", "1", trust="quarantined")
    add("zoo/apple", "1", trust="ok")  # the same bytes do not become better
    assert model.trust == "quarantined"

    add("zoo/apple", "2", trust="ok")
    assert model.trust == "ok"


@pytest.mark.parametrize("path", ["/etc/passwd", "a/../b", "", "a//b", "x" * 1025, "\udce9.safetensors", "a\0b"])
def test_a_path_that_leads_elsewhere_or_cannot_be_kept_is_refused(session: Session, add, path: str) -> None:
    with pytest.raises(DataError, match="file "):
        add("zoo/apple", files={path: "0" * 64})
    assert session.exec(select(Model)).all() == []


def test_hostile_text_is_kept_without_what_databases_refuse(session: Session, add) -> None:
    model, _, _ = add("zoo/apple", card="a\0b\ud800", licence="\0", tags=["\udfff"], summary={"x": "\0\ud800"})
    session.flush()
    session.refresh(model)

    assert (model.card, model.licence, model.tags) == ("ab?", "", ["?"])


def test_an_invalid_name_is_refused(add) -> None:
    with pytest.raises(UsageError, match="owner/name"):
        add("no owner")


def test_a_model_is_found_by_name_short_name_and_id(session: Session, add) -> None:
    model, revision, _ = add("zoo/apple", "1")

    for ref in ("zoo/apple", "apple", f"#{model.id}", str(model.id), model.id, f"apple@{revision.digest[:4].upper()}"):
        assert find(session, ref).name == "zoo/apple", ref


def test_a_name_of_digits_is_found_when_no_id_is_meant(session: Session, add) -> None:
    add("zoo/987654321", "1")

    assert find(session, "987654321").name == "zoo/987654321"


def test_a_reference_without_revision_means_the_latest(session: Session, add) -> None:
    _, first, _ = add("zoo/apple", "1")
    _, second, _ = add("zoo/apple", "2")

    assert find_revision(session, "apple").id == second.id
    assert find_revision(session, f"apple@{first.digest[:12]}").id == first.id


def test_a_short_name_of_several_models_lists_them(session: Session, add) -> None:
    add("zoo/apple", "1")
    add("farm/apple", "2")

    with pytest.raises(UsageError, match="farm/apple, zoo/apple"):
        find(session, "apple")


def test_wildcards_of_the_database_are_plain_characters(session: Session, add) -> None:
    add("zoo/apple", "1")

    for ref in ("appl_", "%", "Apple"):
        with pytest.raises(NotFoundError):
            find(session, ref)


def test_an_unknown_name_offers_near_ones(session: Session, add) -> None:
    add("zoo/apple", "1")

    with pytest.raises(NotFoundError, match="did you mean zoo/apple"):
        find(session, "zoo/aple")
    with pytest.raises(NotFoundError, match="did you mean zoo/apple"):
        find(session, "appel")
    with pytest.raises(NotFoundError, match="modelgrove ls"):
        find(session, "quite-something-else")


def test_an_empty_hub_says_how_to_fill_it(session: Session) -> None:
    with pytest.raises(NotFoundError, match="modelgrove ingest"):
        find(session, "apple")


def test_an_unknown_revision_lists_the_known_ones(session: Session, add) -> None:
    _, revision, _ = add("zoo/apple", "1")

    with pytest.raises(NotFoundError, match=revision.digest[:12]):
        find(session, "apple@0123456789")


def test_filters_narrow_the_list_and_newest_come_first(session: Session, add) -> None:
    add("zoo/apple", "1", tags=["fruit", 'a"b'], licence="mit", declared_base="zoo/base")
    add("zoo/pear", "2", tags=["fruit"], family="sdxl")
    add("zoo/base", "3", kind="checkpoint", adapter_type=None, trust="quarantined")

    def names(**filters: object) -> list[str]:
        return [model.name for model in list_models(session, **filters)]

    assert names() == ["zoo/base", "zoo/pear", "zoo/apple"]
    assert names(kind="checkpoint") == names(trust="quarantined") == ["zoo/base"]
    assert names(family="sdxl") == ["zoo/pear"]
    assert names(adapter_type="lora", licence="mit") == names(base="zoo/base") == ["zoo/apple"]
    assert names(tag="fruit") == ["zoo/pear", "zoo/apple"]
    assert names(tag='a"b') == ["zoo/apple"]
    assert names(tag="frui") == names(tag='", "') == []
    assert names(text="APP") == ["zoo/apple"]
    assert names(text="%") == []


def test_pages_follow_each_other(session: Session, add) -> None:
    for number in range(1, 6):
        add(f"zoo/m{number}", f"{number}")

    first = list_models(session, limit=2)
    second = list_models(session, limit=2, after=first[-1].id)

    assert [model.name for model in first + second] == ["zoo/m5", "zoo/m4", "zoo/m3", "zoo/m2"]


def test_removing_a_model_takes_all_that_hangs_on_it(session: Session, add) -> None:
    base, base_revision, _ = add("zoo/base", "1")
    child, revision, _ = add("zoo/child", "2")
    child.inferred_parent_id = base.id
    add_edge(session, revision, base_revision, Relation.FINETUNE)
    session.add(Embedding(revision_id=base_revision.id, side="card", text_space="t", vector=b""))
    session.add(Report(revision_id=base_revision.id, analyzer="a", version="1", params_hash="0"))
    session.flush()

    assert remove(session, "zoo/base") == "zoo/base"

    for table in (Edge, Embedding, Report):
        assert session.exec(select(table)).all() == []
    assert [model.name for model in session.exec(select(Model))] == ["zoo/child"]
    assert session.get(Model, child.id).inferred_parent_id is None
    assert len(session.exec(select(Blob)).all()) == 2  # bytes are gc's to take
    assert session.exec(select(Event).where(Event.action == "removed")).one().subject == "zoo/base"


def test_removing_one_revision_leaves_the_others(session: Session, add) -> None:
    _, first, _ = add("zoo/apple", "1")
    _, second, _ = add("zoo/apple", "2")

    remove(session, f"apple@{first.digest}")
    assert [revision.id for revision in session.exec(select(Revision))] == [second.id]

    remove(session, f"apple@{second.digest}")
    assert session.exec(select(Model)).all() == []


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING])
def test_a_model_that_a_job_needs_is_not_removed(session: Session, add, state: JobState) -> None:
    _, revision, _ = add("zoo/apple", "1")
    session.add(Job(id="j1", plugin="compressor.rtn", inputs=[revision.id], state=state, idempotency_key="k"))
    session.flush()

    with pytest.raises(ConflictError, match="modelgrove jobs cancel j1"):
        remove(session, "apple")


def test_a_model_of_a_finished_job_is_removed(session: Session, add) -> None:
    _, revision, _ = add("zoo/apple", "1")
    session.add(Job(id="j1", plugin="p", inputs=[revision.id], state=JobState.DONE, idempotency_key="k"))
    session.flush()

    remove(session, "apple")


def test_a_model_without_revision_points_to_fsck(session: Session) -> None:
    session.add(model := Model(name="zoo/empty"))
    session.flush()

    with pytest.raises(DataError, match="modelgrove fsck"):
        latest_revision(session, model)
