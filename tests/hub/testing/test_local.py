"""A plugin's surroundings without a hub behave as a job's do."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelgrove_hub.contracts import Cancelled, Context, InputModel, Kind
from modelgrove_hub.errors import NotFoundError, PluginError, UsageError
from modelgrove_hub.testing import FolderModel, LocalContext, run_plugin, tiny_inputs
from modelgrove_plugins.merge.sum import Sum


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model/unet").mkdir(parents=True)
    save_file({"b": torch.ones(2), "a": torch.zeros(3)}, tmp_path / "model/unet/w.safetensors", {"format": "pt"})
    (tmp_path / "model/README.md").write_text("---\ntags: [style]\n---\nA model.\n")
    (tmp_path / "model/.hidden").write_text("x")
    return tmp_path / "model"


def test_a_folder_is_a_model(folder):
    model: InputModel = FolderModel(folder, family="sdxl")
    assert model.files().keys() == {"README.md", "unet/w.safetensors"}
    assert {tensor.name for tensor in model.tensors()} == {"unet/a", "unet/b"}
    assert model.metadata() == {"format": "pt"}
    assert (model.name, model.family, model.card, tuple(model.tags)) == ("model", "sdxl", "A model.", ("style",))


def test_a_single_file_is_a_model_and_nothing_is_none(folder):
    assert FolderModel(folder / "unet/w.safetensors").files().keys() == {"w.safetensors"}
    with pytest.raises(NotFoundError, match="missing"):
        FolderModel(folder / "missing")


def test_writers_are_closed_at_the_end_and_scratch_is_removed(tmp_path):
    context: Context
    with LocalContext(tmp_path / "job") as context:
        context.writer("part/x.safetensors", {"k": "v"}).add("t", torch.ones(2))
        (context.temp / "scratch").write_text("x")
    assert torch.equal(load_file(tmp_path / "job/out/part/x.safetensors")["t"], torch.ones(2))
    assert not (tmp_path / "job/temp").exists()


def test_a_failed_run_leaves_no_weights(tmp_path):
    with pytest.raises(RuntimeError), LocalContext(tmp_path / "job") as context:
        context.writer("x.safetensors").add("t", torch.ones(2))
        raise RuntimeError
    assert not list((tmp_path / "job").rglob("*"))[1:]


def test_paths_that_leave_the_folder_are_refused(tmp_path):
    with LocalContext(tmp_path / "job") as context:
        for path in ("../x", "/tmp/x", "a/../../x", ""):
            with pytest.raises(PluginError):
                context.path(path)


def test_the_generator_goes_on_where_it_was_and_begins_at_the_seed(tmp_path):
    def draws(name, seed):
        with LocalContext(tmp_path / name, seed=seed) as context:
            return [float(torch.rand(1, generator=context.generator())) for _ in range(3)]

    assert draws("a", 1) == draws("b", 1) != draws("c", 2)
    assert len(set(draws("d", 1))) == 3


def test_progress_and_log_are_kept_and_a_cancel_comes_when_it_is_due(tmp_path):
    with pytest.raises(Cancelled), LocalContext(tmp_path / "job", cancel_after=2) as context:
        context.log("hello")
        for step in range(5):
            context.progress(step / 5, f"step {step}")
    assert context.steps == [(0.0, "step 0"), (0.2, "step 1")]
    assert context.lines == ["hello"]


def test_a_plugin_is_run_with_checked_parameters(tmp_path):
    inputs = tiny_inputs(Kind.MERGER, tmp_path / "inputs")
    result = run_plugin(Sum(), inputs, tmp_path / "job", {"weights": [1, 2]})
    assert (tmp_path / "job/out" / result.outputs[0].files[0]).exists()
    with pytest.raises(UsageError, match="no parameter 'size'"):
        run_plugin(Sum(), inputs, tmp_path / "other", {"size": 1})
