import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelgrove_hub.search.index_file import Version, identity_of, read_index, write_index
from modelgrove_hub.search.vectors import VectorIndex

VERSION = Version("card", "s", 2, 3, "", "b")


@pytest.fixture
def path(tmp_path):
    index = VectorIndex.empty(8)
    index.replace(np.array([5, 7]), np.eye(8, dtype=np.float32)[:2])
    write_index(tmp_path / "i.faiss", index, VERSION)
    return tmp_path / "i.faiss"


def test_what_was_written_is_read(path):
    index, version, identity = read_index(path)
    assert index.ids.tolist() == [5, 7]
    assert version == VERSION
    assert identity == identity_of(path)


def test_a_file_that_is_replaced_is_another_file(path):
    index, version, identity = read_index(path)
    assert write_index(path, index, version) == identity_of(path) != identity
    assert [found.name for found in path.parent.iterdir()] == [path.name]


@settings(max_examples=60)
@given(data=st.data())
def test_every_cut_and_every_flipped_bit_is_noticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("i") / "i.faiss"
    index = VectorIndex.empty(8)
    index.replace(np.array([5, 7]), np.eye(8, dtype=np.float32)[:2])
    write_index(path, index, VERSION)
    whole = path.read_bytes()
    end = len(json.dumps(json.loads(whole[:4096])))  # the rest of the header is blanks
    place = data.draw(st.integers(0, len(whole) - 1).filter(lambda at: not end <= at < 4096))
    flipped = bytearray(whole)
    flipped[place] ^= 1 << data.draw(st.integers(0, 7))
    for damaged in (whole[:place], bytes(flipped)):
        path.write_bytes(damaged)
        try:
            _, version, _ = read_index(path)
        except ValueError:
            continue
        assert version != VERSION  # so the index is stale, and compared with the rows


@settings(max_examples=50)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_either_an_index_or_refused(tmp_path_factory, data, with_header):
    path = tmp_path_factory.mktemp("i") / "i.faiss"
    header = json.dumps({"format": 2, "sha256": "x", "size": len(data)}).encode().ljust(4096) if with_header else b""
    path.write_bytes(header + data)
    with pytest.raises(ValueError, match=r"."):
        read_index(path)
