"""Round-to-nearest on whole models: what is packed, kept and refused, and what diffusers makes of the result."""

import hashlib
import json
import math
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from modelgrove_hub.contracts import Cancelled
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.listing import list_model
from modelgrove_hub.formats.quantized import read_manifest
from modelgrove_hub.store.header import read_header
from modelgrove_hub.store.tensors import tensors_of
from modelgrove_hub.tables import Relation
from modelgrove_hub.testing import FolderModel, LocalContext, check_plugin, run_plugin
from modelgrove_plugins.compress.packed import dequantized
from modelgrove_plugins.compress.rtn import Rtn, RtnParams


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


TENSORS = {
    "conv_in.weight": random(32, 4, 3, 3),
    "down.norm1.weight": random(8192),
    "down.conv1.weight": random(32, 32, 3, 3),
    "down.conv1.bias": random(32),
    "down.to_q.weight": random(128, 96).half(),
    "down.odd.weight": random(65, 77).bfloat16(),
    "down.double.weight": random(64, 64).double(),
    "down.tiny.weight": random(4, 4),
    "down.thin.weight": random(4096, 1).half(),
    "down.ids": torch.arange(8192).reshape(64, 128),
    "down.empty": torch.zeros(0, 64),
    "down.mask": torch.ones(64, 128, dtype=torch.bool),
}
PACKED = {"down.conv1.weight", "down.to_q.weight", "down.odd.weight", "down.double.weight"}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    save_file(TENSORS, tmp_path / "model/weights.safetensors", {"format": "pt", "note": "kept"})
    return FolderModel(tmp_path / "model")


def compress(model, folder, **params):
    result = run_plugin(Rtn(), [model], folder, params)
    return result, FolderModel(folder / "out")


def test_it_keeps_the_contract():
    for params in ({}, {"bits": 4}):
        assert [check for check in check_plugin(Rtn, params=params) if not check.ok] == []


