import numpy as np

from modelgrove_hub.search.background import load_background
from modelgrove_hub.search.text import embed_texts
from modelgrove_hub.search.words import SHOWN, describe, words


def test_each_word_is_there_once_and_is_one_a_caption_could_hold():
    found = words()
    assert len(found) > 1000
    assert len(set(found)) == len(found)
    assert all(word == word.strip() and 1 <= len(word.split()) <= 4 for word in found)


def test_a_vector_is_described_by_the_words_it_lies_near(tmp_path):
    background = load_background(tmp_path)
    texts = ["leopard", "a picture of a violin", "the tower of a castle"]
    vectors = background.centre(embed_texts(texts)).astype(np.float32)
    found = describe(background, vectors, tmp_path)
    assert [len(row) for row in found] == [SHOWN] * 3
    assert found[0][0] == "leopard"
    assert found[1][0] == "violin"
    assert {"castle", "tower"} & set(found[2])
    assert list(tmp_path.glob("words-*.npy"))
