"""Ranges are slices, whatever a client asks for; names of files cannot leave their header."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from modelgrove_hub.api.files import disposition, span_of

SIZES = st.integers(0, 40)
PLACES = st.integers(0, 60)


@given(SIZES, PLACES, PLACES)
def test_a_range_is_a_slice(size, first, last):
    whole = bytes(range(size))
    span = span_of(f"bytes={first}-{last}", size)
    if last < first:  # no range: all of it
        assert span is not None
        assert (span.start, span.stop) == (0, size)
    elif first >= size:
        assert span is None
    else:
        assert span is not None
        assert whole[span.start : span.stop] == whole[first : last + 1]


@given(SIZES, PLACES)
def test_open_ends_are_slices(size, number):
    whole = bytes(range(size))
    rest, end = span_of(f"bytes={number}-", size), span_of(f"bytes=-{number}", size)
    assert (whole[rest.start : rest.stop] if rest else b"") == whole[number:]
    assert (whole[end.start : end.stop] if end else b"") == (whole[-number:] if number else b"")


@given(st.text(max_size=30), SIZES)
def test_what_is_no_single_range_is_the_whole_file(asked, size):
    if not re.fullmatch(r"\s*bytes=[0-9]*-[0-9]*\s*", asked):
        span = span_of(asked, size)
        assert span is not None
        assert (span.start, span.stop) == (0, size)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_a_name_stays_in_its_header(name):
    said = disposition(name)
    assert re.fullmatch(r"attachment; filename\*=UTF-8''[A-Za-z0-9%._~-]*; filename=\"[A-Za-z0-9._-]*\"", said)
