"""Models that stay loaded: fewer loads, the same pictures, bounded memory."""

from types import SimpleNamespace

import pytest
import torch

from modelgrove_hub.errors import UsageError
from modelgrove_hub.settings import settings
from modelgrove_plugins.preview import diffusers, warm
from modelgrove_plugins.preview.diffusers import open_painter
from modelgrove_plugins.preview.quantized import quantize_network
from modelgrove_plugins.preview.warm import borrowed, weight_of


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr(warm, "_shelf", type(warm._shelf)())
    yield
    settings.cache_clear()


@pytest.fixture
def loads(monkeypatch):
    """Names of the models that were loaded."""
    seen = []

    def watched(model, folder):
        seen.append(model.name)
        return open_painter(model, folder)

    monkeypatch.setattr(diffusers, "open_painter", watched)
    return seen


def allow(monkeypatch, size):
    monkeypatch.setenv("MODELGROVE_WARM_BYTES", str(size))
    settings.cache_clear()


@pytest.mark.parametrize("quant", ["none", "w8a8", "w4a8"])
def test_a_model_is_loaded_once_and_adapters_leave_no_trace(zoo, lora, paint, loads, monkeypatch, quant):
    style = lora("style", size=3.0)
    allow(monkeypatch, 0)
    cold = [paint(zoo, quant=quant)[0], paint(zoo, style, quant=quant)[0]]
    assert len(loads) == 2
    allow(monkeypatch, 1 << 30)
    pictures = [paint(zoo, *adapters, quant=quant)[0] for adapters in ((), (style,), (), (style,), (style, style), ())]
    assert len(loads) == 3
    assert all(pictures[place] == cold[0] for place in (0, 2, 5))
    assert all(pictures[place] == cold[1] for place in (1, 3))
    assert pictures[4] != cold[1]


def test_number_formats_are_kept_apart(zoo, paint, loads):
    for quant in ("none", "w8a8", "none", "w8a8"):
        paint(zoo, quant=quant)
    assert len(loads) == 2


def test_a_model_that_failed_is_not_kept(zoo, lora, paint, loads):
    stranger = lora("stranger", layers=("transformer_blocks.0.attn.to_q",))
    for _ in range(2):
        with pytest.raises(UsageError):
            paint(zoo, stranger)
    assert len(loads) == 2


def test_the_least_recently_used_go_when_memory_is_full(zoo, tmp_path, monkeypatch):
    painters = {name: open_painter(zoo, tmp_path / name) for name in "abc"}
    size = weight_of(painters["a"])
    allow(monkeypatch, 2 * size)
    asked = []

    def use(name):
        def load():
            asked.append(name)
            return painters[name], {}

        with borrowed(name, load) as ((painter, _), undo):
            assert painter is painters[name]
            assert undo is not None

    for name in "abacab":
        use(name)
    assert "".join(asked) == "abcb"  # c pushes b out, which was used before a


def test_bytes_are_those_of_weights_packed_ones_too():
    network = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Conv2d(64, 96, 3, bias=False))

    painting, values = SimpleNamespace(networks={"unet": network}), 256 * 512 + 64 * 96 * 9
    assert weight_of(painting) == 4 * (values + 512)
    assert quantize_network(network, "unet", "w4a8") == 2
    # Half a byte a weight, scales and zero points of 64, and panels that are filled up.
    assert 0.5 * values < weight_of(painting) < 0.75 * values
