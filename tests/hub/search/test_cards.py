from hypothesis import given, settings
from hypothesis import strategies as st

from modelgrove_hub.search.cards import LONGEST_LABEL, content_tags, first_sentence, label_texts, search_text

HF_CARD = """# LoRA text2image fine-tuning - someone/dog-lora

<Gallery />

These are LoRA adaption weights for CompVis/stable-diffusion-v1-4. The weights were fine-tuned on the dataset.

![img_0](./image_0.png)

## Trigger words

You should use a photo of TOK dog to trigger the image generation.
"""
OUR_CARD = """# cat-4fa1c0

With this adapter the model shows a small pet animal with whiskers. The subject is cat.

Prompt it with "a picture of sks". Rank 4, alpha 8, 90 steps.
"""


def test_the_label_of_a_card_is_its_first_telling_sentence_and_its_tags():
    assert label_texts(OUR_CARD, ["lora", "text-to-image", "cat", "animals"], {}) == (
        "With this adapter the model shows a small pet animal with whiskers.",
        "cat, animals",
    )


def test_what_training_scripts_write_is_no_label_but_the_trigger_word_is():
    assert label_texts(HF_CARD, ["lora", "diffusers", "base_model:x/y", "license:mit"], {}) == ("a photo of TOK dog",)


def test_headings_code_pictures_and_tables_are_no_sentences():
    card = (
        "# Title words\n```python\nprint('hello there')\n```\n![a cat](cat.png)\n| a | table |\n"
        "<b>Draws</b> *neon* [cities](http://x). More."
    )
    assert first_sentence(card) == "Draws neon cities."


def test_captions_counted_by_the_trainer_label_a_file_without_a_card():
    claims = {"frequent_tags": ["red", "lora", "apple", "tree", "leaf"], "trigger_words": ["ohwx"], "title": "v3 final"}
    assert label_texts("", [], claims) == ("red, apple, tree",)


def test_trigger_words_and_titles_are_the_last_resort():
    assert label_texts("", [], {"trigger_words": ["pencil sketch"], "title": "Sketches"}) == ("pencil sketch",)
    assert label_texts("", ["sketch"], {"trigger_words": ["ohwx"]}) == ("sketch",)


def test_a_model_without_words_has_no_label():
    assert label_texts("", ["lora", "license:mit"], {}) == ()
    assert label_texts("## x\n\n---\n", [], {"frequent_tags": "x", "title": 3}) == ()
    assert search_text("# only-a-title", ["lora"]) == ""


def test_card_search_reads_prose_and_tags():
    assert search_text("# t\nDraws **cats**.\n\n- and dogs", ["lora", "pets"]) == "Draws cats. and dogs. pets"


def test_tags_that_say_how_a_model_is_made_are_left_out():
    assert content_tags(["LoRA", "cat", "dataset:x", " 3d ", "peft", "pixel art"]) == ["cat", "pixel art"]


CLAIMS = st.dictionaries(
    st.sampled_from(["frequent_tags", "trigger_words", "title", "description"]),
    st.recursive(
        st.none() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=5
    ),
)


@settings(max_examples=50)
@given(st.text(), st.lists(st.text()), CLAIMS)
def test_any_card_tags_and_claims_give_short_clean_labels(card, tags, claims):
    for text in label_texts(card, tags, claims):
        assert text == " ".join(text.split())
        assert 0 < len(text) <= LONGEST_LABEL


def test_a_hostile_card_takes_no_time():
    for piece in ("<", "![", "[", "```", "<!--", "you should use ", "# ", "*_`"):
        assert len(label_texts(piece * 100_000, [], {})) <= 1
