"""Listings in the names of the original releases, written out from the networks' structure."""

from __future__ import annotations

from collections.abc import Sequence

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, inside: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, inside)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def conv(name: str, out: int, inside: int, kernel: int = 3, *, sides: int = 2) -> Shapes:
    return {f"{name}.weight": (out, inside, *(kernel,) * sides), f"{name}.bias": (out,)}


def ldm_res(name: str, inside: int, out: int, time: int, sides: int = 2) -> Shapes:
    made = norm(f"{name}.in_layers.0", inside) | conv(f"{name}.in_layers.2", out, inside, sides=sides)
    made |= linear(f"{name}.emb_layers.1", out, time) | norm(f"{name}.out_layers.0", out)
    made |= conv(f"{name}.out_layers.3", out, out, sides=sides)
    return made | (conv(f"{name}.skip_connection", out, inside, 1, sides=sides) if inside != out else {})


def ldm_transformer(name: str, width: int, context: int, depth: int, *, flat: bool) -> Shapes:
    made = norm(f"{name}.norm", width)
    for end in ("proj_in", "proj_out"):
        made |= linear(f"{name}.{end}", width, width) if flat else conv(f"{name}.{end}", width, width, 1)
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        for attn, inside in (("attn1", width), ("attn2", context)):
            made |= {f"{block}.{attn}.to_q.weight": (width, width)}
            made |= {f"{block}.{attn}.to_{x}.weight": (width, inside) for x in "kv"}
            made |= linear(f"{block}.{attn}.to_out.0", width, width)
        made |= linear(f"{block}.ff.net.0.proj", 8 * width, width) | linear(f"{block}.ff.net.2", width, 4 * width)
        for n in (1, 2, 3):
            made |= norm(f"{block}.norm{n}", width)
    return made


def ldm_unet(
    inside: int = 4,
    width: int = 320,
    levels: Sequence[int] = (1, 2, 4, 4),
    depths: Sequence[int] = (1, 1, 1, 0),
    context: int = 768,
    labels: int = 0,
    *,
    flat: bool = False,
    sides: int = 2,
    attention: bool = True,
) -> Shapes:
    """The UNet of latent diffusion (and, without attention to text, of guided diffusion)."""
    time = 4 * width
    made = linear("time_embed.0", time, width) | linear("time_embed.2", time, time)
    if labels:
        made |= linear("label_emb.0.0", time, labels) | linear("label_emb.0.2", time, time)
    made |= conv("input_blocks.0.0", width, inside, sides=sides)

    def middle(name: str, channels: int, depth: int) -> Shapes:
        if attention:
            return ldm_transformer(name, channels, context, depth, flat=flat)
        return norm(f"{name}.norm", channels) | {
            f"{name}.qkv.weight": (3 * channels, channels, 1),
            f"{name}.qkv.bias": (3 * channels,),
            f"{name}.proj_out.weight": (channels, channels, 1),
            f"{name}.proj_out.bias": (channels,),
        }

    now, n, skips = width, 1, [width]
    for level, (times, depth) in enumerate(zip(levels, depths, strict=True)):
        for _ in range(2):
            made |= ldm_res(f"input_blocks.{n}.0", now, width * times, time, sides)
            now = width * times
            if depth:
                made |= middle(f"input_blocks.{n}.1", now, depth)
            skips.append(now)
            n += 1
        if level < len(levels) - 1:
            made |= conv(f"input_blocks.{n}.0.op", now, now, sides=sides)
            skips.append(now)
            n += 1
    deepest = depths[-1] or depths[-2]
    made |= ldm_res("middle_block.0", now, now, time, sides) | middle("middle_block.1", now, deepest)
    made |= ldm_res("middle_block.2", now, now, time, sides)
    n = 0
    for level in reversed(range(len(levels))):
        for i in range(3):
            made |= ldm_res(f"output_blocks.{n}.0", now + skips.pop(), width * levels[level], time, sides)
            now = width * levels[level]
            if depths[level]:
                made |= middle(f"output_blocks.{n}.1", now, depths[level])
            if level and i == 2:
                made |= conv(f"output_blocks.{n}.{2 if depths[level] else 1}.conv", now, now, sides=sides)
            n += 1
    return made | norm("out.0", width) | conv("out.2", 4 if attention else inside, width, sides=sides)


