"""What adapters add, against PEFT's own deltas and the formulas of the papers."""

import pytest
import torch
from peft import LoHaConfig, inject_adapter_in_model
from peft.tuners.loha import LoHaLayer
from safetensors.torch import save_file

from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.updates import read_updates
from modelgrove_hub.testing import FolderModel

MODULE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
SHAPES = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 5), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5)}


def loha(**changes):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{STEM}.{part}": torch.randn(shape, generator=generator) for part, shape in SHAPES.items()}
    return tensors | {f"{STEM}.{part}": tensor for part, tensor in changes.items()}


def read(tmp_path, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "m.safetensors")
    return dict(read_updates(FolderModel(tmp_path / "m.safetensors")))


@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
def test_a_loha_is_what_peft_makes_of_the_same_numbers(tmp_path, alpha):
    tensors = loha() if alpha is None else loha(alpha=torch.tensor(alpha))
    network = torch.nn.Sequential(torch.nn.Linear(5, 6))
    # LyCORIS reads a missing alpha as the rank.
    inject_adapter_in_model(LoHaConfig(r=2, alpha=alpha or 2, target_modules=["0"]), network)
    layer = next(module for module in network.modules() if isinstance(module, LoHaLayer))
    for part in SHAPES:
        getattr(layer, part)["default"].data = tensors[f"{STEM}.{part}"]
    (update,) = read(tmp_path, tensors).values()
    torch.testing.assert_close(update, layer.get_delta_weight("default").detach())


def test_whole_differences_are_read_as_matrices(tmp_path):
    linear, convolution, norm = torch.randn(6, 5), torch.randn(4, 3, 3, 3), torch.randn(7)
    found = read(
        tmp_path,
        {
            f"{STEM}.diff": linear,
            f"{STEM}.diff_b": torch.randn(6),
            "lora_unet_conv_in.diff": convolution,
            "lora_unet_mid_block_resnets_0_norm1.diff": norm,
        },
    )
    assert torch.equal(found[MODULE], linear)
    assert torch.equal(found["conv_in"], convolution.reshape(4, 27))
    assert found.keys() == {MODULE, "conv_in", "mid_block.resnets.0.norm1"}


def test_methods_may_stand_side_by_side(tmp_path):
    factors = {
        "lora_unet_conv_in.lora_down.weight": torch.randn(2, 3, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.randn(4, 2, 1, 1),
        "lora_unet_conv_in.alpha": torch.tensor(4.0),
    }
    found = read(tmp_path, loha() | factors | {"lora_unet_conv_out.diff": torch.randn(2, 3)})
    assert found.keys() == {MODULE, "conv_in", "conv_out"}
    torch.testing.assert_close(
        found["conv_in"].up, 2 * factors["lora_unet_conv_in.lora_up.weight"].reshape(4, 2), rtol=0, atol=0
    )


def test_a_dora_is_refused_with_the_way_out(tmp_path):
    tensors = {
        f"base_model.model.{MODULE}.lora_A.weight": torch.randn(2, 5),
        f"base_model.model.{MODULE}.lora_B.weight": torch.randn(6, 2),
        f"base_model.model.{MODULE}.lora_magnitude_vector": torch.randn(6),
    }
    with pytest.raises(UsageError, match=r"is a DoRA.*Export its weight differences \(\.diff\)"):
        read(tmp_path, tensors)


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({name: t for name, t in loha().items() if "w2_b" not in name}, DataError, r"lacks \.hada_w2_b"),
        (loha(hada_w2_a=torch.ones(7, 2)), DataError, "not the shapes of a LoHa's factors"),
        (loha(hada_w1_b=torch.ones(3, 5)), DataError, "not the shapes of a LoHa's factors"),
        (loha(hada_w1_a=torch.ones(6, 0), hada_w1_b=torch.ones(0, 5)), DataError, "rank or width is 0"),
        (loha(hada_w1_a=torch.full((6, 2), float("nan"))), DataError, "hada_w1_a holds NaN"),
        (loha(hada_w1_a=torch.full((6, 2), 1e30), hada_w2_a=torch.full((6, 2), 1e30)), DataError, "infinite"),
        (loha(alpha=torch.tensor(float("inf"))), DataError, "an alpha is a finite number"),
        (loha(hada_t1=torch.ones(2, 2, 3, 3)), UsageError, "Tucker core of a LoHa"),
        (loha() | {f"{STEM}.lora_down.weight": torch.ones(2, 5), f"{STEM}.lora_up.weight": torch.ones(6, 2)},
         DataError, "which one counts"),
        (loha() | {f"{STEM}.diff": torch.ones(6, 5)}, DataError, "which one counts"),
        ({f"{STEM}.diff": torch.full((6, 5), float("inf"))}, DataError, "NaN or infinite"),
        ({f"{STEM}.diff": torch.ones(6, 5), f"{STEM}.lokr_w1": torch.ones(2, 2)}, UsageError, "lokr"),
        ({f"{STEM}.lokr_w1": torch.ones(2, 2)}, UsageError, "lokr"),
        ({"conv_in.weight": torch.ones(4, 4)}, UsageError, "no LoRA factors"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(tmp_path, tensors, error, message):
    with pytest.raises(error, match=message):
        read(tmp_path, tensors)


def test_a_small_file_cannot_make_a_huge_matrix(tmp_path):
    wide, tall = torch.zeros(1, 2**15), torch.zeros(2**15, 1)
    with pytest.raises(DataError, match="at most 268435456"):
        read(tmp_path, loha(hada_w1_a=tall, hada_w2_a=tall.clone(), hada_w1_b=wide, hada_w2_b=wide.clone()))
