import pytest
import torch

from modelgrove_analyzers.heritage.diff import Diff
from modelgrove_hub.errors import UsageError
from modelgrove_plugins.compress.magnitude import Magnitude


def cast(weights, dtype):
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def update(shape, rank, seed, size=0.02):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, generator=generator)
    return size * up @ torch.randn(rank, shape[1], generator=generator) / rank**0.5


def merged(weights, rank, seed, part="attn1", size=0.02):
    return {
        name: tensor + (update(tensor.shape, rank, seed + i, size) if part in name else 0)
        for i, (name, tensor) in enumerate(weights.items())
    }


def diff(analyze, before, after, **params):
    return analyze(Diff(), before, after, **params)


def test_identical_weights_are_said_to_be_identical(network, save, analyze):
    report = diff(analyze, save("a", network()), save("b", network(), metadata={"note": "x"}))

    assert report["summary"] == "identical weights in all 17 tensors"
    assert report["changed"] == 0


def test_a_cast_is_named_instead_of_being_called_a_fine_tune(network, save, analyze):
    report = diff(analyze, save("a", network()), save("b", cast(network(), torch.bfloat16)))

    assert report["summary"] == "b is a bf16 copy of a"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("pair", "rank"), [(("base", "child"), 4), (("child", "sibling"), 8), (("base", "grandchild"), 8)]
)
def test_ranks_above_rounding_are_those_of_the_updates(pair, rank, dtype, network, save, analyze):
    base = network()
    child = merged(base, 4, 100)
    family = {"base": base, "child": child, "sibling": merged(base, 4, 200), "grandchild": merged(child, 4, 300)}

    report = diff(analyze, *(save(name, cast(family[name], dtype)) for name in pair))

    assert {layer["rank"] for layer in report["layers"]} == {rank}
    assert report["summary"].startswith(f"a LoRA of rank ≤ {rank} was merged into 8 attention layers")


def test_the_rounded_one_is_the_copy_whichever_comes_first(network, save, analyze):
    report = diff(analyze, save("a", cast(network(), torch.float16)), save("b", network()))

    assert report["summary"] == "a is an fp16 copy of b"


@pytest.mark.parametrize("bits", [8, 4])
def test_a_packed_copy_is_named_with_its_bits_whichever_comes_first(bits, network, save, analyze, pack):
    base = save("base", network())
    small = pack(base, "small", bits=bits)

    assert diff(analyze, base, small)["summary"] == f"small is an int{bits} copy of base"
    assert diff(analyze, small, base)["summary"] == f"small is an int{bits} copy of base"


def test_a_pruned_copy_is_named_sparse(network, save, analyze, pack):
    base = save("base", network())

    report = diff(analyze, base, pack(base, "small", Magnitude(), sparsity=0.1))

    assert report["summary"] == "small is a sparse copy of base"


def test_a_lora_that_was_merged_before_a_cast_is_still_found(network, save, analyze):
    report = diff(analyze, save("a", network()), save("b", cast(merged(network(), 4, 100), torch.float16)))

    assert report["summary"].startswith("a LoRA of rank ≤ 4 was merged into 8 attention layers")


def test_a_full_fine_tune_is_told_with_its_size(network, save, analyze):
    noise = network(5)
    tuned = {name: tensor + 0.008 * noise[name] for name, tensor in network().items()}

    report = diff(analyze, save("a", network()), save("b", tuned))

    assert report["summary"].startswith("full fine-tune: all 9 layers changed by 0.8 % (median;")


def test_a_change_of_few_layers_names_them(network, save, analyze):
    tuned = network()
    tuned["conv_in.weight"] += 0.01 * network(5)["conv_in.weight"]

    report = diff(analyze, save("a", network()), save("b", tuned))

    assert report["summary"].startswith("1 of 9 layers changed by 1 %")
    assert "conv_in.weight" in report["summary"]


def test_independent_networks_are_called_unrelated(network, save, analyze):
    report = diff(analyze, save("a", network(0)), save("b", network(1)))

    assert report["summary"].startswith("the same shapes, but unrelated weights (median cosine")


def test_tensors_of_only_one_model_are_listed(network, save, analyze):
    other = network() | {"extra.weight": torch.ones(3, 3)}
    del other["conv_in.weight"]

    report = diff(analyze, save("a", network()), save("b", other))

    assert report["missing"] == ["conv_in.weight"]
    assert report["extra"] == ["extra.weight"]
    assert "b lacks 1 tensors (conv_in.weight) of a; b has 1 tensors (extra.weight) more" in report["summary"]


