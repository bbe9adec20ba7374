"""Keys of marks: their commitments, and where their secrets lie."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import timedelta

import pytest

from modelgrove_hub.errors import ConflictError, DataError, NotFoundError, UsageError
from modelgrove_hub.keys import find_key, key_id, list_keys, new_key, read_secret, registered_at, secret_file
from modelgrove_hub.tables import now


@pytest.fixture
def make(hub):
    def make(name, bits=128):
        with hub.transaction() as session:
            return new_key(session, hub.settings, name, bits)

    return make


def test_a_key_is_the_hash_of_its_secret_and_was_committed_now(hub, make):
    key = make("mine", 64)
    secret = bytes.fromhex(secret_file(hub.settings, key.id).read_text().strip())
    assert len(secret) == 32
    assert key.id == key_id(secret) == hashlib.sha256(b"modelgrove key 1\0" + secret).hexdigest()
    assert (key.name, key.bits) == ("mine", 64)
    assert now() - key.committed_at < timedelta(minutes=1)
    assert read_secret(hub.settings, key) == secret
    with hub.reading() as session:
        assert list_keys(session) == [key]


def test_two_keys_have_nothing_in_common(make):
    assert make("one").id != make("two").id


def test_keys_are_found_by_name_and_by_the_beginning_of_their_commitment(hub, make):
    keys = [make("one"), make("two")]
    with hub.reading() as session:
        for key in keys:
            assert find_key(session, key.name) == key
            assert find_key(session, key.id[:12]) == key
            assert find_key(session, key.id.upper()) == key
        with pytest.raises(NotFoundError, match="there is one, two"):
            find_key(session, "three")


@pytest.mark.parametrize("name", ["", "  ", "deadbeef"])
def test_names_that_would_be_mistaken_are_refused(make, name):
    with pytest.raises(UsageError, match="cannot be called"):
        make(name)


def test_a_name_is_given_once(hub, make):
    make("mine")
    with pytest.raises(ConflictError, match="is called 'mine' already"):
        make("mine")
    assert len(list(secret_file(hub.settings, "x").parent.iterdir())) == 1


def test_a_secret_that_is_elsewhere_or_another_one_is_said(hub, make):
    key = make("mine")
    place = secret_file(hub.settings, key.id)
    for text, message in (("00" * 32, "another secret"), ("no digits", "hexadecimal")):
        place.write_text(text)
        with pytest.raises(DataError, match=message):
            read_secret(hub.settings, key)
    place.unlink()
    with pytest.raises(NotFoundError, match="belongs into"):
        read_secret(hub.settings, key)
    with pytest.raises(NotFoundError, match="secret of key other"):
        read_secret(hub.settings, replace(key, name="other"))


def test_when_a_revision_was_first_registered(hub, register):
    revision = register("a/model")
    with hub.reading() as session:
        assert registered_at(session, revision.id) == revision.created_at
        assert registered_at(session, 999) is None


def test_the_same_content_under_another_name_is_as_old_as_the_first(hub, register):
    """Or a model would become younger than a key by being registered again."""
    first, again, other = register("a/model"), register("b/copy"), register("c/other", fill=2.0)
    with hub.transaction() as session:
        for revision in (first, again, other):
            revision.values_hash = "v" * 64 if revision is not other else "w" * 64
            session.add(revision)
    with hub.reading() as session:
        assert registered_at(session, again.id) == first.created_at < again.created_at
        assert registered_at(session, other.id) == other.created_at
