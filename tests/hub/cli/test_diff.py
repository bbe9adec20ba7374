import pytest
import torch

from modelgrove_hub.cli.diff import diff
from modelgrove_hub.errors import JobFailedError, NotFoundError


def merged(weights, rank):
    generator = torch.Generator().manual_seed(5)
    return {
        name: tensor + 0.01 * torch.randn(64, rank, generator=generator) @ torch.randn(rank, 64, generator=generator)
        for name, tensor in weights.items()
    }


def test_diff_says_in_words_what_was_merged(register, network, run):
    before, after = register("base", network(0)), register("merged", merged(network(0), 3))

    lines = run(diff, before, after, text=True)

    assert lines[0].startswith("a LoRA of rank ≤ 3 was merged into 8 attention layers")
    assert any("blocks.0.attn.to_q.weight" in line and "64×64" in line for line in lines)


def test_diff_prints_the_whole_report_as_json(register, network, run):
    before, after = register("base", network(0)), register("merged", merged(network(0), 3))

    report = run(diff, before, after)

    assert report["changed"] == 8
    assert {layer["rank"] for layer in report["layers"]} == {3}
    assert run(diff, before, after, "--no-ranks")["layers"][0]["rank"] is None


def test_long_lists_are_cut_and_say_so(register, network, run):
    names = [
        register(f"net-{seed}", {**network(seed), **{f"x.{k}": v for k, v in network(seed + 9).items()}})
        for seed in (0, 1)
    ]

    assert run(diff, *names, text=True)[-1] == "… and 4 more; see them all with --all"
    assert len(run(diff, *names, "--all", text=True)) == 2 + 1 + 16


def test_an_unknown_model_is_named(register, network, run):
    register("base", network(0))

    with pytest.raises(NotFoundError, match="no model 'local/bose'"):
        run(diff, "local/base", "local/bose")


def test_a_model_and_an_adapter_end_with_the_reason(register, network, run):
    stem = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {f"{stem}.lora_A.weight": torch.ones(2, 160), f"{stem}.lora_B.weight": torch.ones(160, 2)}

    with pytest.raises(JobFailedError, match="compare adapter with adapter"):
        run(diff, register("base", network(0)), register("lora", lora))
