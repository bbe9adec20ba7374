"""What adapters add, against what PEFT and LyCORIS make of the files that they write."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from lycoris import LycorisNetwork, create_lycoris
from peft import AdaLoraConfig, BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import save_file

from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.adapter_keys import flat
from modelgrove_hub.formats.adapters import Factors
from modelgrove_hub.formats.updates import open_updates, read_updates
from modelgrove_hub.testing import FolderModel

MODULE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
SHAPES = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 5), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5)}


def loha(**changes):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{STEM}.{part}": torch.randn(shape, generator=generator) for part, shape in SHAPES.items()}
    return tensors | {f"{STEM}.{part}": tensor for part, tensor in changes.items()}


def opened(tmp_path, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "m.safetensors")
    return open_updates(FolderModel(tmp_path / "m.safetensors"))


def read(tmp_path, tensors):
    opened(tmp_path, tensors)
    return dict(read_updates(FolderModel(tmp_path / "m.safetensors")))


def matrix(update):
    return update.up.double() @ update.down.double() if isinstance(update, Factors) else update.double()


def make_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
    )  # fmt: skip


def assert_changes(found, changes):
    """What every update adds to the network's weights is what the library made of them."""
    assert found.targets.keys() == changes.keys()
    assert found.unmatched == ()
    weights = {name: weight.double() for name, weight in make_unet().state_dict().items()}
    for name, wanted in changes.items():
        update = found.targets[name]
        base = weights[f"{name}.weight"].flatten(1).float() if update.needs_weight else None
        # The libraries multiply in float32, in another order, and round once more when they add to W.
        room = 2e-6 * float(wanted.norm()) + 2e-7 * float(weights[f"{name}.weight"].norm())
        assert float((matrix(update.read(base)) - wanted.flatten(1)).norm()) < room, name


PEFT = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "conv1"], rank_pattern={"conv1": 3}),
    "rslora": LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"], use_rslora=True),
    "dora": LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "conv1"], use_dora=True),
    "loha": LoHaConfig(r=2, alpha=3, target_modules=["to_q", "to_k"]),
    "loha on convolutions": LoHaConfig(r=2, alpha=3, target_modules=["conv1"]),
    "loha with Tucker cores": LoHaConfig(r=2, alpha=3, target_modules=["conv1"], use_effective_conv2d=True),
    "lokr": LoKrConfig(r=2, alpha=3, target_modules=["to_q", "to_k"]),
    "lokr of two products": LoKrConfig(r=1, alpha=3, target_modules=["to_k"], decompose_both=True, decompose_factor=4),
    "lokr of two matrices": LoKrConfig(r=30, alpha=3, target_modules=["to_q"]),
    "lokr on convolutions": LoKrConfig(r=2, alpha=3, target_modules=["conv1"]),
    "lokr with a Tucker core": LoKrConfig(r=2, alpha=3, target_modules=["conv1"], use_effective_conv2d=True),
    "adalora": AdaLoraConfig(init_r=5, lora_alpha=6, target_modules=["to_q", "to_k"], total_step=9),
    "oft": OFTConfig(oft_block_size=4, target_modules=["to_q", "to_k"]),
    "oft of three terms": OFTConfig(oft_block_size=4, target_modules=["to_q"], num_cayley_neumann_terms=3),
    "oft of seven terms": OFTConfig(oft_block_size=4, target_modules=["to_q"], num_cayley_neumann_terms=7),
    "oft on convolutions": OFTConfig(oft_block_size=6, target_modules=["conv1"], use_cayley_neumann=False),
    "oft of shared blocks": OFTConfig(oft_block_size=8, target_modules=["to_k"], block_share=True),
    "constrained oft": OFTConfig(oft_block_size=8, target_modules=["to_q"], coft=True, eps=0.3),
    "boft": BOFTConfig(boft_block_size=4, target_modules=["to_q", "to_k"]),
    "boft on convolutions": BOFTConfig(boft_block_size=4, target_modules=["conv1"]),
    "ia3": IA3Config(target_modules=["to_q", "ff.net.2"], feedforward_modules=["ff.net.2"]),
}