SDXL = {"levels": (1, 2, 4), "depths": (0, 2, 10), "context": 2048, "labels": 2816, "flat": True}


def ldm_vae() -> Shapes:
    """The autoencoder of latent diffusion, four latent channels."""
    made = conv("encoder.conv_in", 128, 3) | conv("decoder.conv_in", 512, 4)
    for side, down in (("encoder", True), ("decoder", False)):
        for level, width in enumerate((128, 256, 512, 512)):
            for i in range(2 if down else 3):
                block = f"{side}.{'down' if down else 'up'}.{level}.block.{i}"
                made |= norm(f"{block}.norm1", width) | conv(f"{block}.conv1", width, width)
                made |= norm(f"{block}.norm2", width) | conv(f"{block}.conv2", width, width)
        for i in (1, 2):
            for part in ("norm", "conv"):
                for j in (1, 2):
                    name = f"{side}.mid.block_{i}.{part}{j}"
                    made |= norm(name, 512) if part == "norm" else conv(name, 512, 512)
        made |= norm(f"{side}.mid.attn_1.norm", 512)
        for part in ("q", "k", "v", "proj_out"):
            made |= conv(f"{side}.mid.attn_1.{part}", 512, 512, 1)
        made |= norm(f"{side}.norm_out", 512 if down else 128)
    for level, width in ((0, 128), (1, 256), (2, 512)):
        made |= conv(f"encoder.down.{level}.downsample.conv", width, width)
        made |= conv(f"decoder.up.{level + 1}.upsample.conv", (256, 512, 512)[level], (256, 512, 512)[level])
    made |= conv("encoder.down.1.block.0.nin_shortcut", 256, 128, 1)
    made |= conv("encoder.conv_out", 8, 512) | conv("decoder.conv_out", 3, 128)
    return made | conv("quant_conv", 8, 8, 1) | conv("post_quant_conv", 4, 4, 1)


def clip_text(width: int = 768, layers: int = 12) -> Shapes:
    """CLIP's text encoder in the names of transformers."""
    made = {
        "text_model.embeddings.token_embedding.weight": (49408, width),
        "text_model.embeddings.position_embedding.weight": (77, width),
        "text_model.embeddings.position_ids": (1, 77),
    }
    for i in range(layers):
        layer = f"text_model.encoder.layers.{i}"
        for x in ("q_proj", "k_proj", "v_proj", "out_proj"):
            made |= linear(f"{layer}.self_attn.{x}", width, width)
        made |= linear(f"{layer}.mlp.fc1", 4 * width, width) | linear(f"{layer}.mlp.fc2", width, 4 * width)
        made |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
    return made | norm("text_model.final_layer_norm", width)


def open_clip_text(width: int, layers: int) -> Shapes:
    """OpenCLIP's text encoder in its own names."""
    made: Shapes = {"token_embedding.weight": (49408, width), "positional_embedding": (77, width)}
    made |= {"text_projection": (width, width), "logit_scale": ()} | norm("ln_final", width)
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        made |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        made |= linear(f"{block}.attn.out_proj", width, width) | norm(f"{block}.ln_1", width)
        made |= norm(f"{block}.ln_2", width) | linear(f"{block}.mlp.c_fc", 4 * width, width)
        made |= linear(f"{block}.mlp.c_proj", width, 4 * width)
    return made


def flux() -> Shapes:
    """FLUX.1 dev as Black Forest Labs released it (fewer blocks do not matter here)."""
    made = linear("img_in", 3072, 64) | linear("txt_in", 3072, 4096)
    for name, inside in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        made |= linear(f"{name}.in_layer", 3072, inside) | linear(f"{name}.out_layer", 3072, 3072)
    return made | stream_blocks(3072, 19, 38) | linear("final_layer.linear", 64, 3072)


