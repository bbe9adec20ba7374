"""Scales against PEFT's own rule, and expressions of strangers kept on a short leash."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from modelgrove_hub.errors import DataError
from modelgrove_hub.formats.adapter_scale import METADATA, LoraConfig, Scaling, read_scaling

WORDS = st.sampled_from(["a", "b", "attn1", "attn2", "to_q", "0", "1"])
PATHS = st.lists(WORDS, min_size=1, max_size=5).map(".".join)
PATTERNS = st.one_of(
    PATHS, PATHS.map(lambda path: f"^{path}"), PATHS.map(lambda path: path.replace(".", r"\.").replace("0", r"\d+"))
)


@given(st.dictionaries(PATTERNS, st.integers(1, 99), max_size=6), st.lists(PATHS, min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_patterns_choose_the_alpha_that_peft_chooses(patterns, modules):
    scaling = Scaling({"": LoraConfig(r=4, lora_alpha=7, alpha_pattern=patterns)}, "file")
    for module in modules:
        wanted = patterns.get(get_pattern_key(patterns, module), 7)
        assert scaling.scale("unet", module, 4, None) == wanted / 4


def test_a_stored_alpha_wins_and_zero_means_the_rank():
    scaling = Scaling({"": LoraConfig(lora_alpha=99)}, "file")
    assert scaling.scale("unet", "x", 4, 2.0) == 0.5
    assert scaling.scale("unet", "x", 4, 0.0) == 1.0
    assert scaling.scale("unet", "x", 4, None) == 99 / 4
    assert Scaling({}, "file").scale("unet", "x", 4, None) == 1.0


def test_each_component_has_its_own_configuration():
    text = json.dumps(
        {"unet.lora_alpha": 2, "unet.r": 4, "text_encoder.lora_alpha": 9, "text_encoder.use_rslora": True}
    )
    scaling = read_scaling({}, {METADATA: text}, "file")
    assert scaling.scale("unet", "x", 4, None) == 0.5
    assert scaling.scale("text_encoder", "x", 9, None) == 9 / math.sqrt(9)
    assert scaling.scale("transformer", "x", 4, None) == 1.0


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "a{1,99}", "(?=a)", "a*b*c*", r"(\w)\1", "x" * 5000 + ".*"])
def test_expressions_that_may_take_ages_are_refused(pattern):
    with pytest.raises(DataError, match="too complicated"):
        Scaling({"": LoraConfig(rank_pattern={pattern: 4})}, "file")


def test_the_worst_expression_that_is_taken_ends():
    # With a third quantifier, or a longer name, this would take minutes.
    scaling = Scaling({"": LoraConfig(r=4, alpha_pattern={".*a.*bc": 8})}, "file")
    assert [scaling.scale("unet", "ab." * 53, 4, None) for _ in range(10)] == [2.0] * 10


def test_a_flood_of_matches_is_refused():
    patterns = {rf"x\d+y{number}": 4 for number in range(60)}
    scaling = Scaling({"": LoraConfig(alpha_pattern=patterns)}, "file")
    with pytest.raises(DataError, match="more than 50000 matches"):
        for number in range(1000):
            scaling.scale("unet", f"module{number}", 4, None)
