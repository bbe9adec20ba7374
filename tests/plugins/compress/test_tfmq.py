"""TFMQ-DM as a plugin: the layers of time, learned over all timesteps."""

import pytest
import torch
from safetensors.torch import load_file

from modelgrove_hub.contracts import Cancelled
from modelgrove_hub.formats.quantized import manifest_of
from modelgrove_hub.testing import LocalContext, run_plugin
from modelgrove_kernels import temporal
from modelgrove_plugins.compress.tfmq import Tfmq, TfmqParams

FILE = "out/unet/diffusion_pytorch_model.safetensors"
VALUES = {"smallest": 256, "pictures": 4, "steps": 4, "iterations": 0, "temporal_iterations": 200, "intervals": 20}


def packed(pipeline, folder, **values):
    report = run_plugin(Tfmq(), [pipeline], folder, {**VALUES, "fidelity": False, **values}).report
    return report, manifest_of(folder / FILE), load_file(folder / FILE)


def test_temporal_features_lose_less_than_rounded_to_nearest(pipeline, tmp_path):
    report, _, _ = packed(pipeline, tmp_path, fidelity=True)
    found = report["temporal"]
    assert (found["layers"], found["timesteps"], found["intervals"]) == (10, 1000, 20)
    assert 0 < found["error"] < found["error_nearest"] / 2
    assert report["fidelity"]["error"] > 0


def test_learning_and_ranges_both_help(pipeline, tmp_path):
    def error(**values):
        return packed(pipeline, tmp_path / f"{values}", **values)[0]["temporal"]["error"]

    whole = error()
    assert whole < 0.8 * error(temporal_iterations=0)
    assert whole < error(intervals=1)
    assert error(activation_bits=4) > whole


def test_embeddings_of_time_are_taken_and_have_a_range_for_each_interval(pipeline, tmp_path):
    report, manifest, stored = packed(pipeline, tmp_path)
    assert manifest.timesteps == tuple(range(0, 1000, 50))
    name = "time_embedding.linear_1.weight"
    assert manifest.tensors[name].activations.ranges == "timestep"
    ranges = stored[f"{name}.ranges"]
    assert ranges.shape == (20, 1, 2)
    # The sinusoids of t, sine and cosine: at t = 0 … 49 the slowest cosine stays near 1.
    times = torch.arange(50)[:, None] * torch.exp(-torch.log(torch.tensor(1e4)) * torch.arange(8) / 8)
    waves = torch.cat([times.sin(), times.cos()])
    assert torch.allclose(ranges[0, 0], torch.stack(torch.aminmax(waves)), atol=1e-4)
    assert [layer["name"] for layer in report["layers"] if layer.get("temporal")][-1].startswith("unet/up_blocks")
    others = [entry.activations for name, entry in manifest.tensors.items() if "time_emb" not in name]
    assert all(one.ranges == "static" for one in others)


def test_what_the_user_skips_is_kept(pipeline, tmp_path):
    report, manifest, _ = packed(pipeline, tmp_path, skip=["*time_embedding*", "*conv_in*", "*conv_out*"])
    assert not [name for name in manifest.tensors if name.startswith("time_embedding")]
    assert report["temporal"]["layers"] == 8


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("unet/time_embedding.linear_1.weight", True),
        ("transformer/adaln_single.emb.timestep_embedder.linear_2.weight", True),
        ("unet/add_embedding.linear_1.weight", False),
        ("transformer/pos_embed.proj.weight", False),
        ("unet/mid_block.resnets.0.conv1.weight", True),
    ],
)
def test_embeddings_of_time_alone_are_taken(name, taken):
    assert TfmqParams().takes_shape(name, (64, 64)) == taken


def test_a_network_without_an_embedding_of_time_is_said_to_have_none(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(temporal, "_EMBEDDING", "NoSuchClass")
    report, manifest, _ = packed(pipeline, tmp_path)
    assert "no layer" in report["temporal"]["reason"]
    assert manifest.timesteps == ()


def test_sixteen_bits_of_activations_have_no_timesteps(pipeline, tmp_path):
    report, manifest, _ = packed(pipeline, tmp_path, activation_bits=16)
    assert manifest.timesteps == ()
    assert all(entry.activations is None for entry in manifest.tensors.values())
    assert report["temporal"]["error"] > 0


def test_a_cancel_is_heard_while_time_is_learned(pipeline, tmp_path):
    class Stopped(LocalContext):
        def progress(self, done, message=""):
            if "timesteps" in message:
                raise Cancelled

    with pytest.raises(Cancelled), Stopped(tmp_path, [pipeline]) as context:
        Tfmq().run(context, TfmqParams(smallest=256, pictures=1, steps=1))