def stream_blocks(width: int, double: int, single: int) -> Shapes:
    made = linear("final_layer.adaLN_modulation.1", 2 * width, width)
    for i in range(double):
        for x in ("img", "txt"):
            block = f"double_blocks.{i}.{x}"
            made |= linear(f"{block}_mod.lin", 6 * width, width) | linear(f"{block}_attn.qkv", 3 * width, width)
            made |= linear(f"{block}_attn.proj", width, width) | linear(f"{block}_mlp.0", 4 * width, width)
            made |= linear(f"{block}_mlp.2", width, 4 * width)
            made |= {f"{block}_attn.norm.{y}_norm.scale": (128,) for y in ("query", "key")}
    for i in range(single):
        block = f"single_blocks.{i}"
        made |= linear(f"{block}.linear1", 7 * width, width) | linear(f"{block}.linear2", width, 5 * width)
        made |= linear(f"{block}.modulation.lin", 3 * width, width)
        made |= {f"{block}.norm.{y}_norm.scale": (128,) for y in ("query", "key")}
    return made


def hunyuan3d(double: int = 16, single: int = 32) -> Shapes:
    """Hunyuan3D 2's shape transformer."""
    made = linear("latent_in", 1024, 64) | linear("cond_in", 1024, 1536)
    made |= linear("time_in.in_layer", 1024, 256) | linear("time_in.out_layer", 1024, 1024)
    return made | stream_blocks(1024, double, single) | linear("final_layer.linear", 64, 1024)


def sd3() -> Shapes:
    """SD3 medium as Stability released it."""
    made: Shapes = {"pos_embed": (1, 36864, 1536)} | conv("x_embedder.proj", 1536, 16, 2)
    made |= linear("context_embedder", 1536, 4096) | linear("final_layer.linear", 64, 1536)
    made |= linear("final_layer.adaLN_modulation.1", 3072, 1536)
    for name, inside in (("t_embedder", 256), ("y_embedder", 2048)):
        made |= linear(f"{name}.mlp.0", 1536, inside) | linear(f"{name}.mlp.2", 1536, 1536)
    for i in range(24):
        for x in ("x_block", "context_block"):
            block = f"joint_blocks.{i}.{x}"
            made |= linear(f"{block}.attn.qkv", 4608, 1536) | linear(f"{block}.attn.proj", 1536, 1536)
            made |= linear(f"{block}.mlp.fc1", 6144, 1536) | linear(f"{block}.mlp.fc2", 1536, 6144)
            made |= linear(f"{block}.adaLN_modulation.1", 9216, 1536)
    return made


def wan() -> Shapes:
    """Wan 2.1 1.3B as Alibaba released it."""
    made: Shapes = {"patch_embedding.weight": (1536, 16, 1, 2, 2), "patch_embedding.bias": (1536,)}
    made |= linear("text_embedding.0", 1536, 4096) | linear("text_embedding.2", 1536, 1536)
    made |= linear("time_embedding.0", 1536, 256) | linear("time_embedding.2", 1536, 1536)
    made |= linear("time_projection.1", 9216, 1536) | linear("head.head", 64, 1536) | {"head.modulation": (1, 2, 1536)}
    for i in range(30):
        for attn in ("self_attn", "cross_attn"):
            for x in "qkvo":
                made |= linear(f"blocks.{i}.{attn}.{x}", 1536, 1536)
            made |= {f"blocks.{i}.{attn}.norm_{x}.weight": (1536,) for x in "qk"}
        made |= linear(f"blocks.{i}.ffn.0", 8960, 1536) | linear(f"blocks.{i}.ffn.2", 1536, 8960)
        made |= norm(f"blocks.{i}.norm3", 1536) | {f"blocks.{i}.modulation": (1, 6, 1536)}
    return made