@pytest.mark.parametrize("config", PEFT.values(), ids=PEFT.keys())
def test_what_peft_writes_is_what_peft_adds(tmp_path, config):
    model = get_peft_model(make_unet(), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=1 if config.peft_type == "IA3" else 0, std=0.3)
    model.save_pretrained(tmp_path)
    before, after = make_unet().state_dict(), model.merge_and_unload().state_dict()
    changes = {
        name.removesuffix(".weight"): after[name].double() - weight.double()
        for name, weight in before.items()
        if not torch.equal(after[name], weight)
    }
    assert changes
    assert_changes(open_updates(FolderModel(tmp_path)), changes)


LYCORIS = {
    "lora": {"algo": "lora"},
    "lora with Tucker cores": {"algo": "lora", "use_tucker": True},
    "dora": {"algo": "lora", "weight_decompose": True},
    "dora of columns": {"algo": "lora", "weight_decompose": True, "wd_on_out": False},
    "loha": {"algo": "loha"},
    "loha with Tucker cores": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr with Tucker cores": {"algo": "lokr", "factor": 4, "use_tucker": True},
    "lokr of two products": {"algo": "lokr", "factor": 8, "decompose_both": True},
    "lokr of two matrices": {"algo": "lokr", "linear_dim": 10000, "conv_dim": 10000},
    "dora of lokr": {"algo": "lokr", "factor": 4, "weight_decompose": True},
    "oft": {"algo": "diag-oft"},
    "oft with rescale": {"algo": "diag-oft", "rescaled": True, "constraint": 0.01},
    "boft": {"algo": "boft", "rescaled": True},
    "glora": {"algo": "glora"},
    "ia3": {"algo": "ia3"},
    "full": {"algo": "full"},
}


def merged_by_lycoris(lora):
    """The weight that it trains with. Its own `get_merged_weight` applies the scale of LoHa and LoKr twice (4.1.3)."""
    if lora.name not in ("loha", "kron"):
        return lora.get_merged_weight(shape=lora.shape)[0]
    weight = lora.org_weight + lora.get_weight(lora.shape)
    return lora.apply_weight_decompose(weight) if lora.wd else weight


@pytest.mark.parametrize("options", LYCORIS.values(), ids=LYCORIS.keys())
def test_what_lycoris_writes_is_what_lycoris_adds(tmp_path, options):
    unet = make_unet()
    LycorisNetwork.apply_preset({"target_module": ["Transformer2DModel", "ResnetBlock2D"]})
    dims = {"linear_dim": 2, "linear_alpha": 3, "conv_dim": 2, "conv_alpha": 1}
    network = create_lycoris(unet, 1.0, **(dims | options))
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    network.apply_to()
    torch.manual_seed(1)
    for parameter in network.parameters():
        with torch.no_grad():
            parameter += 0.1 * torch.randn_like(parameter)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, tmp_path / "m.safetensors")
    names = {flat(name): name for name, _ in unet.named_modules()}
    changes = {}
    for lora in network.loras:
        name = names[lora.lora_name.removeprefix("lycoris_")]
        changes[name] = merged_by_lycoris(lora).detach().double() - before[f"{name}.weight"].double()
    found = open_updates(FolderModel(tmp_path / "m.safetensors"))
    biases = {name for name in found.targets if name.endswith(".bias")}
    assert_changes(replace(found, targets={k: v for k, v in found.targets.items() if k not in biases}), changes)


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


