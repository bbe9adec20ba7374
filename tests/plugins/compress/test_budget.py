"""The assignment against all assignments there are."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelgrove_hub.errors import UsageError
from modelgrove_plugins.compress.budget import Option, assign, bytes_of

OPTION = st.builds(Option, st.just("form"), st.integers(1, 60), st.integers(0, 1000).map(float))
TABLES = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=4)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("30%", 300),
        ("12.5 %", 125),
        ("700", 700),
        ("2kB", 2000),
        ("2KiB", 2048),
        ("1.5MiB", 1572864),
        ("3GB", 3 * 10**9),
    ],
)
def test_sizes_are_read_as_people_write_them(text, wanted):
    assert bytes_of(text, 1000) == wanted


@pytest.mark.parametrize("text", ["", "%", "small", "-3MB", "1e3", "5 PB", "nan"])
def test_nonsense_is_refused(text):
    with pytest.raises(UsageError, match="30%"):
        bytes_of(text, 1000)


@given(TABLES)
def test_no_other_choice_of_these_bytes_loses_less(table):
    options = {str(place): choices for place, choices in enumerate(table)}
    least = sum(min(option.bytes for option in choices) for choices in table)
    whole = sum(max(option.bytes for option in choices) for choices in table)
    for most in {least, (least + whole) // 2, whole}:
        chosen = assign(options, most)
        used = sum(option.bytes for option in chosen.values())
        error = sum(option.error for option in chosen.values())
        assert used <= most
        fitting = (choice for choice in product(*table) if sum(option.bytes for option in choice) <= used)
        assert error <= min(sum(option.error for option in choice) for choice in fitting) + 1e-6


def test_what_cannot_be_reached_is_refused_with_what_can():
    with pytest.raises(UsageError, match="take 70"):
        assign({"a": [Option("whole", 100, 0), Option("half", 50, 1)], "b": [Option("whole", 20, 0)]}, 60)


def test_everything_is_kept_where_it_fits():
    options = {"a": [Option("whole", 100, 0), Option("half", 50, 1)], "b": [Option("whole", 20, 0)]}
    assert {option.name for option in assign(options, 120).values()} == {"whole"}
