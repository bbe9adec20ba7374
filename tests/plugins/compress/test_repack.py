"""Files of other programs keep their codes; the writers here are their own packages, or our exporters."""

import json

import gguf
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from modelgrove_hub.errors import CorruptFileError, DataError, UsageError
from modelgrove_hub.exporting import get_exporter, publish_folder
from modelgrove_hub.formats.quantized import manifest_of
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_kernels import foreign
from modelgrove_kernels.packing import quantize, unpack_nibbles
from modelgrove_plugins.compress.packed import dequantized, pack, pack_as
from modelgrove_plugins.compress.repack import Repack
from modelgrove_plugins.compress.rtn import Rtn
from modelgrove_plugins.export.compressed_tensors import parts_of
from modelgrove_plugins.export.gguf import blocks
from modelgrove_plugins.preview.diffusers import DiffusersPreviewer

KINDS = gguf.GGMLQuantizationType
FILE = "diffusion_pytorch_model.safetensors"


def draw(*shape, seed=0):
    return 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def written(path, tensors):
    """A GGUF file by the project's own package; name → (type, array)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, arch="test")
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return FolderModel(path)


def repacked(model, folder):
    report = run_plugin(Repack(), [model], folder).report
    return FolderModel(folder / "out"), report


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_blocks_by_the_gguf_package_stand_for_the_values_that_it_reads(kind, tmp_path):
    values = draw(6, 96).numpy()
    data = gguf.quants.quantize(values, KINDS[kind])
    model = written(tmp_path / "a/x.gguf", {"w": (KINDS[kind], data), "b": (KINDS.F32, values[0].copy())})
    found, report = repacked(model, tmp_path / "job")
    tensors = dict(dequantized(found))
    # Ours are given back as float16, the dtype that such files had before.
    assert np.array_equal(tensors["w"].numpy(), gguf.quants.dequantize(data, KINDS[kind]).astype(np.float16))
    assert np.array_equal(tensors["b"].numpy(), values[0])
    assert (report["quantized"], report["kept"], report["unpacked"]) == (1, 1, {})


def test_minima_that_are_no_steps_are_unpacked_and_said(tmp_path):
    data = gguf.quants.quantize(draw(6, 96).numpy(), KINDS.Q4_1)
    found, report = repacked(written(tmp_path / "a/x.gguf", {"w": (KINDS.Q4_1, data)}), tmp_path / "job")
    assert "minima" in report["unpacked"]["w"]
    wanted = gguf.quants.dequantize(data, KINDS.Q4_1).astype(np.float16)
    assert np.array_equal(dict(dequantized(found))["w"].numpy(), wanted)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from([32, 64, None]),
    st.integers(0, 2**31),
    st.sampled_from([8, 4]),
)
def test_what_we_export_as_gguf_comes_back(rows, count, group, seed, bits):
    """Wider groups come back as several of 32 with one scale."""
    stored = pack(draw(rows, 32 * count, seed=seed), bits, group)
    kind, data = blocks(stored)
    back = {"Q8_0": foreign.q8_0, "Q4_0": foreign.q4_0, "Q4_1": foreign.q4_1}[kind](torch.from_numpy(data))
    width = stored.entry.group // 32
    assert torch.equal(back["scales"], stored.parts["scales"].repeat_interleave(width, 1)[:, :count].half())
    if bits == 8:
        assert torch.equal(back["codes"], stored.parts["codes"][:, : 32 * count])
        return
    assert torch.equal(unpack_nibbles(back["codes"]), unpack_nibbles(stored.parts["codes"])[:, : 32 * count])
    assert torch.equal(back["zeros"], stored.parts["zeros"].repeat_interleave(width, 1)[:, :count])


def test_zero_points_of_eight_come_back_from_q4_0():
    packed = quantize(draw(4, 64), 4, 32)
    packed.zeros.fill_(8)
    stored = pack_as(draw(4, 64), packed)
    kind, data = blocks(stored)
    assert kind == "Q4_0"
    back = foreign.q4_0(torch.from_numpy(data))
    assert all(torch.equal(back[name], stored.parts[name]) for name in ("codes", "scales", "zeros"))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 5), st.sampled_from([32, None]), st.integers(0, 2**31), st.sampled_from([8, 4]),
    st.sampled_from([torch.float16, torch.float32]),
)  # fmt: skip
def test_what_we_export_as_compressed_tensors_comes_back(tmp_path_factory, rows, count, group, seed, bits, dtype):
    stored = pack(draw(rows, 32 * count, seed=seed).to(dtype), bits, group)
    folder = tmp_path_factory.mktemp("ct")
    save_file(
        {name: part.contiguous() for name, part in parts_of("x.weight", stored).items()}, folder / "x.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "compressed-tensors"}}))
    _, report = repacked(FolderModel(folder), folder / "job")
    found = load_file(folder / "job/out/x.safetensors")
    for name, part in stored.parts.items():
        assert torch.equal(found[f"x.weight.{name}"].float(), part.float())
    assert report["layers"][0]["group"] == stored.entry.group


@pytest.mark.parametrize("form", ["gguf", "compressed-tensors"])
def test_an_exported_pipeline_comes_back_and_paints(pipeline, form, tmp_path):
    run_plugin(Rtn(), [pipeline], tmp_path / "rtn", {"bits": 4, "group_size": 32, "smallest": 256, "fidelity": False})
    ours = FolderModel(tmp_path / "rtn/out", name="ours", family="zoo")
    publish_folder(tmp_path / "theirs", lambda partial: get_exporter(form).run(ours, partial))
    found, report = repacked(FolderModel(tmp_path / "theirs", name="theirs"), tmp_path / "job")
    assert report["quantized"] > 3
    wanted, back = dict(dequantized(ours)), dict(dequantized(found))
    assert wanted.keys() == back.keys()
    assert all(torch.equal(wanted[name], back[name]) for name in wanted)
    model = FolderModel(tmp_path / "job/out", name="back", family="zoo")
    UNet2DConditionModel.load_config(tmp_path / "job/out/unet")
    run_plugin(DiffusersPreviewer(), [model], tmp_path / "p", {"prompts": ["a"], "steps": 2, "quant": "packed"})
    assert manifest_of(tmp_path / "job/out/unet" / FILE).method == "repack"


def test_other_blocks_are_refused_by_name(tmp_path):
    model = written(tmp_path / "a/x.gguf", {"deep": (KINDS.Q4_K, np.zeros((2, 144), np.uint8))})
    with pytest.raises(DataError, match="deep is Q4_K"):
        repacked(model, tmp_path / "job")


def test_a_scale_that_is_no_number_is_refused_by_name(tmp_path):
    data = gguf.quants.quantize(draw(2, 64).numpy(), KINDS.Q8_0)
    data[0, :2] = 0xFF
    with pytest.raises(DataError, match="w: a scale is NaN"):
        repacked(written(tmp_path / "a/x.gguf", {"w": (KINDS.Q8_0, data)}), tmp_path / "job")


def test_a_truncated_file_is_refused(tmp_path):
    data = gguf.quants.quantize(draw(8, 640).numpy(), KINDS.Q8_0)
    model = written(tmp_path / "a/x.gguf", {"w": (KINDS.Q8_0, data)})
    path = tmp_path / "a/x.gguf"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CorruptFileError, match="truncated"):
        repacked(model, tmp_path / "job")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x.weight_shape": torch.tensor([2**40, 2**40])}, "not words of eight"),
        ({"x.weight_shape": torch.tensor([4])}, "not words of eight"),
        ({"x.weight_scale": torch.ones(4, 3)}, "does not divide"),
        ({"x.weight_scale": torch.full((4, 2), float("nan"))}, "NaN"),
        ({"x.weight_zero_point": torch.zeros(4, 2, dtype=torch.int32)}, "zero_point"),
        ({"x.weight_g_idx": torch.zeros(64, dtype=torch.int32)}, "g_idx"),
        ({"x.weight_scale": None}, "no scale"),
        ({"x.weight_packed": None}, "neither codes"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(change, said, tmp_path):
    parts = {name: part.contiguous() for name, part in parts_of("x.weight", pack(draw(4, 64), 4, 32)).items()} | change
    (tmp_path / "a").mkdir()
    save_file({name: part for name, part in parts.items() if part is not None}, tmp_path / "a/x.safetensors")
    (tmp_path / "a/config.json").write_text(json.dumps({"quantization_config": {"quant_method": "compressed-tensors"}}))
    with pytest.raises(DataError, match=said):
        repacked(FolderModel(tmp_path / "a"), tmp_path / "job")


def test_a_plain_model_has_nothing_to_take_over(pipeline, tmp_path):
    with pytest.raises(UsageError, match="neither GGUF"):
        repacked(pipeline, tmp_path)
