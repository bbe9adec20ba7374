import pytest

from modelgrove_hub.formats.patterns import any_of, is_literal, module_patterns


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("a.#.b", "a.12.b", True),
        ("a.#.b", "a.x.b", False),
        ("a.<3-5>.b", "a.5.b", True),
        ("a.<3-5>.b", "a.50.b", False),
        ("a.*.b", "a.x_1.b", True),
        ("a.*.b", "a.x.y.b", False),
        ("a.**", "a.x.y.b", True),
        ("{a,b.#}.w", "b.3.w", True),
        ("{a,b.#}.w", "b.w", False),
        ("a.w", "aXw", False),
        ("<cat>", "<cat>", True),
    ],
)
def test_a_pattern_fits_what_it_says(pattern, name, fits):
    assert bool(any_of((pattern,)).fullmatch(name)) is fits


def test_kohyas_flattened_names_fit_the_same_pattern():
    expression = any_of(("down.#.attn.{to_q,to_out.0}",), flat=True)
    assert expression.fullmatch("down_3_attn_to_out_0")
    assert not expression.fullmatch("down.3.attn.to_q")


def test_no_patterns_fit_nothing():
    assert not any_of(()).fullmatch("")


def test_modules_are_the_owners_of_weights():
    assert module_patterns(["a.#.{weight,bias}", "b.weight", "c.gamma"]) == ("a.#", "b")


def test_plain_names_are_told_from_patterns():
    assert is_literal("a.b_0.weight")
    assert not is_literal("a.#.weight")
