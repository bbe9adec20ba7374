"""What bench/sara.py measures: an adapter is grown once, and its row is of its own file and effect."""

import torch

from modelgrove_analyzers.zoo.base_folder import open_base
from modelgrove_analyzers.zoo.pictures import PictureSet


def test_a_sparse_adapter_is_grown_once_and_measured(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "PICTURES", 1)
    base, pictures = open_base(bench.ZOO / "zoo-base"), PictureSet.load(bench.ZOO)
    paths = bench.grown(tmp_path, ["cat"], base, pictures, 1, rate=3e-3, share=0.01)
    [file] = paths["cat"].glob("*.safetensors")
    written = file.stat().st_mtime_ns
    assert bench.grown(tmp_path, ["cat"], base, pictures, 1, rate=3e-3, share=0.01) == paths
    assert file.stat().st_mtime_ns == written
    gallery = (torch.zeros(1, 8 * 8 * 24), ["cat"])
    row = bench.alone("SaRA", paths, 0.01, bench.Network(base), pictures, gallery)
    assert row["kB"] == file.stat().st_size / 1000
    assert row["drawn"] == 1  # there is nothing else in the gallery
    assert row["gain"] != 0
    assert row["drift"] > 0
