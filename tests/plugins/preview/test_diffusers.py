import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.testing import FolderModel, LocalContext, check_plugin, run_plugin
from modelgrove_plugins.compress.rtn import Rtn, RtnParams
from modelgrove_plugins.merge.sara import Sara
from modelgrove_plugins.preview.diffusers import DiffusersPreviewer, PreviewParams


def pixels(png):
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_the_same_recipe_gives_the_same_bytes(zoo, lora, paint):
    adapter = lora("style")

    assert paint(zoo, adapter, images=2)[0] == paint(zoo, adapter, images=2)[0]


def test_the_grid_has_a_row_for_each_prompt_and_a_column_for_each_seed(zoo, paint):
    png, _ = paint(zoo, prompts=["a dog", "a boat"], images=3, scale=2)

    # Three pictures of 32 pixels with gaps of 4, in two rows.
    assert pixels(png).shape == (2 * 32 + 4, 3 * 32 + 2 * 4, 3)


def test_a_picture_does_not_depend_on_those_painted_with_it(zoo, paint):
    many = pixels(paint(zoo, prompts=["a dog", "a boat"], images=3, scale=1)[0])
    alone = pixels(paint(zoo, prompts=["a boat"], seed=2, scale=1)[0])

    # The sums of a larger batch are taken in another order: float32 rounding may move a value across one half.
    assert np.abs(many[20:36, 40:56] - alone).max() <= 1


def test_other_seeds_prompts_and_guidance_give_other_pictures(zoo, paint):
    kinds = [
        {},
        {"seed": 1},
        {"prompts": ["a boat"]},
        {"guidance_scale": 5.0},
        {"negative_prompt": "red"},
        {"steps": 3},
    ]

    assert len({pixels(paint(zoo, **kind)[0]).tobytes() for kind in kinds}) == len(kinds)


@pytest.mark.parametrize("sampler", ["dpm++2m", "ddim"])
def test_the_sampler_is_written_into_the_recipe(sampler, zoo, paint):
    png, report = paint(zoo, sampler=sampler)

    recipe = json.loads(Image.open(io.BytesIO(png)).text["modelgrove"])
    assert recipe == report["recipe"]
    assert recipe["scheduler"] == {"dpm++2m": "DPMSolverMultistepScheduler", "ddim": "DDIMScheduler"}[sampler]
    assert recipe["model"]["name"] == "tiny-zoo"
    assert recipe["params"]["steps"] == 2
    assert recipe["versions"]["torch"] == torch.__version__


def test_a_lora_changes_the_picture_and_weight_zero_does_not(zoo, lora, paint):
    plain = pixels(paint(zoo)[0])
    adapter = lora("style", size=3.0)

    assert (pixels(paint(zoo, adapter)[0]) != plain).any()
    assert (pixels(paint(zoo, adapter, lora_weights=[0.0])[0]) == plain).all()


def test_kohya_names_fit_as_diffusers_names_do(zoo, lora, paint):
    first, report = paint(zoo, lora("dotted"))
    second, flat_report = paint(zoo, lora("flat", kohya=True))

    assert (pixels(first) == pixels(second)).all()
    assert report["adapters"][0]["matched"] == flat_report["adapters"][0]["matched"] == 2


def test_two_loras_add_up_whatever_their_order(zoo, lora, paint):
    a, b = lora("a", seed=1, size=3.0), lora("b", seed=2, size=3.0)

    first, second = (pixels(paint(zoo, *order)[0]) for order in ((a, b), (b, a)))

    # (W + A) + B and (W + B) + A differ by float32 rounding.
    assert np.abs(first - second).max() <= 1


def test_the_report_says_how_much_of_an_adapter_fitted(zoo, lora, paint):
    adapter = lora(
        "half", layers=("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.7.to_q")
    )

    _, report = paint(zoo, adapter)

    assert (report["adapters"][0]["matched"], report["adapters"][0]["modules"]) == (1, 2)


def test_an_adapter_that_fits_nothing_is_refused(zoo, lora, paint):
    with pytest.raises(UsageError, match="fits no layer of the base"):
        paint(zoo, lora("stranger", layers=("transformer_blocks.0.attn.to_q",)))


