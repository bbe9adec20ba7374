"""Tensors first, metadata last, and nothing at all after a failure."""

import pytest
import torch
from safetensors import safe_open

from modelgrove_hub.testing import LocalContext
from modelgrove_plugins.spool import spooled


def test_metadata_that_is_known_last_is_in_the_file(tmp_path):
    with LocalContext(tmp_path) as context:
        with spooled(context, "part/x.safetensors") as output:
            for number in range(3):
                output.add(f"t{number}", torch.full((2,), number))
            output.metadata["sum"] = "3"
        assert list(context.temp.iterdir()) == []
    with safe_open(tmp_path / "out/part/x.safetensors", framework="pt") as file:
        assert file.metadata() == {"sum": "3"}
        assert [int(file.get_tensor(f"t{number}")[0]) for number in range(3)] == [0, 1, 2]


def test_two_spools_do_not_meet(tmp_path):
    with (
        LocalContext(tmp_path) as context,
        spooled(context, "a.safetensors") as a,
        spooled(context, "b.safetensors") as b,
    ):
        a.add("t", torch.zeros(1))
        b.add("t", torch.ones(1))
    with safe_open(tmp_path / "out/a.safetensors", framework="pt") as file:
        assert float(file.get_tensor("t")) == 0


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), LocalContext(tmp_path) as context, spooled(context, "x.safetensors") as output:
        output.add("t", torch.zeros(1))
        raise RuntimeError
    assert not list(tmp_path.rglob("*.safetensors"))
