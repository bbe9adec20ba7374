"""LoRA files of every convention against the libraries that write them: peft's own delta is the reference."""

import json
import math

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.adapters import open_adapter, read_adapter
from modelgrove_hub.testing import FolderModel

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0"
TARGETS = ["to_q", "to_k", "to_out.0", "conv1", "proj_in", "ff.net.2"]
# Factors pass through float32 unchanged; peft multiplies and scales in another order.
EXACT = 1e-6


def make_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def randomise(unet):
    torch.manual_seed(1)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def deltas(unet):
    """Module → what peft adds to its weight."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight(module.active_adapters[0]).detach()
        for name, module in unet.named_modules()
        if isinstance(module, LoraLayer)
    }


def assert_same(adapter, wanted):
    assert adapter.modules.keys() == wanted.keys()
    assert adapter.unmatched == ()
    for name, factors in adapter.modules.items():
        found = (factors.up @ factors.down).reshape(wanted[name].shape)
        assert torch.allclose(found, wanted[name], rtol=0, atol=EXACT * float(wanted[name].abs().max())), name


CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "patterns": {
        "r": 4,
        "lora_alpha": 2,
        "rank_pattern": {"to_k": 3, f"^{ATTENTION}.attn1.to_q": 7, r"resnets\.\d+\.conv1": 2},
        "alpha_pattern": {"attn2.to_q": 16, "conv1": 5},
    },
    "rank-stabilised": {"r": 9, "lora_alpha": 6, "use_rslora": True},
}


@pytest.fixture(params=CONFIGS, ids=str)
def config(request):
    return LoraConfig(target_modules=TARGETS, **CONFIGS[request.param])


def test_a_peft_folder_is_read_as_peft_applies_it(config, tmp_path):
    unet = get_peft_model(make_unet(), config)
    randomise(unet)
    unet.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    assert_same(read_adapter(FolderModel(tmp_path)), deltas(unet))


def test_a_diffusers_file_is_read_by_the_configuration_in_its_metadata(config, tmp_path):
    unet = make_unet()
    unet.add_adapter(config)
    randomise(unet)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    assert_same(read_adapter(FolderModel(tmp_path)), deltas(unet))


def test_a_diffusers_file_without_configuration_has_scale_one(tmp_path):
    unet = make_unet()
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    randomise(unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(unet))
    assert_same(read_adapter(FolderModel(tmp_path)), deltas(unet))


def test_a_model_s_own_adapter_file_is_read(tmp_path):
    unet = make_unet()
    unet.add_adapter(LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS))
    randomise(unet)
    unet.save_lora_adapter(tmp_path)
    assert_same(read_adapter(FolderModel(tmp_path)), deltas(unet))


def kohya(modules, alpha=None, seed=0):
    """Tensors of a kohya file: module → (out, in, kernel or ()), rank 3."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (out, width, kernel) in modules.items():
        name = "lora_unet_" + module.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = torch.randn(3, width, *kernel, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, 3, *(1 for _ in kernel), generator=generator)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors


KOHYA = {
    f"{ATTENTION}.attn1.to_q": (32, 32, ()),
    f"{ATTENTION}.attn2.to_k": (32, 24, ()),
    f"{ATTENTION}.ff.net.0.proj": (256, 32, ()),
    "down_blocks.1.attentions.0.proj_in": (32, 32, (1, 1)),
    "mid_block.resnets.0.conv1": (32, 32, (3, 3)),
    "up_blocks.0.upsamplers.0.conv": (32, 32, (3, 3)),
    "time_embedding.linear_1": (64, 16, ()),
}


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_a_kohya_file_is_read_as_diffusers_applies_it(alpha, tmp_path):
    save_file(kohya(KOHYA, alpha), tmp_path / "style.safetensors")
    unet = make_unet()
    state, alphas = StableDiffusionPipeline.lora_state_dict(tmp_path / "style.safetensors", unet_config=unet.config)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet)
    adapter = read_adapter(FolderModel(tmp_path / "style.safetensors"))
    assert {factors.component for factors in adapter.modules.values()} == {"unet"}
    assert adapter.modules["mid_block.resnets.0.conv1"].kernel == (3, 3)
    assert_same(adapter, deltas(unet))


def test_half_precision_files_are_read_in_float32_and_say_what_they_were(tmp_path):
    tensors = {name: tensor.half() for name, tensor in kohya(KOHYA, 1.0).items()}
    tensors |= {name: tensor.float() for name, tensor in tensors.items() if "attn1" in name}
    save_file(tensors, tmp_path / "style.safetensors")
    adapter = read_adapter(FolderModel(tmp_path / "style.safetensors"))
    assert adapter.dtype == "F32"
    assert all(factors.up.dtype == torch.float32 for factors in adapter.modules.values())


def test_a_name_whose_dots_are_unknown_stays_flat(tmp_path):
    save_file(kohya({"strange.module_of.mine": (8, 8, ())}), tmp_path / "strange.safetensors")
    [factors] = read_adapter(FolderModel(tmp_path / "strange.safetensors")).modules.values()
    assert factors.module == "strange_module_of_mine"
    assert not factors.restored


def test_what_belongs_to_no_factors_is_reported(tmp_path):
    tensors = kohya({f"{ATTENTION}.attn1.to_q": (32, 32, ())})
    extra = {
        "bundle_emb.token.string_to_param.*": torch.ones(2, 24),
        "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": torch.ones(4, 2),
        "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0),
    }
    save_file(tensors | extra, tmp_path / "more.safetensors")
    file = open_adapter(FolderModel(tmp_path / "more.safetensors"))
    assert set(file.unmatched) == extra.keys()
    assert file.coverage["modules"] == 1