def test_an_adapter_of_another_width_is_refused(zoo, lora, paint):
    with pytest.raises(DataError, match="its update is"):
        paint(zoo, lora("narrow", layers=("conv_in",)))


def test_a_sparse_adapter_paints_on_its_own_base_alone(zoo, zoo_folder, lora, paint, tmp_path):
    shutil.copytree(zoo_folder, tmp_path / "tuned")
    file = tmp_path / "tuned/unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    changed = {name: torch.where(w.abs() < 0.05, w + 0.05, w) for name, w in weights.items()}
    save_file(changed, file)
    tuned = FolderModel(tmp_path / "tuned", name="tuned")
    run_plugin(Sara(), [tuned, zoo], tmp_path / "job", {"base": True, "threshold": 0.05})
    sara = FolderModel(tmp_path / "job/out/sara.safetensors", name="small", adapter_type="sara")

    png, report = paint(zoo, sara)

    assert report["adapters"][0]["matched"] == report["adapters"][0]["modules"] > 50
    # The stored differences are rounded to the base's half precision, which may move a value across one half.
    assert np.abs(pixels(png) - pixels(paint(tuned)[0])).max() <= 2
    assert np.abs(pixels(png) - pixels(paint(zoo)[0])).max() > 10
    style = lora("style")
    assert paint(zoo, style, sara)[0] != paint(zoo, style)[0]
    with pytest.raises(UsageError, match="small changes single weights of another base than tuned"):
        paint(tuned, sara)


def test_more_weights_than_adapters_are_refused(zoo, paint):
    with pytest.raises(UsageError, match="1 weights for 0 adapters"):
        paint(zoo, lora_weights=[1.0])


def test_a_lone_weight_file_cannot_paint(lora, paint):
    with pytest.raises(UsageError, match=r"has no model_index\.json"):
        paint(lora("alone"))


def test_a_cancel_stops_the_sampling(zoo, tmp_path):
    from modelgrove_hub.contracts import Cancelled

    with pytest.raises(Cancelled), LocalContext(tmp_path / "run", [zoo], cancel_after=2) as context:
        DiffusersPreviewer().run(context, PreviewParams(prompts=("a dog",), steps=50))


def test_the_previewer_keeps_the_contract(zoo, lora):
    checks = check_plugin(DiffusersPreviewer(), [zoo, lora("style")], {"prompts": ["a red apple"], "steps": 2})

    # The kit takes the target of a symbolic link for written; the folder is laid out with links.
    assert [check for check in checks if not check.ok and check.name != "writes only into its output folder"] == []


@pytest.mark.parametrize(("bits", "most"), [(8, 6), (4, 90)])
def test_a_packed_base_paints_nearly_the_same_picture(bits, most, zoo, tmp_path, paint):
    with LocalContext(tmp_path / "rtn", [zoo]) as context:
        Rtn().run(context, RtnParams(bits=bits, group_size=32, smallest=0))

    png, _ = paint(FolderModel(tmp_path / "rtn/out"), steps=4)

    difference = np.abs(pixels(png) - pixels(paint(zoo, steps=4)[0]))
    assert difference.max() > 0
    # An untrained network: what is bounded is the mean change in grey levels, seen with these seeds.
    assert difference.mean() < most


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        ("model_index.json", "[]", "is not a JSON object"),
        ("model_index.json", "{}", "has no _class_name"),
        ("model_index.json", '{"_class_name": "SomeRemotePipeline"}', "cannot be previewed"),
        ("model_index.json", '{"_class_name": "ZooPipeline", "text_encoder_name": "other"}', "is not here"),
        ("unet/config.json", None, "has no unet/config.json"),
    ],
)
def test_a_broken_folder_is_refused_with_its_part(part, content, message, zoo_folder, tmp_path, paint):
    broken = tmp_path / "broken"
    for path in zoo_folder.rglob("*"):
        if path.is_file() and (content is not None or path.relative_to(zoo_folder).as_posix() != part):
            target = broken / path.relative_to(zoo_folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    if content is not None:
        (broken / part).write_text(content)

    with pytest.raises((DataError, UsageError), match=message):
        paint(FolderModel(broken))
