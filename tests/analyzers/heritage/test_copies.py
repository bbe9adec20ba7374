import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelgrove_analyzers.heritage.copies import Copies
from modelgrove_analyzers.heritage.rounding import ROUNDINGS, spacing
from modelgrove_kernels.packing import dequantize, quantize
from modelgrove_plugins.compress.magnitude import Magnitude


def verdicts(analyze, *models, **params):
    pairs = analyze(Copies(), *models, **params)["pairs"]
    return {(pair["child"], pair["parent"]): (pair["verdict"], pair["precision"]) for pair in pairs}


def cast(weights, dtype):
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def test_the_same_file_twice_is_an_exact_copy(network, save, analyze):
    models = [save(name, network()) for name in ("original", "again")]

    assert verdicts(analyze, *models) == {("again", "original"): ("exact copy", "")}


def test_other_metadata_is_a_resaved_copy(network, save, analyze):
    models = [save("original", network()), save("again", network(), metadata={"author": "someone else"})]

    assert verdicts(analyze, *models) == {("again", "original"): ("re-saved copy", "")}


def test_other_names_are_a_renamed_copy(network, save, analyze):
    renamed = {f"model.{name.replace('attn1', 'self_attention')}": tensor for name, tensor in network().items()}

    found = verdicts(analyze, save("original", network()), save("renamed", renamed))

    assert found == {("renamed", "original"): ("renamed copy", "")}


def test_a_wider_type_with_the_same_values_is_a_resaved_copy(network, save, analyze):
    half = cast(network(), torch.float16)

    found = verdicts(analyze, save("half", half), save("widened", cast(half, torch.float32)))

    assert found == {("widened", "half"): ("re-saved copy", "")}


@pytest.mark.parametrize("rounding", [r for r in ROUNDINGS if r.casts], ids=lambda r: r.name)
def test_a_cast_is_recognised_by_its_type_and_way(rounding, network, save, analyze):
    original = save("original", network())
    copied = save("copied", {name: rounding.apply(tensor).to(rounding.casts[-1]) for name, tensor in network().items()})

    found = verdicts(analyze, original, copied)

    assert found == {("copied", "original"): ("quantized copy", rounding.name)}


def test_the_more_precise_model_is_the_parent_even_when_it_came_later(network, save, analyze):
    early, late = save("early-half", cast(network(), torch.float16)), save("late-full", network())

    assert verdicts(analyze, early, late) == {("early-half", "late-full"): ("quantized copy", "fp16")}


def test_a_cast_under_other_names_is_recognised_by_its_values(network, save, analyze):
    renamed = {f"x.{number}": tensor.half() for number, tensor in enumerate(network().values())}

    found = verdicts(analyze, save("original", network()), save("renamed-half", renamed))

    assert found == {("renamed-half", "original"): ("quantized copy", "fp16")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 32), (4, 32)])
def test_integer_quantization_is_recognised_from_dequantized_values(bits, group, dtype, network, save, analyze):
    original = cast(network(), dtype)
    copied = {
        name: dequantize(quantize(tensor.flatten(1), bits, group)).view(tensor.shape) if tensor.ndim > 1 else tensor
        for name, tensor in original.items()
    }

    found = verdicts(analyze, save("original", original), save("copied", copied))

    assert found == {("copied", "original"): ("quantized copy", f"int{bits}")}


def test_a_component_is_a_part_of_the_whole(network, save, analyze):
    whole = save("whole", network() | {f"vae.{name}": tensor for name, tensor in network(1).items()})

    assert verdicts(analyze, whole, save("part", network(1))) == {("part", "whole"): ("part", "")}


def test_independent_networks_are_no_copies(network, save, analyze):
    assert verdicts(analyze, *(save(f"net-{seed}", network(seed)) for seed in range(4))) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("relative", [0.5, 0.01, 0.001])
def test_a_fine_tune_is_no_copy(relative, dtype, network, save, analyze):
    noise = network(9)
    tuned = {name: tensor + relative * noise[name] for name, tensor in network().items()}

    found = verdicts(analyze, save("base", network()), save("tuned", cast(tuned, dtype)))

    assert found.get(("tuned", "base"), ("none", ""))[0] in ("none", "undecided")
    # A thousandth is half of bf16's step: the reader is told that the two are close, and no more.
    assert not found or (relative, dtype) == (0.001, torch.bfloat16)


