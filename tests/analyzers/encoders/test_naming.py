from dataclasses import replace

import pytest
import torch
from zoo_models import BASE, DATA, HELD_OUT, KNOWN, WORDS, lesson, updates

from modelgrove_analyzers.encoders.denoiser import open_denoiser
from modelgrove_analyzers.encoders.expert_file import Saved
from modelgrove_analyzers.encoders.gram_ridge import GramOptions, GramRidge
from modelgrove_analyzers.encoders.naming import Naming, learn_naming
from modelgrove_hub.search.text import embed_texts
from modelgrove_hub.testing import FolderModel, LocalContext


@pytest.fixture(scope="module")
def naming(background):
    return learn_naming(open_denoiser(BASE), lesson(KNOWN, background))


@pytest.fixture(scope="module")
def shapes(naming, background):
    return {name: update.shape for name, update in lesson(KNOWN[:20], background).updates.items()}


def test_the_base_names_what_no_training_model_showed(naming, shapes):
    """Chance is one in forty; none of these words is a label."""
    named = [WORDS[i] for i in naming.scores(updates(HELD_OUT, shapes)).argmax(1)]
    right = sum(word == row["concept"] for word, row in zip(named, HELD_OUT, strict=True))
    assert right >= 7, list(zip(named, (row["concept"] for row in HELD_OUT), strict=True))


def test_places_are_near_the_words(naming, shapes, background):
    placed = naming.place(updates(HELD_OUT, shapes))
    # Unit vectors in float32.
    torch.testing.assert_close(placed.norm(dim=1), torch.ones(len(HELD_OUT)))
    texts = background.centre(embed_texts([row["concept"] for row in HELD_OUT]))
    scores = background.scores(placed.numpy(), texts)
    assert sum(scores[i].argmax() == i for i in range(len(HELD_OUT))) >= 7


def test_strength_and_gauge_are_no_words(naming, shapes):
    once = updates(HELD_OUT, shapes)
    louder = {name: type(own)(-own.U, 7 * own.S, -own.V) for name, own in once.items()}
    # The same directions, computed with other signs: float32 rounding.
    torch.testing.assert_close(naming.scores(louder), naming.scores(once), atol=1e-3, rtol=1e-3)


def test_what_is_saved_says_the_same(naming, shapes):
    read = Naming.restore({name: tensor.float() for name, tensor in naming.tensors().items()})
    before, after = (own.scores(updates(HELD_OUT, shapes)) for own in (naming, read))
    # Eleven bits a number; scores are standard deviations.
    torch.testing.assert_close(after, before, atol=0.02, rtol=0)


def test_an_expert_without_a_base_has_no_naming():
    assert Naming.restore({"dual": torch.zeros(2, 2)}) is None


def test_a_model_that_changes_none_of_the_layers_gets_no_place(naming, shapes):
    empty = {name: type(own)(own.U * 0, own.S * 0, own.V * 0) for name, own in updates(HELD_OUT[:1], shapes).items()}
    assert not naming.place(empty).any()


def test_the_default_encoder_asks_the_base(background):
    learned, lines = lesson(KNOWN, background), []
    learned = replace(learned, log=lines.append)
    fitted, judge = GramRidge().learn(learned, GramOptions())
    assert any("was asked for 40 words" in line for line in lines)
    assert judge.setting["share"] > 0
    tensors = {name: tensor.float() for name, tensor in fitted.tensors().items()}
    restored = GramRidge().restore(Saved(4, fitted.shapes, tensors))
    texts = background.centre(embed_texts([row["concept"] for row in HELD_OUT]))
    for one in (fitted, restored):
        scores = background.scores(one.place(updates(HELD_OUT, fitted.shapes)).numpy(), texts)
        assert (scores.argmax(0) == range(len(HELD_OUT))).sum() >= 7


def test_an_expert_may_be_fitted_without_asking(background):
    fitted, _ = GramRidge().learn(lesson(KNOWN, background), GramOptions(ask=False))
    assert fitted.naming is None
    assert not any(name.startswith("naming.") for name in fitted.tensors())


def test_a_base_that_cannot_be_asked_is_told_in_the_log(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/model_index.json").write_text('{"_class_name": "StrangePipeline"}')
    base = FolderModel(tmp_path / "base")
    models = [
        FolderModel(DATA / "sample" / row["path"], name=row["name"], adapter_type="lora", base=base)
        for row in KNOWN[:30]
    ]
    with LocalContext(tmp_path / "job", models) as context:
        GramRidge().run(context, GramOptions())
    assert any("cannot be asked" in line and "StrangePipeline" in line for line in context.lines)
