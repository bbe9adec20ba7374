"""Adapters of every kind and convention: what they are, what they change, and whose they are."""

import original_names as original
import pytest
from real_configs import listing, shapes

from modelgrove_hub.formats.recognise import recognise


def weights(model, *words):
    """Module → (out, in, …) of the model's weights whose name has one of the words."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes(model).items()
        if name.endswith(".weight") and len(shape) > 1 and any(word in name for word in words)
    }


def lora(modules, down=".lora_A.weight", up=".lora_B.weight", rank=8, prefix="", alpha=None):
    made = {}
    for module, (out, inside, *kernel) in modules.items():
        name = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)
        made |= {name + down: (rank, inside, *kernel), name + up: (out, rank, *(1 for _ in kernel))}
        made |= {name + alpha: ()} if alpha else {}
    return made


KOHYA = {"down": ".lora_down.weight", "up": ".lora_up.weight", "alpha": ".alpha", "prefix": "lora_unet_"}
CONVENTIONS = {
    "kohya": KOHYA,
    "diffusers": {"prefix": "unet."},
    "peft": {"prefix": "base_model.model."},
    "bare": {},
}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(
    ("model", "family"), [("sd1.5", "sd1"), ("sd2.1", "sd2"), ("sdxl base", "sdxl"), ("zoo", "zoo")]
)
def test_the_base_of_a_unet_lora_is_told_in_every_convention(model, family, convention):
    tensors = lora(weights(model, "attn1.", "attn2.", ".ff."), **CONVENTIONS[convention])
    found = recognise(listing(tensors))
    assert (found.kind, found.family, found.adapter_type) == ("adapter", family, "lora"), found.reasons
    assert (found.convention, found.coverage, found.text_encoder) == (convention, 1, False)
    assert found.ranks == {"min": 8, "max": 8, "common": 8}
    assert {"attn1.to_q", "attn2.to_k", "ff.net.0.proj"} <= found.targets.keys()


@pytest.mark.parametrize(
    ("model", "words", "family"),
    [
        ("flux dev", ("attn",), "flux"),
        ("sd3 medium", ("attn",), "sd3"),
        ("pixart sigma", ("attn",), "pixart"),
        ("hidream i1", ("attn1.to",), "hidream-i1"),
        ("wan 2.1 1.3B", ("attn",), "wan"),
        ("svd", ("transformer_blocks",), "svd"),
        ("minilm", ("query", "value"), "bert"),
    ],
)
def test_the_base_of_a_transformer_lora_is_told(model, words, family):
    found = recognise(listing(lora(weights(model, *words), prefix="transformer.")))
    assert (found.family, found.adapter_type) == (family, "lora"), found.reasons


def test_old_diffusers_names_of_attention_processors_are_understood():
    tensors = {}
    for module, (out, inside) in weights("sd1.5", "attn2.").items():
        head, _, tail = module.replace("to_out.0", "to_out").rpartition(".")
        tensors[f"unet.{head}.processor.{tail}_lora.down.weight"] = (4, inside)
        tensors[f"unet.{head}.processor.{tail}_lora.up.weight"] = (out, 4)
    tensors |= {
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight": (4, 768),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight": (768, 4),
    }
    found = recognise(listing(tensors))
    assert (found.family, found.convention, found.text_encoder) == ("sd1", "diffusers", True)


def test_locon_with_a_text_encoder_is_a_lora_of_sd1_and_never_a_checkpoint():
    text = {k: v for k, v in original.clip_text().items() if ("proj" in k or "fc" in k) and k.endswith(".weight")}
    tensors = lora(weights("sd1.5", "attentions", "resnets", "samplers"), **KOHYA)
    modules = {k.removesuffix(".weight"): v for k, v in text.items()}
    tensors |= lora(modules, **(KOHYA | {"prefix": "lora_te_"}))
    found = recognise(listing(tensors, scalars={name: 4.0 for name in tensors if name.endswith(".alpha")}))
    assert (found.kind, found.family, found.text_encoder) == ("adapter", "sd1", True)
    assert found.alphas == {"min": 4.0, "max": 4.0, "common": 4.0}
    assert found.sections["text_encoder"] == 72


def test_sdxl_in_kohyas_block_names_is_told_by_its_widths():
    modules = {"input_blocks.4.1.transformer_blocks.1.attn2.to_k": (640, 2048)}
    assert recognise(listing(lora(modules, **KOHYA))).family == "sdxl"


@pytest.mark.parametrize(
    ("model", "words", "candidates"),
    [
        ("sd1.5", ("attn1.",), ("sd1", "sd2")),
        ("qwen image", ("attn",), ()),
        ("flux 2", ("attn",), ()),
        ("llama", ("proj",), ()),
    ],
)
def test_what_could_be_of_several_bases_or_of_none_has_no_family(model, words, candidates):
    found = recognise(listing(lora(weights(model, *words))))
    if model == "qwen image":  # four of its sixty blocks would fit FLUX by name and width
        found = recognise(listing(lora({"transformer_blocks.40.attn.to_q": (3072, 3072)})))
    assert (found.kind, found.family, found.base_candidates) == ("adapter", "unknown", candidates)


def test_a_text_encoder_alone_fits_every_base_that_has_one_of_its_width():
    modules = {"text_model.encoder.layers.0.self_attn.q_proj": (768, 768)}
    found = recognise(listing(lora(modules, **(KOHYA | {"prefix": "lora_te_"}))))
    assert found.family == "unknown"
    assert {"sd1", "sdxl"} <= set(found.base_candidates)
    assert "sd2" not in found.base_candidates


MODULES = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
]
SHAPES = dict(zip(MODULES, [(320, 768), (1280, 768)], strict=True))


def flat(ends):
    return {
        f"lora_unet_{module.replace('.', '_')}.{end}": shape
        for module, (out, inside) in SHAPES.items()
        for end, shape in ends(out, inside).items()
    }


KINDS = {
    "loha": lambda out, inside: {f"hada_w{i}_{x}": (out, 4) if x == "a" else (4, inside) for i in (1, 2) for x in "ab"},
    "lokr": lambda out, inside: {"lokr_w1": (8, 8), "lokr_w2_a": (out // 8, 4), "lokr_w2_b": (4, inside // 8)},
    "oft": lambda out, inside: {"oft_blocks": (out // 40, 40, 40), "alpha": ()},
    "boft": lambda out, inside: {"oft_blocks": (3, out // 40, 40, 40), "alpha": ()},
    "dora": lambda out, inside: {
        "lora_down.weight": (4, inside), "lora_up.weight": (out, 4), "dora_scale": (1, inside), "alpha": ()
    },
    "ia3": lambda out, inside: {"weight": (out,), "on_input": ()},
    "glora": lambda out, inside: {
        "a1.weight": (4, inside), "a2.weight": (inside, 4), "b1.weight": (4, inside), "b2.weight": (out, 4)
    },
    "diff": lambda out, inside: {"diff": (out, inside), "diff_b": (out,)},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_lycoris_kind_is_told_by_its_suffixes(kind):
    found = recognise(listing(flat(KINDS[kind])))
    assert (found.kind, found.adapter_type, found.coverage) == ("adapter", kind, 1)
    assert found.targets == {"attn2.to_k": 1, "attn2.to_v": 1}


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora", "diff"])
def test_the_base_is_told_where_the_factors_give_both_widths(kind):
    assert recognise(listing(flat(KINDS[kind]))).family == "sd1"


@pytest.mark.parametrize("kind", ["oft", "ia3"])
def test_the_base_stays_open_where_they_do_not(kind):
    assert recognise(listing(flat(KINDS[kind]))).family == "unknown"


@pytest.mark.parametrize(
    ("end", "kind"),
    [("ia3_l", "ia3"), ("oft_R.weight", "oft"), ("boft_R", "boft")],
)
def test_pefts_own_kinds_are_told(end, kind):
    tensors = {f"base_model.model.encoder.layer.{i}.attention.self.query.{end}": (384, 1) for i in range(3)}
    found = recognise(listing(tensors))
    assert (found.adapter_type, found.convention) == (kind, "peft")


def test_dora_of_peft_is_told_by_its_magnitudes():
    tensors = lora(weights("minilm", "query"), prefix="base_model.model.")
    tensors |= {n.replace("lora_A.weight", "lora_magnitude_vector"): (384,) for n in list(tensors) if "lora_A" in n}
    assert recognise(listing(tensors)).adapter_type == "dora"


def test_two_kinds_in_one_file_are_called_a_mixture():
    tensors = flat(KINDS["loha"]) | lora({"conv_in": (320, 4, 3, 3)}, **KOHYA)
    found = recognise(listing(tensors))
    assert found.adapter_type == "mixed"
    assert any(reason.startswith("mixed adapter") for reason in found.reasons)


def test_a_checkpoint_with_adapter_tensors_in_it_is_called_a_mixed_file():
    found = recognise(listing(shapes("zoo") | lora(weights("zoo", "attn2."), **KOHYA)))
    assert (found.kind, found.family, found.adapter_type) == ("checkpoint", "zoo", "mixed")
    assert any(reason.startswith("mixed file") for reason in found.reasons)


def test_factors_that_do_not_fit_each_other_are_counted_out_and_named():
    tensors = lora(weights("zoo", "attn2."), **KOHYA)
    broken = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors[f"{broken}.lora_up.weight"] = (160, 3)
    found = recognise(listing(tensors))
    assert found.coverage < 1
    assert any(broken in name for name in found.unmatched)
    assert any("do not fit each other" in reason for reason in found.reasons)


def test_alpha_comes_from_the_adapter_config_when_no_tensor_has_it():
    tensors = lora(weights("minilm", "query"), prefix="base_model.model.")
    found = recognise(
        listing(tensors, configs={"adapter_config.json": {"lora_alpha": 32, "base_model_name_or_path": "b"}})
    )
    assert (found.alphas["common"], found.declared_base) == (32.0, "b")


def test_a_declared_base_that_the_tensors_deny_is_mentioned():
    found = recognise(
        listing(lora(weights("sd1.5", "attn2."), **KOHYA), metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    )
    assert found.family == "sd1"
    assert any("declares sdxl_base_v1-0" in reason for reason in found.reasons)


def test_easycontrol_is_told_and_must_not_be_baked():
    tensors = {}
    for x in ("q", "k", "v", "proj"):
        name = f"transformer_blocks.0.attn.processor.{x}_loras.0"
        tensors |= {f"{name}.down.weight": (128, 3072), f"{name}.up.weight": (3072, 128)}
    found = recognise(listing(tensors))
    assert (found.kind, found.adapter_type, found.ranks["common"]) == ("adapter", "easycontrol", 128)
    assert any("must not be baked" in reason for reason in found.reasons)


def test_a_peft_method_that_is_not_known_here_is_what_its_config_declares():
    found = recognise(
        listing({"prompt_embeddings": (4, 64)}, configs={"adapter_config.json": {"peft_type": "P_TUNING"}})
    )
    assert (found.kind, found.adapter_type, found.family, found.coverage) == ("adapter", "p_tuning", "unknown", 0)


# What peft 0.21 writes for a Llama's q_proj with the method's own defaults.
PEFT_NAMES = {
    "adamss": ["q_proj.adamss_A.0", "q_proj.adamss_B.0", "q_proj.adamss_newB"],
    "frod": ["frod_V.self_attn_q_proj", "q_proj.frod_lambda_l", "q_proj.frod_lambda_s_values"],
    "glora": ["q_proj.glora_A.Xd", "q_proj.glora_A.Xu", "q_proj.glora_C.zeros"],
    "hra": ["q_proj.hra_u"],
    "ln_tuning": ["q_proj.ln_tuning_layers.weight"],
    "trainable_tokens": ["embed_tokens.trainable_tokens_delta"],
    "unilora": ["unilora_theta_d"],
    "vera": ["vera_A", "vera_B", "q_proj.vera_lambda_b", "q_proj.vera_lambda_d"],
}


@pytest.mark.parametrize("method", PEFT_NAMES)
def test_other_peft_methods_are_told_by_their_names_without_a_config(method):
    found = recognise(listing({f"base_model.model.{name}": (4,) for name in PEFT_NAMES[method]}))
    assert (found.kind, found.adapter_type, found.family, found.coverage) == ("adapter", method, "unknown", 1)
    assert any("cannot be merged" in reason for reason in found.reasons)


def test_every_method_of_the_installed_peft_has_a_name_here_or_is_left_to_its_config():
    peft = pytest.importorskip("peft")
    from modelgrove_hub.formats.naming import adapter_names

    names = adapter_names()
    known = {kind.name for kind in names.kinds} | names.marks.keys()
    soft_prompts = {"prompt_tuning", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "cpt", "cartridge"}
    assert {kind.value.lower() for kind in peft.PeftType} - known <= soft_prompts | {"shadow"}


def test_adalora_is_no_plain_lora():
    tensors = {f"base_model.model.q_proj.lora_{part}": shape for part, shape in ADALORA.items()}
    found = recognise(listing(tensors))
    assert (found.adapter_type, found.coverage, found.ranks["common"]) == ("adalora", 1, 12)


ADALORA = {"A": (12, 64), "B": (64, 12), "E": (12, 1)}


@pytest.mark.parametrize("prefix", ["prior.", "transformer_2.", "transformer_ref.", "model.diffusion_model."])
def test_every_denoiser_that_diffusers_loads_a_lora_into_is_one_here(prefix):
    found = recognise(listing(lora({"blocks.0.attn1.to_q": (64, 64)}, prefix=prefix)))
    assert (found.kind, found.sections, found.text_encoder) == ("adapter", {"denoiser": 1}, False)
    assert found.targets == {"attn1.to_q": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_is_not_reported(value):
    tensors = lora(weights("zoo", "attn2."), **KOHYA)
    found = recognise(listing(tensors, scalars={name: value for name in tensors if name.endswith(".alpha")}))
    assert found.alphas == {}


def test_texts_of_strangers_are_cut_and_cleaned():
    metadata = {"modelspec.title": "a\0b\x1b[31m\ud800" + "x" * 5000, "ss_tag_frequency": '{"a": {"c\\u0000t": 1}}'}
    found = recognise(listing({}, metadata=metadata))
    assert found.metadata["title"].startswith("a b [31m x")
    assert len(found.metadata["title"]) <= 2000
    assert found.metadata["frequent_tags"] == ["c t"]
