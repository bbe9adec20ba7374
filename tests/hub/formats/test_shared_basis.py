import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelgrove_hub.errors import DataError
from modelgrove_hub.formats.shared_basis import BASIS, MAX_COLUMNS, BasisColumns, columns_from

COLUMNS = BasisColumns("sd1", 7, 16, 4)


def test_what_is_written_is_read():
    metadata = COLUMNS.to_metadata()
    assert json.loads(metadata["modelgrove.basis"]) == {"base": "sd1", "seed": 7, "start": 16, "rank": 4}
    assert columns_from({**metadata, "format": "pt"}, "a file") == COLUMNS


def test_a_file_that_says_nothing_declares_nothing():
    assert columns_from({"format": "pt"}, "a file") is None


@pytest.mark.parametrize(
    ("other", "overlap"),
    [
        (BasisColumns("sd1", 7, 20, 4), False),
        (BasisColumns("sd1", 7, 12, 4), False),
        (BasisColumns("sd1", 7, 19, 1), True),
        (BasisColumns("sd1", 7, 0, 17), True),
        (BasisColumns("other name", 7, 16, 4), True),
        (BasisColumns("sd1", 8, 16, 4), False),
    ],
)
def test_ranges_overlap_where_they_share_a_column_of_one_seed(other, overlap):
    assert COLUMNS.overlaps(other) is other.overlaps(COLUMNS) is overlap


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"start": -1}, "start"), ({"rank": 0}, "rank"), ({"rank": MAX_COLUMNS + 1}, "rank"), ({"seed": 2**32}, "seed"),
        ({"start": "16"}, "start"), ({"start": 1.5}, "start"), ({"start": True}, "start"), ({"base": ""}, "base"),
        ({"concept": "cat"}, "concept"), ({"start": 10**400}, ""),
    ],
)  # fmt: skip
def test_what_cannot_be_columns_is_refused_by_name(change, fault):
    fields = {"base": "sd1", "seed": 7, "start": 16, "rank": 4, **change}
    with pytest.raises(DataError, match=rf"a file: metadata modelgrove\.basis: {fault}"):
        columns_from({BASIS: json.dumps(fields)}, "a file")


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


@given(
    st.text(max_size=30) | st.dictionaries(st.sampled_from(["base", "seed", "start", "rank"]), VALUES).map(json.dumps)
)
def test_any_text_is_columns_or_refused(text):
    with suppress(DataError):
        found = columns_from({BASIS: text}, "a file")
        assert columns_from(found.to_metadata(), "a file") == found


def test_a_text_longer_than_any_range_is_not_parsed():
    with pytest.raises(DataError, match="5000 characters"):
        columns_from({BASIS: " " * 5000}, "a file")
