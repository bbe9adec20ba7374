import numpy as np

from modelgrove_hub.search.kept import _read, kept_vectors
from modelgrove_hub.search.text import WIDTH

TEXTS = ["a cat", "two dogs", "rain"]


def test_vectors_are_kept_and_made_again_when_the_file_is_damaged(tmp_path):
    first, digest = kept_vectors("some", TEXTS, tmp_path)
    (file,) = tmp_path.glob("some-*.npy")
    whole = file.read_bytes()
    assert first.shape == (3, WIDTH)
    assert digest in file.name
    for damage in (b"not numpy", whole[: len(whole) // 2]):
        file.write_bytes(damage)
        np.testing.assert_array_equal(kept_vectors("some", TEXTS, tmp_path)[0], first)
        assert file.read_bytes() == whole


def test_other_texts_have_another_file(tmp_path):
    kept_vectors("some", TEXTS, tmp_path)
    kept_vectors("some", TEXTS[:2], tmp_path)
    assert len(list(tmp_path.glob("some-*.npy"))) == 2


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert kept_vectors("some", TEXTS, None)[0].shape == (3, WIDTH)
    assert not list(tmp_path.iterdir())


def test_a_file_of_other_numbers_is_not_believed(tmp_path):
    assert _read(tmp_path / "missing.npy", 3) is None
    for wrong in (np.zeros((2, WIDTH), np.float32), np.zeros((3, WIDTH)), np.array([None] * 3)):
        np.save(tmp_path / "b.npy", wrong)
        assert _read(tmp_path / "b.npy", 3) is None