def test_a_dora_cannot_be_read_without_its_base_and_the_way_out_is_told(tmp_path):
    tensors = {
        f"base_model.model.{MODULE}.lora_A.weight": torch.randn(2, 5),
        f"base_model.model.{MODULE}.lora_B.weight": torch.randn(6, 2),
        f"base_model.model.{MODULE}.lora_magnitude_vector": torch.randn(6),
    }
    with pytest.raises(UsageError, match=r"dora.*Export its weight differences \(\.diff\)"):
        read(tmp_path, tensors)
    update = opened(tmp_path, tensors).targets[MODULE]
    with pytest.raises(DataError, match="the base's is"):
        update.read()
    with pytest.raises(DataError, match=r"the base's is \(6, 4\)"):
        update.read(torch.ones(6, 4))


def test_biases_are_updates_of_their_own(tmp_path):
    bias = torch.randn(6)
    tensors = {
        f"{STEM}.lora_down.weight": torch.randn(2, 5),
        f"{STEM}.lora_up.weight": torch.randn(6, 2),
        f"{STEM}.alpha": torch.tensor(1.0),
        f"{STEM}.diff_b": bias,
    }
    found = opened(tmp_path, tensors)
    assert found.targets.keys() == {MODULE, f"{MODULE}.bias"}
    assert torch.equal(found.targets[f"{MODULE}.bias"].read(), bias.reshape(1, 6))


def test_norms_have_differences_of_weight_and_bias(tmp_path):
    stem, norm = "lora_unet_mid_block_resnets_0_norm1", "mid_block.resnets.0.norm1"
    found = opened(tmp_path, {f"{stem}.w_norm": torch.ones(4), f"{stem}.b_norm": 2 * torch.ones(4)})
    assert found.targets[norm].read().tolist() == [[1.0] * 4]
    assert found.targets[f"{norm}.bias"].read().tolist() == [[2.0] * 4]


def test_a_weight_in_the_place_of_the_base_s_is_their_difference(tmp_path):
    value, base = torch.randn(6, 5), torch.randn(6, 5)
    update = opened(tmp_path, {f"{STEM}.set_weight": value}).targets[MODULE]
    assert update.needs_weight
    assert torch.equal(update.read(base), value - base)


