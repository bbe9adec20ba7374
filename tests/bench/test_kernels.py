import json

import pytest
import torch
from click.testing import CliRunner


@pytest.fixture
def small(bench, monkeypatch):
    for name, value in {"QUICK_SIZES": (64, 128), "QUICK_TOKENS": (1, 3), "QUICK_ROUNDS": 2, "APART": 1e5}.items():
        monkeypatch.setattr(bench, name, value)
    threads = torch.get_num_threads()
    yield bench
    torch.set_num_threads(threads)


def test_every_layout_is_measured_at_every_shape(small):
    done = CliRunner().invoke(small.main, ["--quick", "--json", "--threads", "1"], catch_exceptions=False)
    found = json.loads(done.stdout)["results"]
    shapes = {(row["layout"], row["tokens"], row["inputs"], row["outputs"]) for row in found}
    assert len(found) == len(shapes) == len(small.layouts()) * 2 * 4
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in found)
    errors = {name: max(row["error"] for row in found if row["layout"] == name) for name in small.layouts()}
    assert errors["fp32"] < 1e-6
    # Rounding a normal distribution to 4 bits costs .06 to .1 of it, to 8 bits with one scale a row .01.
    assert all(0.03 < errors[name] < 0.15 for name in ("w4a8", "w4a8 rank 32", "lut4"))
    # oneDNN adds products of 8 bits in 16 without VNNI, and saturates: modules.py does not use it then.
    exact = ("w8a8 x86", "w8a8 onednn") if small.native.isa() == "avx512vnni" else ("w8a8 x86",)
    assert all(errors[name] < 0.03 for name in exact)
    assert {row["layout"] for row in found if row["off"] is not None} == {"w4a8", "w4a8 rank 32", "lut4"}
    assert all(row["off"] is None or row["off"] < 1e-5 for row in found)


def test_tables_have_a_column_for_every_shape(small):
    done = CliRunner().invoke(small.main, ["--quick", "--threads", "1"], catch_exceptions=False)
    assert done.stdout.count("128×64") == 2
    assert "tokens: 3, threads: 1" in done.stdout
    assert "w4a8 rank 32" in done.stdout


def test_the_ceiling_counts_bytes_at_one_token_and_instructions_else(bench, monkeypatch):
    monkeypatch.setattr(bench.native, "isa", lambda: "avx2")
    weight = torch.zeros(640, 1280)
    assert bench.ceiling("w4a8", 1, weight, weight.nbytes // 4) == 4
    assert bench.ceiling("w4a8", 64, weight, 1) == pytest.approx(3.25)
    # 32 · (1/640 + 1/1280) of fp32's multiplications come on top.
    assert bench.ceiling("w4a8 rank 32", 64, weight, 1) == pytest.approx(1 / (1 / 3.25 + 0.075))
    assert bench.ceiling("w8a8 x86", 64, weight, 1) is None


def test_copies_are_called_in_turn_at_one_token_only(bench):
    calls = [torch.relu, torch.abs, torch.neg]
    assert bench.turn_of(calls, torch.ones(1, 4), lambda: 0.0) == calls
    seconds = iter([0.0, bench.TURN / 5])
    assert bench.turn_of(calls, torch.ones(2, 4), lambda: next(seconds)) == [torch.relu] * 5
