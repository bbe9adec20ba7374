import json

import pytest
import torch
from click.testing import CliRunner


@pytest.fixture
def small(bench, monkeypatch):
    monkeypatch.setattr(bench, "QUICK_SHAPES", (bench.Shape(64, 40, 8), bench.Shape(32, 64, 9, stride=2)))
    threads = torch.get_num_threads()
    yield bench
    torch.set_num_threads(threads)


def test_every_layout_is_measured_at_every_shape(small):
    done = CliRunner().invoke(small.main, ["--quick", "--json", "--threads", "1"], catch_exceptions=False)
    found = json.loads(done.stdout)["results"]
    assert {(row["shape"], row["layout"]) for row in found} == {
        (shape, layout) for shape in ("64→40 k3 8²", "32→64 k3 s2 9²") for layout in ("w8a8", "w4a8")
    }
    assert all(row["ratio"] > 0 and row["off"] < 1e-5 for row in found)
    # Rounding a normal distribution to 4 bits costs about .07 of it, to 8 bits about .01.
    assert all((0.03 if row["layout"] == "w4a8" else 0.003) < row["error"] < 0.15 for row in found)


def test_the_table_has_the_median_beside_the_target(small):
    done = CliRunner().invoke(small.main, ["--quick", "--threads", "1"], catch_exceptions=False)
    assert "median" in done.stdout
    assert "1.80" in done.stdout
