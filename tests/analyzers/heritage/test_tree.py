"""The tree of checkpoints on disk: every kind of verdict, with its evidence."""

import pytest
import torch

from modelgrove_analyzers.heritage.tree import Tree
from modelgrove_hub.errors import UsageError
from modelgrove_kernels.packing import dequantize, quantize


def moved(weights, noise, size):
    return {name: tensor + size * noise[name] for name, tensor in weights.items()}


def with_lora(weights, rank):
    generator = torch.Generator().manual_seed(rank)
    made = dict(weights)
    for name in [name for name in weights if "to_q" in name]:
        up, down = (torch.randn(96, rank, generator=generator) * 0.02 for _ in range(2))
        made[name] = weights[name] + up @ down.T
    return made


def packed(weights):
    return {n: dequantize(quantize(t, 8)) if t.ndim == 2 else t for n, t in weights.items()}


@pytest.fixture
def report(network, save, analyze):
    base = network()
    tuned = moved(base, network(1), 0.2)
    weights = {
        "base": base, "tuned": tuned, "again": moved(tuned, network(2), 0.2), "beside": moved(base, network(3), 0.2),
    }  # fmt: skip
    weights["lora"] = with_lora(tuned, 3)
    weights["mix"] = {n: 0.75 * weights["again"][n] + 0.25 * weights["beside"][n] for n in base}
    weights["half"] = {n: t.half() for n, t in tuned.items()}
    weights["int8"] = packed(weights["beside"])
    weights["copied"] = dict(base)
    weights["stranger"] = network(4)
    models = [save(name, one) for name, one in weights.items()]

    def run(**params):
        return {row["name"]: row for row in analyze(Tree(), *models, **params)["models"]}

    return run


def test_every_model_gets_its_parent_and_verdict(report):
    rows = report(root=0)

    assert {name: (row["verdict"], row["parents"]) for name, row in rows.items()} == {
        "base": ("root", []),
        "tuned": ("fine-tune", ["base"]),
        "again": ("fine-tune", ["tuned"]),
        "beside": ("fine-tune", ["base"]),
        "lora": ("LoRA merged in", ["tuned"]),
        "mix": ("merge", ["again", "beside"]),
        "half": ("quantized copy", ["tuned"]),
        "int8": ("quantized copy", ["beside"]),
        "copied": ("exact copy", ["base"]),
        "stranger": ("unrelated", []),
    }
    assert rows["mix"]["weights"] == pytest.approx([0.75, 0.25], abs=1e-4)  # rounding of float32, a tenth of the way
    assert set(rows["lora"]["evidence"]["ranks"].values()) == {3}
    assert rows["lora"]["text"] == "lora is tuned with a LoRA of rank 3 merged in"
    assert all(0.5 <= row["probability"] <= 1 for row in rows.values() if row["parents"])


def test_times_count_where_they_are_apart(report):
    hours = [9.0, 0, *range(1, 9)]  # "tuned" is the first

    rows = report(times=[3600 * hour for hour in hours], slack=60)

    assert rows["tuned"]["verdict"] == "root"
    assert rows["base"]["parents"] == ["tuned"]


@pytest.mark.parametrize(("params", "message"), [({"times": [1.0]}, "1 for 10"), ({"root": 10}, "number 10 of 10")])
def test_what_does_not_fit_is_refused(report, params, message):
    with pytest.raises(UsageError, match=message):
        report(**params)


def test_adapters_are_refused(network, save, analyze):
    with pytest.raises(UsageError, match="these are adapters: lora"):
        analyze(Tree(), save("base", network()), save("lora", network(1), adapter_type="lora"))