def test_renamed_tensors_are_compared_by_what_is_in_them(network, save, analyze):
    renamed = {f"model.{name}": tensor for name, tensor in merged(network(), 2, 7, size=0.002).items()}

    report = diff(analyze, save("a", network()), save("b", renamed))

    assert report["summary"].startswith("a LoRA of rank ≤ 2 was merged into 8 attention layers")


def test_nothing_in_common_is_said_so(network, save, analyze):
    report = diff(analyze, save("a", network()), save("b", {"other": torch.ones(5, 5)}))

    assert report["summary"] == "a and b have no tensor in common"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ranks_of_matrices_too_large_for_an_exact_svd_come_from_a_sketch(dtype, save, analyze):
    generator = torch.Generator().manual_seed(0)
    base = {"to_q.weight": torch.randn(400, 300, generator=generator) * 0.05}

    report = diff(
        analyze, save("a", cast(base, dtype)), save("b", cast(merged(base, 5, 3, "to_q"), dtype)), exact_to=256
    )

    assert [layer["rank"] for layer in report["layers"]] == [5]


def test_a_full_change_of_a_large_matrix_has_at_least_the_rank_that_a_sketch_can_see(save, analyze):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(400, 300, generator=generator)
    tuned = base + 0.01 * torch.randn(400, 300, generator=generator)

    report = diff(analyze, save("a", {"w": base}), save("b", {"w": tuned}), exact_to=256)

    assert report["layers"][0]["at_least"]
    assert report["summary"].startswith("full fine-tune")


def adapter(seed, rank=4, modules=3, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for i in range(modules):
        name = f"unet.down_blocks.{i}.attentions.0.transformer_blocks.0.attn1.to_q"
        weights[f"{name}.lora_A.weight"] = torch.randn(rank, 32, generator=generator)
        weights[f"{name}.lora_B.weight"] = scale * torch.randn(48, rank, generator=generator)
    return weights


def test_other_factors_of_one_product_are_the_same_adapter(save, analyze):
    turned = {}
    for name, tensor in adapter(0).items():
        turn = torch.randn(4, 4, generator=torch.Generator().manual_seed(len(name))) + 3 * torch.eye(4)
        turned[name] = torch.linalg.inv(turn) @ tensor if "lora_A" in name else tensor @ turn

    models = [save(name, w, adapter_type="lora") for name, w in (("a", adapter(0)), ("b", turned))]
    report = diff(analyze, *models)

    assert report["summary"] == "the same update of 3 layers (effective ranks 4 and 4), whatever the factors"


def test_a_scaled_adapter_is_told_with_its_factor(save, analyze):
    models = [save(f"x{scale}", adapter(0, scale=scale), adapter_type="lora") for scale in (1.0, 0.5)]

    assert diff(analyze, *models)["summary"] == "x0.5 is x1.0 times 0.5, in all 3 layers"


def test_independent_adapters_are_unrelated(save, analyze):
    models = [save(f"s{seed}", adapter(seed, rank=rank), adapter_type="lora") for seed, rank in ((0, 4), (1, 8))]

    report = diff(analyze, *models)

    assert report["summary"].startswith("unrelated updates of 3 layers")
    assert report["summary"].endswith("effective ranks 4 and 8")


@pytest.mark.parametrize(("share", "word"), [(0.05, "unrelated"), (0.2, "related")])
def test_adapters_that_share_a_fifth_of_their_update_are_related(share, word, save, analyze):
    def mixed(seed):
        own, common = adapter(seed, rank=40), adapter(0, rank=10)
        return {
            name: torch.cat([tensor * (1 if "lora_A" in name else part) for tensor, part in parts], dim)
            for name in own
            for dim in [0 if "lora_A" in name else 1]
            for parts in [((own[name], ((1 - share) / 40) ** 0.5), (common[name], (share / 10) ** 0.5))]
        }

    models = [save(f"s{seed}", mixed(seed), adapter_type="lora") for seed in (1, 2)]

    assert diff(analyze, *models)["summary"].startswith(f"{word} updates of 3 layers: median cosine")


def test_an_adapter_and_a_model_are_not_compared(network, save, analyze):
    with pytest.raises(UsageError, match="compare adapter with adapter"):
        diff(analyze, save("model", network()), save("lora", adapter(0), adapter_type="lora"))


def test_diff_wants_two_models(network, save, analyze):
    with pytest.raises(UsageError, match="two models, not 1"):
        analyze(Diff(), save("alone", network()))
