"""Real models' configurations, built on the meta device: names and shapes as their classes have them.

The configurations are those of the released config.json files; defaults of the class are left out.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from modelgrove_hub.formats.listing import ListedTensor, Listing


class Real(NamedTuple):
    """A class, its configuration, and what recognition must say."""

    library: str
    cls: str
    config: dict[str, Any]
    kind: str
    family: str
    variant: str | None = None
    bases: tuple[str, ...] = ()


DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
SD1 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (DOWN[1],) * 3 + (DOWN[0],),
    "up_block_types": (UP[0],) + (UP[1],) * 3,
}
SD2 = SD1 | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
XL_LEVELS = {
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": (DOWN[0], DOWN[1], DOWN[1]),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL = XL_LEVELS | {"sample_size": 128, "up_block_types": (UP[1], UP[1], UP[0])}
REFINER = SDXL | {
    "block_out_channels": (384, 768, 1536, 1536),
    "attention_head_dim": (6, 12, 24, 24),
    "transformer_layers_per_block": 4,
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
    "down_block_types": (DOWN[0], DOWN[1], DOWN[1], DOWN[0]),
    "up_block_types": (UP[0], UP[1], UP[1], UP[0]),
}
SD3 = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
PIXART = {
    "sample_size": 128,
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
}
HIDREAM = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 16,
    "num_single_layers": 32,
    "attention_head_dim": 128,
    "num_attention_heads": 20,
    "caption_channels": [4096, 4096],
    "text_emb_dim": 2048,
    "axes_dims_rope": (64, 32, 32),
    "max_resolution": (128, 128),
    "llama_layers": [*range(32)] + [31] * 16,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
}
VAE_UP = VAE | {"up_block_types": ("UpDecoderBlock2D",) * 4}
CIFAR = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
}
ZOO = {
    "in_channels": 24,
    "out_channels": 24,
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (96, 160),
    "down_block_types": DOWN,
    "up_block_types": (UP[1], UP[0]),
    "cross_attention_dim": 384,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 8,
}
VIT_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 32}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
T5_BASE = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
WAN_I2V = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
WAN_SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
D, T = "diffusers", "transformers"

REAL: dict[str, Real] = {
    "sd1.5": Real(D, "UNet2DConditionModel", SD1, "component", "sd1", "text-to-image"),
    "sd1.5 inpainting": Real(D, "UNet2DConditionModel", SD1 | {"in_channels": 9}, "component", "sd1", "inpainting"),
    "sd2.1": Real(D, "UNet2DConditionModel", SD2, "component", "sd2", "text-to-image"),
    "sdxl base": Real(D, "UNet2DConditionModel", SDXL, "component", "sdxl", "text-to-image"),
    "sdxl refiner": Real(D, "UNet2DConditionModel", REFINER, "component", "sdxl", "refiner"),
    "sd3 medium": Real(D, "SD3Transformer2DModel", SD3, "component", "sd3", "3-medium"),
    "sd3.5 medium": Real(
        D,
        "SD3Transformer2DModel",
        SD3 | {"pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
        "component",
        "sd3",
        "3.5-medium",
    ),
    "flux dev": Real(D, "FluxTransformer2DModel", {"guidance_embeds": True}, "component", "flux", "dev"),
    "flux schnell": Real(D, "FluxTransformer2DModel", {}, "component", "flux", "schnell"),
    "pixart alpha": Real(D, "PixArtTransformer2DModel", PIXART, "component", "pixart", "alpha"),
    "pixart sigma": Real(
        D, "PixArtTransformer2DModel", PIXART | {"use_additional_conditions": False}, "component", "pixart"
    ),
    "hidream i1": Real(D, "HiDreamImageTransformer2DModel", HIDREAM, "component", "hidream-i1"),
    "svd": Real(D, "UNetSpatioTemporalConditionModel", {"num_attention_heads": (5, 10, 20, 20)}, "component", "svd"),
    "svd vae": Real(D, "AutoencoderKLTemporalDecoder", VAE, "component", "svd", "temporal-vae"),
    "motion v3": Real(
        D, "MotionAdapter", {"use_motion_mid_block": False}, "adapter", "animatediff", "v1 or v3", ("sd1",)
    ),
    "motion v2": Real(D, "MotionAdapter", {}, "adapter", "animatediff", "v2", ("sd1",)),
    "motion xl": Real(
        D,
        "MotionAdapter",
        {"block_out_channels": (320, 640, 1280), "use_motion_mid_block": False},
        "adapter",
        "animatediff",
        "sdxl",
        ("sdxl",),
    ),
    "wan 2.1 1.3B": Real(D, "WanTransformer3DModel", WAN_SMALL, "component", "wan", "text-to-video 1.3B"),
    "wan 2.1 i2v": Real(D, "WanTransformer3DModel", WAN_I2V, "component", "wan", "image-to-video 14B"),
    "wan vae": Real(D, "AutoencoderKLWan", {}, "component", "wan", "video-vae"),
    "vae": Real(D, "AutoencoderKL", VAE_UP, "component", "autoencoder-kl", "4 channels"),
    "flux vae": Real(
        D,
        "AutoencoderKL",
        VAE_UP | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
        "component",
        "autoencoder-kl",
        "16 channels",
    ),
    "ddpm cifar10": Real(D, "UNet2DModel", CIFAR, "checkpoint", "ddpm-unet2d", "unconditional"),
    "controlnet sd1": Real(
        D, "ControlNetModel", {"cross_attention_dim": 768}, "adapter", "controlnet", "sd1", ("sd1",)
    ),
    "controlnet sdxl": Real(D, "ControlNetModel", XL_LEVELS, "adapter", "controlnet", "sdxl", ("sdxl",)),
    "controlnet flux": Real(
        D,
        "FluxControlNetModel",
        {"num_layers": 5, "num_single_layers": 10},
        "adapter",
        "controlnet",
        "flux",
        ("flux",),
    ),
    "controlnet sd3": Real(D, "SD3ControlNetModel", {}, "adapter", "controlnet", "sd3", ("sd3",)),
    "t2i": Real(D, "T2IAdapter", {}, "adapter", "t2i-adapter", "full", ("sd1",)),
    "t2i xl": Real(
        D,
        "T2IAdapter",
        {"adapter_type": "full_adapter_xl", "downscale_factor": 16},
        "adapter",
        "t2i-adapter",
        "full-xl",
        ("sdxl",),
    ),
    "zoo": Real(D, "UNet2DConditionModel", ZOO, "checkpoint", "zoo"),
    "minilm": Real(T, "BertModel", MINILM, "checkpoint", "bert", "minilm-l6"),
    "bert base": Real(T, "BertForMaskedLM", {}, "checkpoint", "bert", "base"),
    "clip l text": Real(
        T,
        "CLIPTextModel",
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        "component",
        "clip",
        "text-L",
    ),
    "clip bigg text": Real(T, "CLIPTextModelWithProjection", CLIP_G, "component", "clip", "text-bigG"),
    "clip h vision": Real(
        T, "CLIPVisionModelWithProjection", VIT_H | {"patch_size": 14}, "component", "clip", "vision-H"
    ),
    "clip both": Real(T, "CLIPModel", {}, "checkpoint", "clip", "both"),
    "t5 base": Real(T, "T5EncoderModel", T5_BASE, "component", "t5", "base"),
    "umt5": Real(
        T,
        "UMT5EncoderModel",
        {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
        "component",
        "t5",
        "umt5-xxl",
    ),
    "vit b16": Real(T, "ViTForImageClassification", {}, "checkpoint", "vit", "base-16"),
    "resnet50": Real(T, "ResNetForImageClassification", {}, "checkpoint", "resnet", "50"),
    "dinov2": Real(T, "Dinov2Model", {}, "component", "dinov2", "base"),
}

FOREIGN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "text-to-video UNet": (D, "UNet3DConditionModel", {}),
    "flux 2": (D, "Flux2Transformer2DModel", {"num_layers": 2, "num_single_layers": 2}),
    "chroma": (D, "ChromaTransformer2DModel", {}),
    "qwen image": (D, "QwenImageTransformer2DModel", {"num_layers": 4}),
    "auraflow": (D, "AuraFlowTransformer2DModel", {}),
    "dit": (D, "DiTTransformer2DModel", {}),
    "tiny autoencoder": (D, "AutoencoderTiny", {}),
    "vq model": (D, "VQModel", {}),
    "lumina 2": (D, "Lumina2Transformer2DModel", {}),
    "roberta": (T, "RobertaModel", {"max_position_embeddings": 514, "type_vocab_size": 1}),
    "mpnet": (T, "MPNetModel", {}),
    "distilbert": (T, "DistilBertModel", {}),
    "electra": (T, "ElectraModel", {}),
    "deit": (T, "DeiTModel", {}),
    "beit": (T, "BeitModel", {}),
    "siglip": (T, "SiglipModel", {}),
    "gpt2": (T, "GPT2Model", {}),
    "llama": (T, "LlamaModel", {"num_hidden_layers": 2}),
}
"""Neighbours of known families that must stay unknown."""


@cache
def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape of a model in REAL or FOREIGN."""
    library, cls, config = REAL[name][:3] if name in REAL else FOREIGN[name]
    return build(library, cls, config)


def build(library: str, cls: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    import diffusers
    import torch
    import transformers

    with torch.device("meta"):
        if library == D:
            model = getattr(diffusers, cls)(**config)
        else:
            kind = getattr(transformers, cls)
            model = kind(kind.config_class(**config))
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def listing(tensors: dict[str, tuple[int, ...]], **more: Any) -> Listing:
    """A listing as of one safetensors file."""
    return Listing("safetensors", {name: ListedTensor("F16", tuple(shape)) for name, shape in tensors.items()}, **more)