@pytest.mark.parametrize("index", [0, 95])
def test_a_single_edited_row_is_no_copy(index, network, save, analyze):
    edited = cast(network(), torch.float16)
    edited["blocks.0.attn1.to_q.weight"][index] *= 1.01

    assert verdicts(analyze, save("base", network()), save("edited", edited)) in (
        {},
        {("edited", "base"): ("undecided", "fp16")},
    )


def test_a_value_that_no_sketch_samples_may_change_and_is_found(network, save, analyze):
    edited = network()
    edited["conv_in.weight"].view(-1)[1] += 1e-3

    assert verdicts(analyze, save("base", network()), save("edited", edited)) == {}


@settings(max_examples=25, deadline=None)
@given(
    steps=st.floats(0.02, 3.0), rounding=st.sampled_from([r for r in ROUNDINGS if r.casts]), seed=st.integers(0, 999)
)
def test_noise_above_a_fiftieth_of_a_rounding_step_is_never_called_a_copy(steps, rounding, seed, facts_from):
    from modelgrove_analyzers.heritage.verdict import Kind, compare

    generator = torch.Generator().manual_seed(seed)
    base = {f"w{i}": torch.randn(64, 64, generator=generator) * 0.05 for i in range(8)}
    tuned = {}
    for name, tensor in base.items():
        noise = torch.randn(tensor.shape, generator=generator)
        tuned[name] = rounding.apply(tensor + steps * noise * spacing(tensor.double(), rounding.dtype).float())

    verdict = compare(facts_from("base", 1, base), facts_from("tuned", 2, tuned))

    assert verdict.kind in (Kind.NONE, Kind.UNDECIDED, Kind.SUSPECT)


def test_too_few_values_decide_nothing(save, analyze):
    tiny = {"w": torch.randn(10, 10, generator=torch.Generator().manual_seed(0))}

    found = verdicts(analyze, save("tiny", tiny), save("half", cast(tiny, torch.float16)), confirm=False)

    assert found == {("half", "tiny"): ("undecided", "fp16")}


def test_first_only_compares_with_the_first_model(network, save, analyze):
    models = [save(f"net-{n}", network(seed)) for n, seed in enumerate((1, 0, 0))]

    assert verdicts(analyze, *models, first_only=True) == {}
    assert verdicts(analyze, *models) == {("net-2", "net-1"): ("exact copy", "")}


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_in_our_packed_format_is_a_quantized_copy(bits, group, dtype, network, save, analyze, pack):
    base = save("base", cast(network(), dtype))

    found = verdicts(analyze, base, pack(base, "packed", bits=bits, group_size=group, granularity="group"))

    assert found == {("packed", "base"): ("quantized copy", f"int{bits}")}


def test_a_pruned_file_is_a_copy_and_says_that_it_is_sparse(network, save, analyze, pack):
    base = save("base", network())
    pruned = pack(base, "pruned", Magnitude(), sparsity=0.1)

    assert verdicts(analyze, base, pruned) == {("pruned", "base"): ("quantized copy", "sparse")}


def test_a_pruned_fine_tune_is_no_copy_of_the_base(network, save, analyze, pack):
    noise = network(9)
    tuned = save("tuned", {name: tensor + 0.01 * noise[name] for name, tensor in network().items()})

    found = verdicts(analyze, save("base", network()), tuned, pack(tuned, "pruned", Magnitude(), sparsity=0.1))

    assert found.pop(("pruned", "tuned")) == ("quantized copy", "sparse")
    assert found.get(("pruned", "base"), ("none",))[0] in ("none", "undecided")


@pytest.mark.parametrize("bits", [8, 4])
def test_a_packed_fine_tune_is_no_copy_of_the_base(bits, network, save, analyze, pack):
    noise = network(9)
    tuned = save("tuned", {name: tensor + 0.01 * noise[name] for name, tensor in network().items()})

    found = verdicts(analyze, save("base", network()), tuned, pack(tuned, "packed", bits=bits))

    assert found.pop(("packed", "tuned")) == ("quantized copy", f"int{bits}")
    assert found.get(("packed", "base"), ("none",))[0] in ("none", "undecided")
    assert ("tuned", "base") not in found
