"""Any file name becomes a valid model name, and different contents never share one."""

from __future__ import annotations

import pytest
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st
from sqlmodel import Session

from modelgrove_hub.errors import UsageError
from modelgrove_hub.registry.names import check_name, clean_name, free_name


@given(st.text(max_size=130))
def test_any_text_becomes_a_valid_name(text: str) -> None:
    assert check_name(clean_name(text)) == clean_name(text)


@given(st.text(alphabet="aZ0._-/\\ é漢か🍎\udce9\x00", max_size=120))
def test_a_hugging_face_client_accepts_every_clean_name(text: str) -> None:
    validate_repo_id(clean_name(text).partition("/")[2])  # its limit of 96 is for the whole id


@given(st.text(max_size=130))
def test_a_clean_name_is_left_as_it_is(text: str) -> None:
    assert clean_name(clean_name(text)) == clean_name(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("red-apple", "local/red-apple"),
        ("runwayml/stable-diffusion-v1.5", "runwayml/stable-diffusion-v1.5"),
        ("deep/er/owner/name", "owner/name"),
        ("Crème brûlée (final) v2", "local/Creme-brulee-final-v2"),
        ("ｆｕｌｌ　ｗｉｄｔｈ", "local/full-width"),
        ("さくら", "local/sakura"),
        ("漢字", "local/6f22-5b57"),
        ("🍎", "local/red-apple"),
        ("Ærøskøbing", "local/aeroskobing"),
        ("../../etc/passwd", "etc/passwd"),
        ("a..b--c", "local/a.b-c"),
        ("-rf", "local/rf"),
        (".hidden", "local/hidden"),
        ("model.git", "local/model"),
        ("", "local/unnamed"),
        ("///...///", "local/unnamed"),
        ("\u202egpj.exe\u200b", "local/gpj.exe"),
    ],
)
def test_names_stay_readable(text: str, name: str) -> None:
    assert clean_name(text) == name


@pytest.mark.parametrize(
    "name", ["", "name", "a/b/c", "a/", "/b", "a/..", "a/b..c", "a/-b", "a/ü", "a/" + "b" * 97, "a/b\n"]
)
def test_an_invalid_name_is_refused_with_a_valid_one(name: str) -> None:
    with pytest.raises(UsageError, match=r"for example [a-z]+/"):
        check_name(name)


def test_a_free_name_is_given_as_wanted(session: Session) -> None:
    assert free_name(session, "zoo/apple", {"model.safetensors": "a" * 64}) == "zoo/apple"


def test_other_content_gets_a_suffix_and_keeps_it(session: Session, add) -> None:
    first, _, _ = add("zoo/apple", "1")
    files = {"model.safetensors": f"{2:064x}"}

    name = free_name(session, "zoo/apple", files)
    again = add(name, "2")[0].name

    assert free_name(session, "zoo/apple", {"model.safetensors": f"{1:064x}"}) == first.name
    assert name.startswith("zoo/apple-")
    assert free_name(session, "zoo/apple", files) == again == name


def test_a_long_name_leaves_room_for_its_suffix(session: Session, add) -> None:
    long = "zoo/" + "x" * 96
    add(long, "1")

    assert check_name(free_name(session, long, {"model.safetensors": f"{2:064x}"})) != long
