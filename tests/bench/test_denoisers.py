import json

import pytest
import torch
from click.testing import CliRunner
from diffusers import UNet2DConditionModel


@pytest.fixture
def small(bench, monkeypatch):
    """The UNet alone, tiny, and its memory not measured: a process of its own would not know of the change."""

    def tiny(_quick):
        _, predict, _ = bench.sd1(True)
        network = UNet2DConditionModel(
            block_out_channels=(32, 64),
            cross_attention_dim=768,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        return network, predict, (1, 4, 8, 8)

    monkeypatch.setattr(bench, "NETWORKS", {"sd1": tiny})
    monkeypatch.setattr(bench, "resident", lambda _name, quant, _quick: {"fp32": 4, "w8a8": 2, "w4a8": 1}[quant])
    threads = torch.get_num_threads()
    yield bench
    torch.set_num_threads(threads)


def test_both_formats_are_measured_against_fp32(small):
    done = CliRunner().invoke(small.main, ["--quick", "--json", "--threads", "1"], catch_exceptions=False)
    rows = json.loads(done.stdout)["results"]
    assert [(row["quant"], row["memory"]) for row in rows] == [("w8a8", 0.5), ("w4a8", 0.25)]
    assert all(row["ratio"] > 0 for row in rows)
    assert 0 < rows[0]["error"] < rows[1]["error"] < 0.5
    assert any("modelgrove::conv2d" in name for name in rows[0]["profile"])


def test_pixart_answers_with_noise_of_the_latents_shape(bench):
    network, predict, shape = bench.pixart(True)
    small = type(network).from_config({**network.config, "num_layers": 1})
    with torch.no_grad():
        assert predict(small, torch.zeros(2, *shape[1:]), 1).shape == (2, *shape[1:])