def saved(tmp_path, tensors, metadata=None):
    save_file(tensors, tmp_path / "lora.safetensors", metadata)
    return FolderModel(tmp_path / "lora.safetensors")


OTHER_KINDS = {
    "loha": {"lora_unet_x.hada_w1_a": (4, 2), "lora_unet_x.hada_w1_b": (2, 4)},
    "lokr": {"lora_unet_x.lokr_w1": (2, 2), "lora_unet_x.lokr_w2": (4, 4)},
    "dora": {"unet.x.lora_A.weight": (2, 8), "unet.x.lora_B.weight": (8, 2), "unet.x.lora_magnitude_vector": (8,)},
    "oft": {"lora_unet_x.oft_blocks": (2, 4, 4)},
    "ia3": {"lora_unet_x.weight": (8,), "lora_unet_x.on_input": ()},
    "lora_mid": {"lora_unet_x.lora_down.weight": (2, 8, 1, 1), "lora_unet_x.lora_mid.weight": (2, 2, 3, 3)},
    "diff": {"diffusion_model.x.diff": (8, 8)},
    "adalora": {
        f"base_model.model.x.lora_{part}": shape for part, shape in (("A", (2, 8)), ("B", (8, 2)), ("E", (2, 1)))
    },
    "vera": {"base_model.model.x.vera_lambda_b": (8,)},
    "easycontrol": {"transformer_blocks.0.attn.processor.q_loras.0.down.weight": (2, 8)},
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_adapters_are_refused_by_name(kind, tmp_path):
    tensors = {name: torch.ones(shape) for name, shape in OTHER_KINDS[kind].items()}
    with pytest.raises(UsageError, match=kind):
        read_adapter(saved(tmp_path, tensors))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    ],
)
def test_a_peft_configuration_of_another_kind_is_refused_by_name(fields, message, tmp_path):
    tensors = {
        "base_model.model.x.lora_A.weight": torch.ones(2, 4),
        "base_model.model.x.lora_B.weight": torch.ones(4, 2),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, **fields}))
    with pytest.raises(UsageError, match=message):
        read_adapter(FolderModel(tmp_path))


def test_the_components_that_peft_keeps_in_folders_are_told_apart(tmp_path):
    for folder, width in (("unet", 4), ("text_encoder", 6)):
        (tmp_path / folder).mkdir()
        factors = {"A": torch.ones(2, width), "B": torch.ones(width, 2)}
        tensors = {f"base_model.model.x.lora_{part}.weight": values for part, values in factors.items()}
        save_file(tensors, tmp_path / folder / "adapter_model.safetensors")
    targets = open_adapter(FolderModel(tmp_path)).targets
    assert {name: target.shape for name, target in targets.items()} == {"x": (4, 4), "text_encoder.x": (6, 6)}


def test_a_checkpoint_is_no_adapter(tmp_path):
    with pytest.raises(UsageError, match=r"no LoRA factors.*conv_in\.weight"):
        read_adapter(saved(tmp_path, {"conv_in.weight": torch.ones(4, 4, 3, 3)}))


DOWN, UP = "unet.x.lora_A.weight", "unet.x.lora_B.weight"
BROKEN = {
    "rank 0": ({DOWN: torch.ones(0, 4), UP: torch.ones(4, 0)}, "rank or width is 0"),
    "other ranks": ({DOWN: torch.ones(2, 4), UP: torch.ones(4, 3)}, "not the factors of one update"),
    "a linear and a convolution": ({DOWN: torch.ones(2, 4), UP: torch.ones(4, 2, 1, 1)}, "not the factors"),
    "a wide up": ({DOWN: torch.ones(2, 4, 1, 1), UP: torch.ones(4, 2, 3, 3)}, "not the factors of one update"),
    "vectors": ({DOWN: torch.ones(2), UP: torch.ones(2)}, "two to five dimensions"),
    "NaN": ({DOWN: torch.full((2, 4), math.nan), UP: torch.ones(4, 2)}, "NaN or infinite"),
    "infinite": ({DOWN: torch.ones(2, 4), UP: torch.full((4, 2), math.inf)}, "NaN or infinite"),
    "integers": ({DOWN: torch.ones(2, 4).to(torch.int8), UP: torch.ones(4, 2)}, "is I8"),
    "twice": ({DOWN: torch.ones(2, 4), UP: torch.ones(4, 2), "unet.x.lora.down.weight": torch.ones(2, 4)}, "both"),
    "an alpha of many": ({DOWN: torch.ones(2, 4), UP: torch.ones(4, 2), "unet.x.alpha": torch.ones(3)}, "one number"),
    "an infinite alpha": (
        {DOWN: torch.ones(2, 4), UP: torch.ones(4, 2), "unet.x.alpha": torch.tensor(math.inf)},
        "finite",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_factors_are_refused_with_the_tensor_s_name(fault, tmp_path):
    tensors, message = BROKEN[fault]
    with pytest.raises(DataError, match=message) as caught:
        read_adapter(saved(tmp_path, tensors))
    assert "unet.x" in str(caught.value)


GOOD = {DOWN: torch.ones(2, 4), UP: torch.ones(4, 2)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        ('{"unet.r": 3}', "rank 2, but the configuration says 3"),
        ('{"unet.r": "many"}', "r: "),
        ('{"unet.lora_alpha": NaN}', "lora_alpha"),
        ('{"unet.rank_pattern": {"(x+)+y": 2}}', "too complicated"),
        ('{"unet.rank_pattern": {"(.*.*.*)": 2}}', "too complicated"),
        ('{"unet.rank_pattern": {"[": 2}}', "no regular expression"),
    ],
)
def test_a_broken_configuration_is_refused(text, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_adapter(saved(tmp_path, GOOD, {"lora_adapter_metadata": text}))
