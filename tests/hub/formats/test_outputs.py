import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from modelgrove_hub.errors import CorruptFileError
from modelgrove_hub.formats.outputs import WIDTH, Outputs, compare_outputs, outputs_of_adapter, outputs_of_base
from modelgrove_hub.store.tensors import tensors_of

LAYERS = [f"down_blocks.{b}.attentions.{a}.transformer_blocks.0.attn1.to_q" for b in range(5) for a in range(4)]
OUT, IN, RANK = 48, 40, 4


def update(seed, rank=RANK, towards=None):
    """Factors by layer: B moves outputs in random directions, or in those of the matrices `towards`."""
    noise = np.random.default_rng(seed)
    factors = {}
    for number, layer in enumerate(LAYERS):
        up = noise.normal(size=(OUT, rank))
        if towards is not None:
            up = towards[number] @ noise.normal(size=(IN, rank)) + 0.3 * up
        factors[layer] = (noise.normal(size=(rank, IN)), up)
    return factors


def bases(seed):
    """For each layer a weight that prefers some outputs."""
    noise = np.random.default_rng(seed)
    return [noise.normal(size=(OUT, 5)) @ noise.normal(size=(5, IN)) for _ in LAYERS]


def sketch(path, factors, names="unet.{}.lora_A.weight unet.{}.lora_B.weight", dtype=np.float32):
    down, up = names.split()
    tensors = {}
    for layer, (A, B) in factors.items():
        shown = layer.replace(".", "_") if "lora_unet" in down else layer
        tensors[down.format(shown)] = A.astype(dtype)
        tensors[up.format(shown)] = B.astype(dtype)
    save_file(tensors, path)
    return outputs_of_adapter(tensors_of(path))


def score(one, *others):
    return compare_outputs(one, others).score


def test_the_product_is_the_mean_cosine_of_what_is_left_of_the_grams(tmp_path):
    """Against dense float64 matrices, without probes and without hashing."""
    weights = bases(1)
    pairs = [update(seed, towards=weights) for seed in (2, 3)]
    cosines = []
    for layer in LAYERS:
        grams = []
        for factors in pairs:
            A, B = factors[layer]
            X = B @ A
            gram = X @ X.T - np.eye(OUT) * (X**2).sum() / OUT
            grams.append(gram / np.linalg.norm(gram))
        cosines.append((grams[0] * grams[1]).sum())
    one, two = (sketch(tmp_path / str(number), factors) for number, factors in enumerate(pairs))
    found = compare_outputs(one, [two])
    # Probes: √(1/528) a layer of twenty; hashing: what `noise` says. Four deviations of both.
    assert found.score == pytest.approx(np.mean(cosines), abs=4 * (found.noise + (1 / 528 / len(LAYERS)) ** 0.5))


def test_adapters_of_one_base_are_alike_and_like_it_those_of_another_are_not(tmp_path):
    ours, theirs = bases(1), bases(2)
    one, two = (sketch(tmp_path / str(seed), update(seed, towards=ours)) for seed in (3, 4))
    other = sketch(tmp_path / "other", update(5, towards=theirs))
    save_file({f"{layer}.weight": w for layer, w in zip(LAYERS, ours, strict=True)}, tmp_path / "base")
    base = outputs_of_base(tensors_of(tmp_path / "base"))
    assert min(score(one, two), score(one, base), score(two, base)) > 0.2
    assert max(abs(score(one, other)), abs(score(other, base))) < 0.1


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6))
def test_only_the_update_counts_not_its_factors_nor_its_strength(tmp_path_factory, seed, rank):
    folder = tmp_path_factory.mktemp("update")
    factors = update(seed, rank)
    change = np.random.default_rng(seed).normal(size=(rank, rank)) + 3 * np.eye(rank)
    turned = {layer: (change @ A, 5 * B @ np.linalg.inv(change)) for layer, (A, B) in factors.items()}
    one = sketch(folder / "one", factors)
    for number, names in enumerate((
        "unet.{}.lora_A.weight unet.{}.lora_B.weight",
        "lora_unet_{}.lora_down.weight lora_unet_{}.lora_up.weight",
        "base_model.model.{}.lora_A.weight base_model.model.{}.lora_B.weight",
    )):  # fmt: skip
        two = sketch(folder / str(number), turned, names)
        np.testing.assert_array_equal(one.layers, two.layers)
        # float32 products of factors whose condition is below about a hundred.
        np.testing.assert_allclose(one.vector, two.vector, atol=2e-3)


def test_a_sketch_survives_its_bytes_and_half_precision(tmp_path):
    factors = update(1, towards=bases(1))
    one, half = sketch(tmp_path / "one", factors), sketch(tmp_path / "half", factors, dtype=np.float16)
    assert score(one, half) == pytest.approx(score(one, one), abs=0.01)
    again = Outputs.from_bytes(one.to_bytes())
    np.testing.assert_array_equal(one.layers, again.layers)
    # A step is a 127th of the largest number, and rounding is off by half of it.
    np.testing.assert_allclose(one.vector, again.vector, atol=np.abs(one.vector).max() / 127 / 2 + 1e-6)
    assert len(one.to_bytes()) == WIDTH + 4 * len(LAYERS) + 8


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"\xff" + data[1:]])
def test_bytes_that_are_no_sketch_are_refused(tmp_path, damage):
    data = sketch(tmp_path / "one", update(1)).to_bytes()
    with pytest.raises(CorruptFileError, match="expert route"):
        Outputs.from_bytes(damage(data))


def test_models_that_share_too_few_layers_are_not_compared(tmp_path):
    factors = update(1)
    few = dict(list(factors.items())[:7])
    assert compare_outputs(sketch(tmp_path / "a", factors), [sketch(tmp_path / "b", few)]) is None
    assert compare_outputs(sketch(tmp_path / "a", factors), []) is None


def test_nothing_and_numbers_that_are_none_make_no_sketch(tmp_path):
    save_file({"x": np.zeros((3, 3), np.float32), "y.lora_A.weight": np.zeros((3, 3), np.float32)}, tmp_path / "a")
    assert outputs_of_adapter(tensors_of(tmp_path / "a")) is None
    still = {layer: (A, 0 * B) for layer, (A, B) in update(1).items()}
    assert sketch(tmp_path / "b", still) is None
    broken = {layer: (A, B * np.nan) for layer, (A, B) in update(1).items()}
    assert sketch(tmp_path / "c", broken) is None
