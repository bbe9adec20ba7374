"""Branches, tags and commits: what `main` names is what the hub shows."""

from __future__ import annotations

import pytest
from sqlmodel import select

from modelgrove_hub.errors import ConflictError, NotFoundError, UsageError
from modelgrove_hub.registry.commits import (
    MAIN,
    Said,
    check_ref_name,
    commit,
    drop_ref,
    find_commit,
    head,
    history,
    latest_revisions,
    point,
    refs_of,
)  # fmt: skip
from modelgrove_hub.registry.models import find_revision, latest_revision, remove
from modelgrove_hub.tables import Ref, RefKind, Revision


def other_content(session, model, number):
    revision = Revision(model_id=model.id, digest=f"{number:064x}")
    session.add(revision)
    session.flush()
    return revision


def test_what_is_registered_is_the_head_of_main(session, add):
    model, first, _ = add("a/x", "1")
    _, second, _ = add("a/x", "2")

    newest = head(session, model)
    assert [one.revision_id for one in history(session, newest)] == [second.id, first.id]
    assert latest_revision(session, model).id == second.id
    assert [one.title for one in history(session, newest)] == ["Next version", "First version"]


def test_registering_the_same_again_is_no_commit_and_earlier_content_is_one(session, add):
    model, first, _ = add("a/x", "1")
    add("a/x", "1")
    assert len(list(history(session, head(session, model)))) == 1
    add("a/x", "2")
    add("a/x", "1")

    assert latest_revision(session, model).id == first.id
    assert len(list(history(session, head(session, model)))) == 3


def test_another_branch_is_not_what_the_hub_shows(session, add):
    model, first, _ = add("a/x", "1")
    made = commit(session, model, other_content(session, model, 5), Said("try", author="me", branch="dev/one"))

    assert made.parent_id is None
    assert latest_revision(session, model).id == first.id
    assert set(session.exec(latest_revisions().where(Ref.model_id == model.id))) == {first.id}
    assert find_revision(session, "a/x@dev/one").digest == f"{5:064x}"


def test_a_revision_is_found_by_branch_tag_commit_and_digest(session, add):
    model, first, _ = add("a/x", "1")
    _, second, _ = add("a/x", "2")
    start = list(history(session, head(session, model)))[-1]
    point(session, model, RefKind.TAG, "v1.0", start)

    for name in ("v1.0", start.id, start.id[:7], first.digest[:12], "refs/tags/v1.0"):
        assert find_commit(session, model, name).revision_id == first.id
    assert find_revision(session, f"a/x@{MAIN}").id == second.id
    with pytest.raises(NotFoundError, match=r"no revision 'v2': it has main, v1\.0"):
        find_commit(session, model, "v2")


def test_refs_can_go_but_not_main(session, add):
    model, *_ = add("a/x", "1")
    point(session, model, RefKind.TAG, "v1", head(session, model))
    assert [ref.name for ref in refs_of(session, model)] == [MAIN, "v1"]
    drop_ref(session, model, RefKind.TAG, "v1")
    assert [ref.name for ref in refs_of(session, model)] == [MAIN]
    with pytest.raises(ConflictError):
        drop_ref(session, model, RefKind.BRANCH, MAIN)
    with pytest.raises(NotFoundError):
        drop_ref(session, model, RefKind.TAG, "v1")


@pytest.mark.parametrize("name", ["", "-x", "a..b", "a/", "x.lock", "a b", "a\nb", "@{x", "a" * 251, "0" * 40])
def test_names_that_git_or_a_client_would_misread_are_refused(name):
    with pytest.raises(UsageError):
        check_ref_name(name)


def test_removing_a_revision_leaves_its_branch_to_the_one_before(session, add):
    model, first, _ = add("a/x", "1")
    _, second, _ = add("a/x", "2")
    _, third, _ = add("a/x", "3")
    remove(session, f"a/x@{second.digest}")
    assert [one.revision_id for one in history(session, head(session, model))] == [third.id, first.id]
    remove(session, f"a/x@{third.digest}")
    assert latest_revision(session, model).id == first.id


def test_main_moves_on_when_its_first_revision_goes(session, add):
    model, first, _ = add("a/x", "1")
    other = other_content(session, model, 5)
    commit(session, model, other, Said("try", branch="dev"))
    remove(session, f"a/x@{first.digest}")
    assert latest_revision(session, model).id == other.id
    assert session.exec(select(Revision.id).where(Revision.model_id == model.id)).all() == [other.id]