@pytest.mark.parametrize("params", [{}, {"bits": 4}, {"bits": 4, "group_size": 128}, {"granularity": "group"}], ids=str)
def test_linear_and_convolution_weights_are_packed_and_all_else_kept_verbatim(model, tmp_path, params):
    result, packed = compress(model, tmp_path / "job", **params)
    values = dict(dequantized(packed))
    assert values.keys() == TENSORS.keys()
    assert {layer["name"] for layer in result.report["layers"]} == PACKED
    for name, tensor in TENSORS.items():
        assert (values[name].dtype, values[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(values[name], tensor) == (name not in PACKED)


def test_each_row_is_rounded_to_its_own_grid(model, tmp_path):
    _, packed = compress(model, tmp_path / "job")
    found = dict(dequantized(packed))["down.conv1.weight"].double().numpy()
    exact = TENSORS["down.conv1.weight"].double().numpy()
    scale = np.abs(exact).max(axis=(1, 2, 3), keepdims=True) / 127
    # The nearest of 255 levels: half a step, and 2^-11 for the scale's storage in float16.
    assert (np.abs(found - exact) <= scale * (0.5 + 127 * 2.0**-11)).all()


def test_the_report_tells_true_bytes_and_the_error_of_every_layer(model, tmp_path):
    result, packed = compress(model, tmp_path / "job", bits=4)
    path = packed.files()["weights.safetensors"]
    values = dict(dequantized(packed))
    assert result.report["bytes_before"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert result.report["bytes_after"] == sum(tensor.nbytes for tensor in tensors_of(path))
    assert result.report["quantized"] + result.report["kept"] == len(TENSORS)
    for layer in result.report["layers"]:
        exact, found = TENSORS[layer["name"]].double(), values[layer["name"]].double()
        ratio = float(exact.square().sum() / (exact - found).square().sum())
        # The report has two decimals; half-precision results are rounded once more here.
        assert layer["sqnr_db"] == pytest.approx(10 * math.log10(ratio), abs=0.1)


def test_the_manifest_names_the_parent_and_the_file_keeps_its_metadata(model, tmp_path):
    _, packed = compress(model, tmp_path / "job", bits=4)
    metadata = read_header(packed.files()["weights.safetensors"]).metadata
    manifest = read_manifest(metadata, "weights")
    source = model.files()["weights.safetensors"].read_bytes()
    assert metadata["note"] == "kept"
    assert manifest.parent == hashlib.sha256(source).hexdigest()
    assert (manifest.method, manifest.parameters["bits"]) == ("rtn", 4)
    assert manifest.tensors.keys() == PACKED


def test_patterns_and_sizes_decide_what_is_left_alone(model, tmp_path):
    result, _ = compress(model, tmp_path / "job", skip=["*conv*", "*odd*"], smallest=4200)
    assert {layer["name"] for layer in result.report["layers"]} == {"down.to_q.weight"}


def test_a_model_folder_comes_out_whole(tmp_path):
    folder = tmp_path / "pipeline"
    for part in ("unet", "vae"):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text('{"_class_name": "X"}')
    save_file({"a.weight": random(64, 64)}, folder / "unet/model-00001-of-00002.safetensors")
    save_file({"b.weight": random(64, 64)}, folder / "unet/model-00002-of-00002.safetensors")
    shards = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    (folder / "unet/model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 2**15}, "weight_map": shards})
    )
    save_file({"decoder.weight": random(64, 64)}, folder / "vae/model.safetensors")
    (folder / "model_index.json").write_text('{"_class_name": "P"}')
    (folder / "unet/model.bin").write_bytes(b"a pickle")
    result, packed = compress(FolderModel(folder), tmp_path / "job", bits=4)

    assert set(result.outputs[0].files) == FolderModel(folder).files().keys() - {"unet/model.bin"}
    assert packed.files().keys() == {*result.outputs[0].files, *result.artefacts}
    assert result.artefacts == ("layers.png",)
    assert result.outputs[0].relation is Relation.QUANTIZED
    assert result.report["left_out"] == ["unet/model.bin"]
    assert [layer["name"] for layer in result.report["layers"]] == ["unet/a.weight", "unet/b.weight"]
    assert load_file(packed.files()["vae/model.safetensors"]).keys() == {"decoder.weight"}
    index = json.loads(packed.files()["unet/model.safetensors.index.json"].read_text())
    assert index["weight_map"]["a.weight.codes"] == "model-00001-of-00002.safetensors"
    assert len(index["weight_map"]) == 6
    (tmp_path / "job/out/layers.png").unlink()  # kept with the job, not with the model
    listed = list_model(tmp_path / "job/out")  # as the hub will when it registers the output
    assert listed.tensors.keys() == {"unet/a.weight", "unet/b.weight", "vae/decoder.weight"}
    assert listed.notes == ()


def test_diffusers_refuses_the_packed_folder_and_takes_the_unpacked_tensors(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=48,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ).eval()  # fmt: skip
    unet.save_pretrained(tmp_path / "unet")
    result, packed = compress(FolderModel(tmp_path / "unet"), tmp_path / "job")
    with pytest.raises(ValueError, match="modelgrove"):
        UNet2DConditionModel.from_pretrained(tmp_path / "job/out")
    other = UNet2DConditionModel.from_config(unet.config).eval()
    other.load_state_dict(dict(dequantized(packed)))
    inputs = torch.randn(1, 4, 8, 8), 10, torch.randn(1, 5, 48)
    with torch.inference_mode():
        wanted, found = unet(*inputs).sample, other(*inputs).sample
    # int8 weights are off by 0.5 %; an untrained net of a dozen layers passes that on without amplifying it.
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
    assert result.report["bytes_after"] < 0.35 * result.report["bytes_before"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_that_are_no_numbers_are_refused_by_name(value, bits, tmp_path):
    broken = random(64, 64)
    broken[3, 5] = value
    save_file({"good.weight": random(64, 64), "bad.weight": broken}, tmp_path / "m.safetensors")
    with pytest.raises(DataError, match=r"bad\.weight.*NaN or infinite"):
        compress(FolderModel(tmp_path / "m.safetensors"), tmp_path / "job", bits=bits)
    assert not list((tmp_path / "job").rglob("*.safetensors"))


def test_a_quantized_model_is_refused(model, tmp_path):
    _, packed = compress(model, tmp_path / "job")
    with pytest.raises(UsageError, match="quantized already"):
        compress(packed, tmp_path / "again")


@pytest.mark.parametrize(
    "tensors",
    [
        {"x.weight": random(64, 64).to(torch.float8_e4m3fn)},
        {"x.weight": torch.ones(64, 64, dtype=torch.uint8), "x.weight.absmax": random(64)},
        {"x.qweight": torch.ones(64, 64, dtype=torch.int32)},
    ],
)
def test_a_model_that_others_quantized_is_refused(tensors, tmp_path):
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="quantized already"):
        compress(FolderModel(tmp_path / "m.safetensors"), tmp_path / "job")


def test_adapters_and_models_without_weights_or_without_anything_to_do_are_refused(tmp_path):
    save_file({"x.weight": random(64, 64)}, tmp_path / "m.safetensors")
    save_file({"x.bias": random(64)}, tmp_path / "small.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for model, error, reason in (
        (FolderModel(tmp_path / "m.safetensors", adapter_type="lora"), UsageError, "is an adapter"),
        (FolderModel(tmp_path / "model.gguf"), DataError, "no safetensors"),
        (FolderModel(tmp_path / "small.safetensors"), UsageError, "nothing to quantize"),
    ):
        with pytest.raises(error, match=reason):
            compress(model, tmp_path / model.name)


def test_a_cancel_leaves_no_file(model, tmp_path):
    with pytest.raises(Cancelled), LocalContext(tmp_path / "job", [model], cancel_after=6) as context:
        Rtn().run(context, RtnParams())
    assert not list((tmp_path / "job").rglob("*.safetensors"))


_STREAMING = """
import resource, sys
from pathlib import Path
import torch
from modelgrove_hub.testing import FolderModel, run_plugin
from modelgrove_plugins.compress.rtn import Rtn
import modelgrove_kernels.packing, modelgrove_hub.store.writer
torch.zeros(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run_plugin(Rtn(), [FolderModel(Path(sys.argv[1]))], Path(sys.argv[2]), {"bits": 4})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_stays_at_a_few_tensors_whatever_the_file_s_size(tmp_path):
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
    weight = random(1024, 2048).half()
    tensors = {f"layers.{n}.weight": weight.clone() for n in range(40)}
    save_file(tensors, tmp_path / "m.safetensors")
    command = [sys.executable, "-c", _STREAMING, str(tmp_path / "m.safetensors"), str(tmp_path / "job")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # 160 MB of weights, 4 MB each. Beside a few of those there is the writers' buffer of 32 MB and what
    # torch loads when it first computes; a compressor that holds the file would need 160 MB more.
    assert int(done.stdout) * 1024 < 130e6


def test_inputs_are_rounded_for_the_comparison_alone(pipeline, tmp_path):
    """The same codes with and without; fewer bits of the inputs lose more."""
    errors, files = [], []
    for bits in (None, 8, 4):
        job = tmp_path / str(bits)
        values = {"bits": 8, "smallest": 256, "activation_bits": bits}
        errors.append(run_plugin(Rtn(), [pipeline], job, values).report["fidelity"]["error"])
        files.append(load_file(job / "out/unet/diffusion_pytorch_model.safetensors"))
    assert errors[0] < errors[1] < errors[2] / 10
    assert all(torch.equal(files[0][name], files[2][name]) for name in files[0])