def monai_unet() -> Shapes:
    """MedForj's volume UNet: the outer blocks of MONAI's DiffusionModelUNet, five-dimensional convolutions."""
    made = linear("time_embed.0", 64, 16) | linear("time_embed.2", 64, 64)
    made |= conv("conv_in.conv", 16, 1, sides=3) | norm("out.0", 16) | conv("out.2.conv", 1, 16, sides=3)
    blocks = [f"{side}_blocks.{i}.resnets.{j}" for side in ("down", "up") for i in range(5) for j in range(2)]
    for block in [*blocks, "middle_block.resnet_1", "middle_block.resnet_2"]:
        made |= norm(f"{block}.norm1", 16) | conv(f"{block}.conv1.conv", 16, 16, sides=3)
        made |= norm(f"{block}.norm2", 16) | conv(f"{block}.conv2.conv", 16, 16, sides=3)
        made |= linear(f"{block}.time_emb_proj", 16, 64)
    return made | conv("down_blocks.0.downsampler.op.conv", 16, 16, sides=3)


def vit_on_disk() -> Shapes:
    """ViT-B/16 in the names its files have."""
    made: Shapes = {"vit.embeddings.cls_token": (1, 1, 768), "vit.embeddings.position_embeddings": (1, 197, 768)}
    made |= conv("vit.embeddings.patch_embeddings.projection", 768, 3, 16)
    for i in range(12):
        layer = f"vit.encoder.layer.{i}"
        for x in ("query", "key", "value"):
            made |= linear(f"{layer}.attention.attention.{x}", 768, 768)
        made |= linear(f"{layer}.attention.output.dense", 768, 768) | linear(f"{layer}.intermediate.dense", 3072, 768)
        made |= linear(f"{layer}.output.dense", 768, 3072) | norm(f"{layer}.layernorm_before", 768)
        made |= norm(f"{layer}.layernorm_after", 768)
    return made | norm("vit.layernorm", 768) | linear("classifier", 1000, 768)


def resnet50() -> Shapes:
    """ResNet-50 in torchvision's names."""
    made: Shapes = {"conv1.weight": (64, 3, 7, 7)} | batch_norm("bn1", 64) | linear("fc", 1000, 2048)
    for stage, (count, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1):
        for i in range(count):
            block = f"layer{stage}.{i}"
            inside = (64 if stage == 1 else 2 * width) if i == 0 else 4 * width
            made |= {f"{block}.conv1.weight": (width, inside, 1, 1), f"{block}.conv2.weight": (width, width, 3, 3)}
            made |= {f"{block}.conv3.weight": (4 * width, width, 1, 1)}
            made |= batch_norm(f"{block}.bn1", width) | batch_norm(f"{block}.bn2", width)
            made |= batch_norm(f"{block}.bn3", 4 * width)
        made |= {f"layer{stage}.0.downsample.0.weight": (4 * width, 64 if stage == 1 else 2 * width, 1, 1)}
        made |= batch_norm(f"layer{stage}.0.downsample.1", 4 * width)
    return made


def batch_norm(name: str, width: int) -> Shapes:
    ends = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{end}": (width,) for end in ends} | {f"{name}.num_batches_tracked": ()}


def ddpm() -> Shapes:
    """Ho et al.'s UNet in its own names, one level."""
    made = linear("temb.dense.0", 512, 128) | linear("temb.dense.1", 512, 512) | conv("conv_in", 128, 3)
    blocks = [f"down.0.block.{i}" for i in (0, 1)] + [f"up.0.block.{i}" for i in range(3)]
    for block in [*blocks, "mid.block_1", "mid.block_2"]:
        made |= norm(f"{block}.norm1", 128) | conv(f"{block}.conv1", 128, 128) | linear(f"{block}.temb_proj", 128, 512)
        made |= norm(f"{block}.norm2", 128) | conv(f"{block}.conv2", 128, 128)
    return made | norm("norm_out", 128) | conv("conv_out", 3, 128)


def under(prefix: str, tensors: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in tensors.items()}
