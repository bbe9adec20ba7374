"""Updates that are whole matrices, such as full differences, are treated as adapters of the same rank are."""

import pytest
from safetensors.torch import save_file

from modelgrove_hub.formats.adapters import read_adapter
from modelgrove_hub.plugins import get_plugin
from modelgrove_hub.testing import FolderModel, run_plugin

MODULE = "mid_block.attentions.0.proj_in"
METHODS = [
    ("tsv", {}), ("knots", {"density": 0.4}), ("iso-c", {}), ("orthogonal", {"repair": "projection"}),
    ("orthogonal", {"repair": "sequential"}), ("orthogonal", {"repair": "output"}), ("orthogonal", {"repair": "soft"}),
]  # fmt: skip


def difference(folder, name, update):
    path = folder / f"{name}.safetensors"
    save_file({f"unet.{MODULE}.diff": update.float().contiguous()}, path)
    return FolderModel(path, name=name, adapter_type="lora")


def merged(method, models, folder, params):
    plugin = get_plugin(f"merger.{method}")
    run_plugin(plugin(), models, folder, {**params, "weights": [1.0, 0.5, 2.0]})
    [part] = read_adapter(FolderModel(folder / "out", adapter_type="lora")).modules.values()
    return part.up.double() @ part.down.double()


@pytest.mark.parametrize(("method", "params"), METHODS)
@pytest.mark.parametrize("whole", [1, 3])
def test_whole_differences_of_low_rank_merge_as_their_factors_do(method, params, whole, make, tmp_path):
    parts = [make(name, 5, shapes={MODULE: (72, 80)}) for name in "abc"]
    factored = [model for model, _ in parts]
    (tmp_path / "whole").mkdir()
    mixed = [difference(tmp_path / "whole", name, parts[n][1][MODULE]) for n, name in enumerate("xyz"[:whole])]
    wanted = merged(method, factored, tmp_path / "one", params)
    found = merged(method, [*mixed, *factored[whole:]], tmp_path / "other", params)
    # float32 with cut-offs at 1e-5; an entry at TIES' threshold may fall on the other side.
    room = 5e-3 if method == "knots" else 1e-4
    assert float((found - wanted).norm() / wanted.norm()) < room
