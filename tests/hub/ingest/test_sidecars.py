"""What other programs wrote beside a weight file."""

from __future__ import annotations

import json

import pytest

from modelgrove_hub.formats.card import Card
from modelgrove_hub.ingest.pipeline import ingest
from modelgrove_hub.ingest.sidecars import add_sidecars
from modelgrove_hub.registry.models import find, find_revision


@pytest.mark.parametrize(
    ("ending", "content"),
    [
        (".civitai.info", {"description": "<p>A <b>cat</b> &amp; more</p>", "trainedWords": ["ohwx", "cat"],
                           "model": {"tags": ["animal", "cat"], "name": "Cat"}}),
        (".cm-info.json", {"ModelDescription": "A  cat  & more", "TrainedWords": ["ohwx", "cat"],
                           "Tags": ["animal", "cat"]}),
        (".metadata.json", {"modelDescription": "A  cat  & more", "tags": ["animal", "cat"],
                            "civitai": {"trainedWords": ["ohwx", "cat"]}}),
    ],
)  # fmt: skip
def test_the_facts_of_a_side_car_fill_an_empty_card(home, lora, tmp_path, ending, content):
    lora(tmp_path / "in/cat.safetensors")
    (tmp_path / f"in/cat{ending}").write_text(json.dumps(content))
    [item] = ingest(home, [tmp_path / "in"], "reference")
    assert item.outcome == "new"
    with home.reading() as session:
        model = find(session, "cat")
        assert (model.tags, " ".join(model.card.split())) == (["animal", "cat"], "A cat & more")
        name = f"cat{ending}"
        assert find_revision(session, "cat").summary["sidecars"] == {"text": name, "tags": name, "prompt": name}


def test_a_card_says_more_than_a_side_car(tmp_path):
    (tmp_path / "cat.civitai.info").write_text(json.dumps({"description": "theirs", "tags": ["theirs"]}))
    card, origin = add_sidecars(Card(text="mine"), {"cat.civitai.info": tmp_path / "cat.civitai.info"})
    assert (card.text, card.tags, origin) == ("mine", ("theirs",), {"tags": "cat.civitai.info"})


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"nonsense", b"\xff\xfe", b"[" * 500_000,
     b'{"tags": {"a": 1}, "description": 7, "trainedWords": [[]]}',
     b'{"description": "' + b"x" * (1 << 20) + b'"}'],
)  # fmt: skip
def test_a_broken_or_huge_side_car_says_nothing(tmp_path, content):
    (tmp_path / "cat.civitai.info").write_bytes(content)
    assert add_sidecars(Card(), {"cat.civitai.info": tmp_path / "cat.civitai.info"}) == (Card(), {})
