"""Methods that look at entries or whole vectors: what must hold for all of them, on files."""

import pytest
import torch
from safetensors.torch import load_file

from modelgrove_hub.errors import UsageError
from modelgrove_hub.testing import LocalContext, check_plugin, run_plugin
from modelgrove_kernels.lowrank import LowRank
from modelgrove_plugins.merge.breadcrumbs import Breadcrumbs
from modelgrove_plugins.merge.combining import combine
from modelgrove_plugins.merge.dare import Dare, DareParams
from modelgrove_plugins.merge.della import Della
from modelgrove_plugins.merge.entries import EntryParams, by_entries
from modelgrove_plugins.merge.model_stock import ModelStock
from modelgrove_plugins.merge.slerp import Slerp
from modelgrove_plugins.merge.sum import Sum
from modelgrove_plugins.merge.ties import Ties

PLUGINS = [Breadcrumbs, Dare, Della, ModelStock, Slerp, Ties]


@pytest.mark.parametrize("plugin", PLUGINS)
def test_it_keeps_the_contract_and_repeats_to_the_byte(plugin, make, tmp_path):
    assert [check for check in check_plugin(plugin) if not check.ok] == []
    models = [make(name)[0] for name in "ab"]
    files = []
    for job in ("one", "two"):
        run_plugin(plugin(), models, tmp_path / job, {"seed": 5})
        files.append(load_file(tmp_path / job / "out/pytorch_lora_weights.safetensors"))
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_the_core_does_not_depend_on_factoring_or_order():
    from modelgrove_kernels.task_vectors import elected_mean, trim

    generator = torch.Generator().manual_seed(0)
    first, second = (
        LowRank(torch.randn(40, 4, generator=generator), torch.randn(4, 30, generator=generator)) for _ in range(2)
    )
    turn = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    other = LowRank((first.up.double() @ turn).float(), (turn.inverse() @ first.down.double()).float())
    method = by_entries(
        "ties", lambda parts, given: elected_mean([trim(x, 0.4) for x in given], parts.weights), EntryParams()
    )

    def merged(*updates):
        found = combine(method, "m", dict(enumerate(updates)), [1.0, 1.0])
        return found.frame.lift(found.result)

    wanted = merged(first, second)
    # Rounding of the other factors and of two eigenvector bases.
    for found in (merged(other, second), merged(second, first)):
        assert float((found - wanted).norm() / wanted.norm()) < 1e-3


def test_slerp_needs_two_models_and_della_probabilities(make, tmp_path):
    models = [make(name)[0] for name in "abc"]
    with pytest.raises(UsageError, match="two, not 3"):
        run_plugin(Slerp(), models, tmp_path / "slerp", {})
    with pytest.raises(UsageError, match="probabilities"):
        run_plugin(Della(), models[:2], tmp_path / "della", {"density": 0.95})


def test_a_method_that_settles_nothing_warns(make, tmp_path):
    single = make("a")[0]
    with LocalContext(tmp_path / "dare", [single]) as context:
        [warning] = Dare().run(context, DareParams()).report["warnings"]
    assert warning == "dare settles what several models change; a is alone and was only weighted"
    assert context.lines == [f"warning: {warning}"]
    assert run_plugin(Sum(), [single], tmp_path / "sum", {}).report["warnings"] == []
