import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from modelgrove_hub.cli.preview import preview
from modelgrove_hub.errors import JobFailedError, NotFoundError, UsageError
from modelgrove_hub.jobs.rows import list_jobs

QUICK = ("--steps", "2", "--local")
LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """The smallest pipeline that is recognised as the zoo's, untrained."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    from modelgrove_hub.search.text import SPACE, WIDTH
    from modelgrove_kernels.codec import LinearCodec

    folder = tmp_path_factory.mktemp("models") / "base"
    (folder / "codec").mkdir(parents=True)
    torch.manual_seed(0)
    codec = LinearCodec.fit(torch.rand(32, 3, 32, 32) * 2 - 1, channels=24)
    UNet2DConditionModel(
        sample_size=8, in_channels=24, out_channels=24, layers_per_block=1, block_out_channels=(96, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=16,
    ).half().save_pretrained(folder / "unet")  # fmt: skip
    DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False).save_pretrained(
        folder / "scheduler"
    )
    save_file(codec.tensors(), folder / "codec/codec.safetensors")
    index = {"_class_name": "ZooPipeline", "text_encoder_name": SPACE, "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def base(register, base_folder):
    return register("base", folder=base_folder)


@pytest.fixture
def lora(register):
    generator = torch.Generator().manual_seed(0)
    factors = {"lora_A": torch.randn(2, 160, generator=generator), "lora_B": torch.randn(160, 2, generator=generator)}
    return register("style", {f"{LAYER}.{name}.weight": tensor for name, tensor in factors.items()})


def test_a_preview_is_painted_once_and_then_comes_from_the_cache(hub, base, run, tmp_path):
    out = tmp_path / "pictures/cat.png"
    wanted = (base, "--prompt", "a cat", *QUICK)

    first, again = run(preview, *wanted, "--out", str(out)), run(preview, *wanted)

    assert (first["cached"], again["cached"]) == (False, True)
    assert first["picture"] == str(out)
    assert out.read_bytes() == Path(again["picture"]).read_bytes()
    assert Image.open(out).text["modelgrove"]
    assert len(list_jobs(hub)) == 1


def test_a_default_that_is_said_aloud_is_the_same_preview(base, run):
    run(preview, base, "--prompt", "a cat", *QUICK)

    assert run(preview, base, "--prompt", "a cat", "--guidance-scale", "2", *QUICK)["cached"]
    assert not run(preview, base, "--prompt", "a cat", "--guidance-scale", "3", *QUICK)["cached"]


def test_a_lost_cache_is_filled_again_from_the_finished_job(hub, base, run):
    first = run(preview, base, "--prompt", "a cat", *QUICK)
    picture = Path(first["picture"]).read_bytes()
    hub.settings.previews.rename(hub.settings.home / "gone")

    again = run(preview, base, "--prompt", "a cat", *QUICK)

    assert again["job"] == first["job"]
    assert Path(again["picture"]).read_bytes() == picture


def test_an_adapter_is_shown_on_its_base(base, lora, run):
    shown = run(preview, lora, "--prompt", "a cat", *QUICK)
    given = run(preview, base, "--lora", lora, "--prompt", "a cat", *QUICK)
    weaker = run(preview, base, "--lora", f"{lora}:0.5", "--prompt", "a cat", *QUICK)

    assert shown["adapters"][0]["matched"] == 1
    assert given["picture"] == shown["picture"]
    assert weaker["picture"] != shown["picture"]


def test_the_bare_command_prints_where_the_picture_is(base, run, tmp_path):
    assert run(preview, base, "--prompt", "a cat", *QUICK, "--out", str(tmp_path / "a.png"), text=True) == [
        str(tmp_path / "a.png")
    ]


def test_without_a_worker_the_job_waits(hub, base, run, monkeypatch):
    job = run(preview, base, "--prompt", "a cat", "--steps", "2")

    assert (job["state"], job["queue"]) == ("queued", "preview")


def test_an_adapter_without_base_says_what_to_do(lora, run):
    with pytest.raises(NotFoundError, match="ingest its base, or name one"):
        run(preview, lora, "--prompt", "a cat", *QUICK)


def test_a_weight_that_is_no_number_is_refused(base, lora, run):
    with pytest.raises(UsageError, match="'strong' is no weight"):
        run(preview, base, "--lora", f"{lora}:strong", "--prompt", "a cat")


def test_what_cannot_paint_ends_with_the_reason(register, network, run):
    with pytest.raises(JobFailedError, match=r"has no model_index\.json"):
        run(preview, register("bare", network(0)), "--prompt", "a cat", *QUICK)
