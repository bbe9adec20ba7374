"""What bench/museum.py measures: after each training all styles so far, and how much the earlier ones lost."""

import pytest
import torch


def test_every_style_learned_so_far_is_asked_for(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "TIMES", 2)
    base, *rows = bench.measure(tmp_path, 2, 3, 2, {"both": {"batch": 2}})
    assert all(base[style] > 0 for style in bench.STYLES)
    assert [row["after"] for row in rows] == list(bench.STYLES)
    first, second, third = rows
    assert "night" not in first
    assert first["forgotten"] is None
    assert second["forgotten"] == second["outline"] - first["outline"] != 0
    lost = (third["outline"] - first["outline"], third["night"] - second["night"])
    assert third["forgotten"] == pytest.approx(sum(lost) / 2)
    assert len({first["outline"], second["night"], third["mosaic"]}) == 3
    assert bench.table([base, *rows]).row_count == 4


def test_held_out_drawings_are_none_that_are_learned(bench):
    chosen = bench.drawings(20)
    assert len({(pixels.tobytes(), label) for pixels, label in chosen}) == 20
    assert torch.equal(*(torch.from_numpy(bench.drawings(3)[2][0]) for _ in range(2)))
