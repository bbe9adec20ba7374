"""What others read of our exports is what we unpack; the readers are those projects' own, or a plain one in NumPy."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import modelgrove_analyzers
from modelgrove_hub.errors import ConflictError, CorruptFileError, DataError, NotFoundError
from modelgrove_hub.exporting import get_exporter, publish_folder
from modelgrove_hub.formats.quantized import KEY
from modelgrove_hub.store.header import read_header
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_kernels.packing import quantize, unpack_nibbles
from modelgrove_plugins.compress.packed import dequantized, pack, pack_as
from modelgrove_plugins.compress.rtn import Rtn
from modelgrove_plugins.export.compressed_tensors import parts_of
from modelgrove_plugins.export.gguf import blocks, unblocked

BASE = Path(modelgrove_analyzers.__file__).parent / "zoo/data/zoo-base"


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def export(form, model, folder):
    return publish_folder(folder, lambda partial: get_exporter(form).run(model, partial))


@pytest.fixture(params=[{"bits": 8}, {"bits": 4, "group_size": 128}, {"bits": 3}], ids=str)
def unet(request, tmp_path):
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=48,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ).save_pretrained(tmp_path / "unet", max_shard_size="1MB")  # fmt: skip
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    run_plugin(Rtn(), [FolderModel(tmp_path / "unet")], tmp_path / "job", {**request.param, "fidelity": False})
    return FolderModel(tmp_path / "job/out")


def test_diffusers_loads_a_dense_export_with_the_values_that_we_unpack(unet, tmp_path):
    export("dense", unet, tmp_path / "dense")
    found = UNet2DConditionModel.from_pretrained(tmp_path / "dense").state_dict()
    wanted = dict(dequantized(unet))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(KEY not in read_header(path).metadata for path in (tmp_path / "dense").glob("*.safetensors"))


def test_diffusers_loads_a_dense_export_of_the_packed_zoo_base_and_it_answers_alike(tmp_path):
    run_plugin(Rtn(), [FolderModel(BASE)], tmp_path / "job", {"bits": 4, "fidelity": False})
    export("dense", FolderModel(tmp_path / "job/out"), tmp_path / "dense")
    loaded, info = UNet2DConditionModel.from_pretrained(tmp_path / "dense/unet", output_loading_info=True)
    assert not any(info.values())
    original = UNet2DConditionModel.from_pretrained(BASE / "unet").float()
    shape = (1, loaded.config.in_channels, loaded.config.sample_size, loaded.config.sample_size)
    asked = random(*shape) * 20, 500, random(1, 4, loaded.config.cross_attention_dim, seed=1)
    with torch.inference_mode():
        found, wanted = (network.float()(*asked).sample for network in (loaded, original))
    # Four bits: the fidelity of the whole model is 2.2e-2.
    assert 1e-4 < (found - wanted).square().sum() / wanted.square().sum() < 0.2


def test_the_gguf_package_reads_every_tensor_of_a_gguf_export(unet, tmp_path):
    report = export("gguf", unet, tmp_path / "gguf")
    [path] = (tmp_path / "gguf").glob("*.gguf")
    wanted = dict(dequantized(unet))
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert found.keys() == wanted.keys() == report["tensors"].keys()
    for name, tensor in found.items():
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(wanted[name].shape)
        exact, kind = wanted[name].numpy(), tensor.tensor_type.name
        assert report["tensors"][name].split(":")[0] == kind
        # Only the minimum of Q4_1 is rounded: relative 2^-11, and it is no larger than 15 steps.
        slack = 2.0**-11 * np.abs(exact).max() * 1.1 if kind == "Q4_1" else 0
        assert np.abs(values - exact).max() <= slack, (name, kind)


def test_matrices_keep_their_codes_where_ggml_has_blocks_for_them(tmp_path):
    tensors = {"a.weight": random(64, 96), "b.weight": random(64, 80), "c.weight": random(64, 32, 3, 3)}
    save_file({**tensors, "n.weight": random(64).bfloat16()}, tmp_path / "m.safetensors")
    run_plugin(Rtn(), [FolderModel(tmp_path / "m.safetensors")], tmp_path / "job", {"smallest": 0})
    fates = export("gguf", FolderModel(tmp_path / "job/out"), tmp_path / "out")["tensors"]
    kinds = {name: fate.split(":")[0] for name, fate in fates.items()}
    assert kinds == {"a.weight": "Q8_0", "b.weight": "F32", "c.weight": "F32", "n.weight": "BF16"}
    assert "multiple of 32" in fates["b.weight"]
    assert "convolution" in fates["c.weight"]


MATRICES = st.tuples(st.integers(1, 5), st.integers(1, 6), st.sampled_from([32, 64, 128, None]), st.integers(0, 2**31))


@settings(max_examples=40, deadline=None)
@given(MATRICES, st.sampled_from([8, 4]))
def test_ggml_blocks_give_back_codes_scales_and_zeros(drawn, bits):
    rows, count, group, seed = drawn
    stored = pack(random(rows, 32 * count, seed=seed), bits, group)
    assert unblocked(stored) == ""
    kind, data = blocks(stored)
    width, half = stored.entry.group // 32, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    cut = data.reshape(rows, count, half)
    scales = cut[..., :2].copy().view(np.float16)[..., 0]
    assert np.array_equal(scales, stored.parts["scales"].repeat_interleave(width, 1)[:, :count].numpy())
    body = cut[..., -32:].view(np.int8) if bits == 8 else cut[..., -16:]
    if bits == 4:
        body = np.concatenate([body & 15, body >> 4], axis=-1)
        zeros = stored.parts["zeros"].repeat_interleave(width, 1)[:, :count].numpy()
        if kind == "Q4_1":
            found = np.round(-cut[..., 2:4].copy().view(np.float16)[..., 0].astype(np.float32) / scales)
        else:
            found = np.full_like(zeros, 8)
        assert np.array_equal(found, zeros)
    codes = stored.parts["codes"] if bits == 8 else unpack_nibbles(stored.parts["codes"])
    assert np.array_equal(body.reshape(rows, -1), codes[:, : 32 * count].numpy())


def test_zeros_of_eight_become_q4_0():
    packed = quantize(random(4, 64), 4, 32)
    packed.zeros.fill_(8)
    stored = pack_as(random(4, 64), packed)
    kind, data = blocks(stored)
    steps = unpack_nibbles(packed.codes).float().view(4, 2, 32) - 8
    wanted = (steps * packed.scales.float().unsqueeze(-1)).reshape(4, 64).numpy()
    assert kind == "Q4_0"
    assert np.array_equal(gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q4_0), wanted)


def nibbles(words, count):
    """int32 (rows, n) → (rows, count) codes, the first in the lowest bits: a reader after their documentation."""
    shifted = words.astype(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32))
    return (shifted & 15).reshape(len(words), -1)[:, :count].astype(np.int64)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 5), st.sampled_from([32, None]), st.integers(0, 2**31), st.sampled_from([8, 4])
)
def test_compressed_tensors_give_back_codes_scales_and_zeros(rows, count, group, seed, bits):
    stored = pack(random(rows, 32 * count, seed=seed), bits, group)
    found = {name: part.numpy() for name, part in parts_of("x.weight", stored).items()}
    assert np.array_equal(found["x.weight_scale"], stored.parts["scales"].float().numpy())
    if bits == 8:
        assert np.array_equal(found["x.weight"], stored.parts["codes"].numpy())
        return
    assert found["x.weight_shape"].tolist() == [rows, 32 * count]
    assert np.array_equal(nibbles(found["x.weight_packed"], 32 * count), unpack_nibbles(stored.parts["codes"]).numpy())
    assert np.array_equal(nibbles(found["x.weight_zero_point"].T, rows).T, stored.parts["zeros"].numpy())


def test_config_json_lists_each_layer_that_is_compressed(unet, tmp_path):
    report = export("compressed-tensors", unet, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text()).get("quantization_config", {"config_groups": {}})
    listed = {f"{name}.weight" for group in config["config_groups"].values() for name in group["targets"]}
    assert listed == {name for name, fate in report["tensors"].items() if fate.endswith("-quantized")}
    index = json.loads((tmp_path / "out/diffusion_pytorch_model.safetensors.index.json").read_text())
    for shard in set(index["weight_map"].values()):
        held = {name for name, place in index["weight_map"].items() if place == shard}
        assert load_file(tmp_path / "out" / shard).keys() == held


@pytest.mark.parametrize("form", ["dense", "gguf", "compressed-tensors"])
def test_a_damaged_file_is_refused_and_nothing_is_left(form, tmp_path):
    save_file({"a.weight": random(64, 64)}, tmp_path / "m.safetensors")
    run_plugin(Rtn(), [FolderModel(tmp_path / "m.safetensors")], tmp_path / "job", {"smallest": 0})
    [path] = (tmp_path / "job/out").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CorruptFileError):
        export(form, FolderModel(path), tmp_path / "exports/out")
    assert list((tmp_path / "exports").iterdir()) == []


@pytest.mark.parametrize("form", ["gguf", "compressed-tensors"])
def test_a_scale_that_is_no_number_is_refused_by_the_tensors_name(form, tmp_path):
    save_file({"a.weight": random(64, 64)}, tmp_path / "m.safetensors")
    run_plugin(Rtn(), [FolderModel(tmp_path / "m.safetensors")], tmp_path / "job", {"smallest": 0})
    [path] = (tmp_path / "job/out").glob("*.safetensors")
    metadata, parts = read_header(path).metadata, load_file(path)
    parts["a.weight.scales"][3] = float("nan")
    save_file(parts, path, dict(metadata))
    with pytest.raises(DataError, match=r"a\.weight"):
        export(form, FolderModel(path), tmp_path / "exports/out")
    assert list((tmp_path / "exports").iterdir()) == []


def test_what_gguf_cannot_hold_is_refused_by_name(tmp_path):
    save_file({"mask": torch.ones(4, dtype=torch.bool)}, tmp_path / "m.safetensors")
    with pytest.raises(DataError, match="mask is BOOL"):
        export("gguf", FolderModel(tmp_path / "m.safetensors"), tmp_path / "out")


def test_a_full_folder_and_an_unknown_format_are_refused(tmp_path):
    (tmp_path / "note").touch()
    with pytest.raises(ConflictError, match="not empty"):
        publish_folder(tmp_path, lambda _: {})
    with pytest.raises(NotFoundError, match="dense, gguf"):
        get_exporter("onnx")


@pytest.mark.parametrize(
    "params",
    [{"bits": 8}, {"bits": 8, "granularity": "group"}, {"bits": 4}, {"bits": 4, "granularity": "channel"}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_compressed_tensors_package_unpacks_to_our_values(params, dtype, tmp_path):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    save_file({"x.weight": random(70, 128).to(dtype)}, tmp_path / "m.safetensors")
    (tmp_path / "m").mkdir()
    (tmp_path / "m.safetensors").rename(tmp_path / "m/m.safetensors")
    (tmp_path / "m/config.json").write_text("{}")
    run_plugin(Rtn(), [FolderModel(tmp_path / "m")], tmp_path / "job", {"smallest": 0, **params})
    model = FolderModel(tmp_path / "job/out")
    export("compressed-tensors", model, tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    [scheme] = QuantizationConfig.model_validate(said).config_groups.values()
    parts = {name.removeprefix("x."): part for name, part in load_file(tmp_path / "out/m.safetensors").items()}
    found = BaseCompressor.get_value_from_registry(said["format"]).decompress(parts, scheme)["weight"]
    assert torch.equal(found, dict(dequantized(model))["x.weight"])