def test_what_flux_fuses_is_parted_as_diffusers_names_it(tmp_path):
    down, up = torch.randn(2, 8), torch.randn(24, 2)
    stem = "lora_unet_double_blocks_3_img_attn_qkv"
    single = "lora_unet_single_blocks_0_linear1"
    tensors = {
        f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.diff_b": torch.arange(24.0),
        f"{single}.lora_down.weight": down.clone(), f"{single}.lora_up.weight": torch.randn(56, 2),
    }  # fmt: skip
    found = opened(tmp_path, tensors)
    assert found.unmatched == ()
    for place, name in enumerate("qkv"):
        update = found.targets[f"transformer_blocks.3.attn.to_{name}"]
        rows = slice(8 * place, 8 * place + 8)
        assert (update.component, update.shape) == ("transformer", (8, 8))
        assert torch.equal(matrix(update.read()), (up.double() @ down.double())[rows])
        bias = found.targets[f"transformer_blocks.3.attn.to_{name}.bias"]
        assert bias.read().tolist() == [list(range(8 * place, 8 * place + 8))]
    assert found.targets["single_transformer_blocks.0.proj_mlp"].shape == (32, 8)
    assert found.targets["single_transformer_blocks.0.attn.to_v"].shape == (8, 8)


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
        (loha(hada_t1=torch.ones(2, 2, 3, 3)), DataError, "not the shapes of a LoHa with Tucker cores"),
        (loha() | {f"{STEM}.lora_down.weight": torch.ones(2, 5), f"{STEM}.lora_up.weight": torch.ones(6, 2)},
         DataError, "which one counts"),
        (loha() | {f"{STEM}.diff": torch.ones(6, 5)}, DataError, "which one counts"),
        ({f"{STEM}.diff": torch.full((6, 5), float("inf"))}, DataError, "NaN or infinite"),
        ({f"{STEM}.diff": torch.ones(6, 5), f"{STEM}.lokr_w1": torch.ones(2, 2)}, DataError, "which one counts"),
        ({f"{STEM}.lokr_w1": torch.ones(2, 2)}, DataError, "neither w2 nor both"),
        ({f"{STEM}.a1.weight": torch.ones(2, 2)}, DataError, r"GLoRA lacks \.a2\.weight"),
        ({f"{STEM}.lambda_layer": torch.ones(2)}, UsageError, "t-lora"),
        ({f"{STEM}.oft_r": torch.ones(2, 2)}, DataError, "oft_blocks"),
        ({f"{MODULE}.oft_R.weight": torch.ones(2, 6)}, UsageError, r"oft_R\.weight .*adapter_config\.json"),
        ({f"{MODULE}.boft_R": torch.ones(2, 2, 4, 4), f"{MODULE}.boft_s": torch.ones(6, 1)}, UsageError,
         r"boft_R has 2 butterfly stages.*merge_and_unload"),
        ({f"{MODULE}.boft_R": torch.ones(1, 2, 4, 4)}, DataError, "lacks boft_s"),
        ({f"{MODULE}.lora_A": torch.ones(2, 5), f"{MODULE}.lora_B": torch.ones(6, 2),
          f"{MODULE}.lora_E": torch.ones(2, 1)}, UsageError, r"lora_E belongs to an AdaLoRA.*adapter_config\.json"),
        ({"conv_in.weight": torch.ones(4, 4)}, UsageError, "holds no adapter"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(tmp_path, tensors, error, message):
    with pytest.raises(error, match=message):
        read(tmp_path, tensors)


def test_what_adalora_has_cut_is_not_there_and_the_scale_stays(tmp_path):
    config = AdaLoraConfig(init_r=4, lora_alpha=6, target_modules=["to_q"], total_step=9)
    model = get_peft_model(make_unet(), config)
    names = [name for name, _ in model.named_parameters() if "lora_E" in name]
    kept = {name: [True, False, True, False] for name in names} | {names[0]: [False] * 4}
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
            if name in kept:
                parameter *= torch.tensor(kept[name]).unsqueeze(1)
    model.peft_config["default"].rank_pattern = {
        name.removeprefix("base_model.model."): places for name, places in kept.items()
    }
    model.save_pretrained(tmp_path)
    before, after = make_unet().state_dict(), model.merge_and_unload().state_dict()
    found = open_updates(FolderModel(tmp_path))
    changes = {name.removesuffix(".weight"): after[name].double() - before[name].double() for name in before}
    assert_changes(found, {name: changes[name] for name in found.targets})
    assert len(found.targets) == len(names) - 1
    assert {update.read().rank for update in found.targets.values()} == {2}


def test_older_gloras_have_the_names_of_each_pair_the_other_way_round(tmp_path):
    torch.manual_seed(0)
    parts = {"a1": (5, 2), "a2": (2, 5), "b1": (6, 2), "b2": (2, 5)}
    tensors = {name: torch.randn(shape) for name, shape in parts.items()}
    older = {"a1": tensors["a2"], "a2": tensors["a1"], "b1": tensors["b2"], "b2": tensors["b1"]}
    weight = torch.randn(6, 5)
    for group in (tensors, older):
        file = {f"{STEM}.{name}.weight": tensor for name, tensor in group.items()} | {
            f"{STEM}.alpha": torch.tensor(1.0)
        }
        found = opened(tmp_path, file).targets[MODULE].read(weight)
        wanted = 0.5 * (weight @ tensors["a1"] @ tensors["a2"] + tensors["b1"] @ tensors["b2"])
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # the same sums of float32


def test_a_small_file_cannot_make_a_huge_matrix(tmp_path):
    wide, tall = torch.zeros(1, 2**15), torch.zeros(2**15, 1)
    with pytest.raises(DataError, match="at most 268435456"):
        read(tmp_path, loha(hada_w1_a=tall, hada_w2_a=tall.clone(), hada_w1_b=wide, hada_w2_b=wide.clone()))
