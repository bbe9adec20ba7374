"""Verbs of tokens, on both databases."""

from datetime import timedelta

import pytest
from sqlmodel import select

from modelgrove_hub.errors import ConflictError, NotFoundError, UsageError
from modelgrove_hub.registry.events import list_events
from modelgrove_hub.tables import Token, now
from modelgrove_hub.verbs.tokens import NewToken, create_token, hash_of, list_tokens, revoke_token


def test_a_token_is_said_once_and_only_its_hash_is_kept(hub):
    made = create_token(hub, token=NewToken(name="alice", scope="write"))

    assert made.token.startswith("modelgrove_")
    assert len(bytes.fromhex(made.token.removeprefix("modelgrove_"))) * 8 == 256
    with hub.reading() as session:
        row = session.exec(select(Token)).one()
        assert row.hash == hash_of(made.token)
        assert made.token not in str(row.model_dump()) + str([one.detail for one in list_events(session, 9)])
    assert [(one.name, one.scopes, one.state) for one in list_tokens(hub)] == [("alice", ["write"], "good")]
    assert made.token != create_token(hub, token=NewToken(name="bob")).token


def test_a_name_is_free_again_when_its_token_is_revoked_or_has_expired(hub):
    create_token(hub, token=NewToken(name="alice"))
    with pytest.raises(ConflictError, match="revoke it first"):
        create_token(hub, token=NewToken(name="alice"))
    assert revoke_token(hub, name="alice").state == "revoked"
    create_token(hub, token=NewToken(name="alice", expires_at=now() + timedelta(days=1)))
    with hub.transaction() as session:
        session.exec(select(Token)).one().expires_at = now() - timedelta(seconds=1)
    assert [one.state for one in list_tokens(hub)] == ["expired"]
    create_token(hub, token=NewToken(name="alice"))
    assert [one.state for one in list_tokens(hub)] == ["good"]
    with hub.reading() as session:
        actions = [event.action for event in list_events(session, 9)]
    assert actions == ["token created"] * 2 + ["token revoked", "token created"]


def test_what_cannot_be_is_refused(hub):
    for name in ("", "a/b", "a b", "-x", "x" * 65, "a\n", "Anonymous"):
        with pytest.raises(UsageError):
            create_token(hub, token=NewToken(name=name))
    with pytest.raises(UsageError, match="is over already"):
        create_token(hub, token=NewToken(name="late", expires_at=now() - timedelta(seconds=1)))
    with pytest.raises(NotFoundError):
        revoke_token(hub, name="nobody")
    create_token(hub, token=NewToken(name="alice"))
    revoke_token(hub, name="alice")
    with pytest.raises(ConflictError):
        revoke_token(hub, name="alice")
