import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelgrove_hub.errors import UsageError
from modelgrove_hub.search.filters import Filters, allowed_revisions, excluded, read_rank


def ranks(low, high):
    return {"ranks": {"min": low, "max": high, "common": high}}


@pytest.fixture
def models(register):
    """Revision ids by name."""
    return {
        "narrow": register("a/narrow", summary={**ranks(4, 4), "base_candidates": ["sdxl"]}, family="sdxl"),
        "mixed": register("a/mixed", summary=ranks(4, 16), declared_base="Stability/SDXL-base", licence="CC-BY-4.0"),
        "wide": register("a/wide", summary={**ranks(64, 64), "base_candidates": ["sd1", "sd2"]}, family="unknown"),
        "whole": register("a/whole", kind="checkpoint", adapter_type=None, family="sdxl", licence="mit"),
        "odd": register("a/odd", declared_base='100%_"xl"', summary={"base_candidates": []}),
    }


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (Filters(), None),
        (Filters(rank="4"), ["narrow"]),
        (Filters(rank="4-16"), ["narrow", "mixed"]),
        (Filters(rank="..16"), ["narrow", "mixed"]),
        (Filters(rank="5.."), ["wide"]),
        (Filters(rank="16"), []),  # mixed has modules of rank 4
        (Filters(base="stability/sdxl-BASE"), ["mixed"]),
        (Filters(base="sdxl-base"), ["mixed"]),
        (Filters(base="base"), []),
        (Filters(base="SDXL"), ["narrow"]),
        (Filters(base="sd2"), ["wide"]),
        (Filters(base='100%_"XL"'), ["odd"]),
        (Filters(base="100%x"), []),
        (Filters(base='s"d'), []),
        (Filters(licence="cc-by-4.0"), ["mixed"]),
        (Filters(kind="Checkpoint"), ["whole"]),
        (Filters(family="SDXL", adapter_type="LoRA"), ["narrow"]),
        (Filters(family="sdxl", trust="ok", licence="MIT"), ["whole"]),
    ],
)
def test_filters_leave_what_has_these_facts(hub, models, filters, expected):
    with hub.reading() as session:
        found = allowed_revisions(session, filters)
        assert found == (None if expected is None else [models[name] for name in expected])
        assert (excluded(session, filters) is None) == (found != [])


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        (Filters(family="sdxll", kind="adapter"), "No model here is of family 'sdxll'."),
        (Filters(rank="5", licence="gpl"), "No model here is of licence 'gpl' or of rank '5'."),
        (Filters(rank="4", licence="mit"), "No model here is of licence 'mit' and of rank '4' at once."),
    ],
)
def test_it_is_said_which_filters_leave_nothing(hub, models, filters, said):
    with hub.reading() as session:
        assert excluded(session, filters) == said


@pytest.mark.parametrize("text", ["", "..", "-", "r16", "4-16-64", "16-4", "-1-2", "1" * 40, "4,8"])
def test_what_is_no_rank_is_refused(text):
    with pytest.raises(UsageError, match="rank"):
        read_rank(text)


@given(st.integers(0, 999_999), st.integers(0, 999_999), st.sampled_from(["..", "-"]))
def test_ranges_have_both_ends_or_one(one, other, dots):
    low, high = sorted((one, other))
    assert read_rank(f"{low}{dots}{high}") == (low, high)
    assert read_rank(f" {low}{dots}") == (low, 999_999)
    assert read_rank(f"{dots}{high} ") == (0, high)
    assert read_rank(str(low)) == (low, low)
