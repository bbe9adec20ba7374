import pytest

from modelgrove_hub.errors import NotFoundError, UsageError
from modelgrove_hub.previews import get, job_key, preview_key, put
from modelgrove_hub.settings import Settings


@pytest.fixture
def config(tmp_path):
    return Settings(home=tmp_path / "home")


def test_what_is_put_is_got_and_nothing_else(config, tmp_path):
    key, other = preview_key("p", {"steps": 1}, ["a"]), preview_key("p", {"steps": 2}, ["a"])
    (tmp_path / "a.png").write_bytes(b"picture")

    stored = put(config, key, tmp_path / "a.png")

    assert get(config, key) == stored
    assert stored.read_bytes() == b"picture"
    assert get(config, other) is None
    assert [path.name for path in stored.parent.iterdir()] == [stored.name]


def test_everything_that_decides_the_picture_decides_the_key():
    keys = {
        preview_key(*arguments)
        for arguments in [
            ("p", {"steps": 1}, ["a", "b"]),
            ("q", {"steps": 1}, ["a", "b"]),
            ("p", {"steps": 2}, ["a", "b"]),
            ("p", {"steps": 1}, ["b", "a"]),
            ("p", {"steps": 1}, ["a"]),
        ]
    }

    assert len(keys) == 5
    assert preview_key("p", {"a": 1, "b": 2}, []) == preview_key("p", {"b": 2, "a": 1}, [])


def test_copies_of_a_model_share_the_picture_but_not_the_job():
    key = preview_key("p", {}, ["same"])

    assert job_key(key, [1]) != job_key(key, [2])


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "0" * 63, "G" * 64])
def test_a_key_that_is_none_never_becomes_a_path(config, key):
    with pytest.raises(UsageError, match="no preview key"):
        get(config, key)


def test_a_picture_that_is_gone_is_said_to_be_gone(config, tmp_path):
    with pytest.raises(NotFoundError):
        put(config, "0" * 64, tmp_path / "gone.png")

    assert get(config, "0" * 64) is None
