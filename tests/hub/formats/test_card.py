from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelgrove_hub.formats.card import Card, read_card


def card(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_card({"README.md": path})


def test_front_matter_and_text_are_parted(tmp_path):
    text = "---\nlicense: mit\nbase_model: me/base\ntags: [ink, sketch]\n---\n# Ink\nDraws in ink.\n"
    assert card(tmp_path, text) == Card("# Ink\nDraws in ink.", "mit", "me/base", ("ink", "sketch"))


def test_the_first_of_several_bases_counts(tmp_path):
    assert card(tmp_path, "---\nbase_model: [a/b, c/d]\n---\n").base == "a/b"


def test_windows_line_ends_are_understood(tmp_path):
    assert card(tmp_path, "---\r\nlicense: mit\r\n---\r\ntext").licence == "mit"


@pytest.mark.parametrize("text", ["---\n: : :\n  - [\n---\nx", "---\njust text\n---\nx", "---\nnever closed", ""])
def test_broken_front_matter_is_text(tmp_path, text):
    assert card(tmp_path, text) == Card(text.strip())


def test_a_python_object_in_yaml_is_not_made(tmp_path):
    text = "---\nlicense: !!python/object/apply:os.system ['touch owned']\n---\n"
    assert card(tmp_path, text).licence is None
    assert not (tmp_path / "owned").exists()


def test_tags_that_refer_to_each_other_do_not_explode(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    assert card(tmp_path, "---\n" + "\n".join(lines) + "\ntags: *a39\n---\n").tags == ()


def test_no_card_is_an_empty_card():
    assert read_card({}) == Card()


@given(st.binary(max_size=300))
def test_any_bytes_give_a_card(tmp_path_factory, data):
    assert isinstance(card(tmp_path_factory.mktemp("card"), b"---\n" + data), Card)


def test_the_prompt_that_a_lora_was_trained_with_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("---\ninstance_prompt: a photo of sks dog\n---\n# A dog\n", "utf-8")
    assert read_card({"README.md": tmp_path / "README.md"}).prompt == "a photo of sks dog"
    (tmp_path / "README.md").write_text("---\ninstance_prompt: [1, 2]\n---\n", "utf-8")
    assert read_card({"README.md": tmp_path / "README.md"}).prompt == "1"
    (tmp_path / "README.md").write_text("---\ninstance_prompt: null\n---\n", "utf-8")
    assert read_card({"README.md": tmp_path / "README.md"}).prompt is None
