from modelgrove_hub.search.words import words


def test_each_word_is_there_once_and_is_one_a_caption_could_hold():
    found = words()
    assert len(found) > 1000
    assert len(set(found)) == len(found)
    assert all(word == word.strip() and 1 <= len(word.split()) <= 4 for word in found)
