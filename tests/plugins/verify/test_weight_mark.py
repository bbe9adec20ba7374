"""Marks in networks and adapters: written, attacked, read; and every rule that keeps a claim honest."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
import torch
from safetensors.torch import load_file, save_file
from sqlmodel import select

from modelgrove_hub.errors import DataError, NotFoundError, UsageError
from modelgrove_hub.ingest.pipeline import ingest
from modelgrove_hub.keys import secret_file
from modelgrove_hub.plugins import get_plugin
from modelgrove_hub.registry.inputs import load_input
from modelgrove_hub.registry.models import find_revision
from modelgrove_hub.tables import Event, Revision
from modelgrove_hub.testing import FolderModel, LocalContext, run_plugin
from modelgrove_plugins.preview.diffusers import open_painter
from modelgrove_plugins.verify.alignment import Aligned, dense_tensors, units_of
from modelgrove_plugins.verify.mark import WeightMark
from modelgrove_plugins.verify.measuring import committed, measure, read_bits
from modelgrove_plugins.verify.reading import carrying_slots, matrices_of

UNET = "unet/diffusion_pytorch_model.safetensors"
_LAYER = "down_blocks.1.attentions.0.transformer_blocks.0"
LORA = {f"{_LAYER}.attn2.to_{role}": (160, 384) for role in ("k", "v")} | {
    f"mid_block.attentions.0.proj_{role}": (160, 160) for role in ("in", "out")
}


def lora(folder, name, *, rank=8, kohya=False, seed=0, dtype=torch.float16):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (rows, columns) in LORA.items():
        down = (torch.randn(rank, columns, generator=generator) * 0.05).to(dtype)
        up = (torch.randn(rows, rank, generator=generator) * 0.05).to(dtype)
        stem = f"lora_unet_{module.replace('.', '_')}" if kohya else f"unet.{module}"
        parts = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
        tensors |= {f"{stem}.{parts[0]}.weight": down, f"{stem}.{parts[1]}.weight": up}
        if kohya:
            tensors[f"{stem}.alpha"] = torch.tensor(rank / 2, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{name}.safetensors", {"format": "pt", "ss_tag_frequency": "{}"})
    return FolderModel(folder / f"{name}.safetensors", name=name, adapter_type="lora")


@pytest.fixture(scope="module", params=["diffusers", "kohya"])
def adapter(request, place):
    """An adapter, marked: (unmarked, marked, report)."""
    plain = lora(place.folder / "plain", request.param, kohya=request.param == "kohya")
    folder = place.folder / f"marked-{request.param}"
    result = run_plugin(WeightMark(), [plain], folder, {"key": place.ours})
    return plain, FolderModel(folder / "out", name="marked", adapter_type="lora"), result.report


def stranger(pipeline, folder, seed=5):
    """Another network of the same shapes, which knows nothing of the marked one."""
    generator = torch.Generator().manual_seed(seed)
    for path, source in pipeline.files().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if path == UNET:
            weights = {
                name: (torch.randn(value.shape, generator=generator) * value.float().std().nan_to_num()).half()
                for name, value in load_file(source).items()
            }
            save_file(weights, folder / path, {"format": "pt"})
        else:
            (folder / path).write_bytes(source.read_bytes())
    return FolderModel(folder, name="stranger", family="zoo")


def feed_forward(folder, name, seed):
    """Layers of hidden units that can stand in any order."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"net.0.proj.weight": (512, 64), "net.0.proj.bias": (512,), "net.2.weight": (64, 256)}
    tensors = {
        f"transformer_blocks.{block}.ff.{part}": torch.randn(shape, generator=generator) * 0.1
        for block in range(4)
        for part, shape in shapes.items()
    }
    save_file(tensors, folder / f"{name}.safetensors", {"format": "pt"})
    return FolderModel(folder / f"{name}.safetensors", name=name)


@pytest.fixture(scope="module")
def layers(place):
    """Feed-forward layers and their marked copy."""
    plain = feed_forward(place.folder, "layers", 1)
    run_plugin(WeightMark(), [plain], place.folder / "marked-layers", {"key": place.ours, "margin": 6.0})
    return plain, FolderModel(place.folder / "marked-layers/out", name="marked-layers")


def full(report, view="as it is"):
    return report["views"][view]["agreeing"] == 128


class TestNetworks:
    def test_the_written_file_shows_all_bits_and_what_it_becomes_too(self, network):
        _, report = network
        assert {name: one["agreeing"] for name, one in report["read_back"].items()} == dict.fromkeys(
            ("as written", "bfloat16", "int8", "int4"), 128
        )
        assert report["read_back"]["as written"]["weakest_bit"] == pytest.approx(6, abs=0.05)
        assert report["fidelity"] == {"reason": "it was not wanted"}

    def test_the_change_is_what_the_report_says(self, network, pipeline):
        marked, report = network
        before, after = carrying_slots(pipeline), carrying_slots(marked)
        shares = {
            name: float((after[name].read() - slot.read()).square().sum() / slot.read().square().mean())
            for name, slot in before.items()
        }
        size = sum(slot.shape[0] * slot.shape[1] for slot in before.values())
        assert report["change"] == {"relative": report["change"]["relative"], "matrices": len(before), "weights": size}
        assert (sum(shares.values()) / size) ** 0.5 == pytest.approx(report["change"]["relative"], rel=0.01)

    def test_what_the_mark_does_to_the_output_is_told(self, place, pipeline, tmp_path):
        run = run_plugin(WeightMark(), [pipeline], tmp_path, {"key": place.ours, "margin": 0.5})
        assert 0 < run.report["fidelity"]["error"] < 0.1
        assert run.artefacts == ("sheet.png",)
        assert (tmp_path / "out/sheet.png").is_file()

    def test_small_tensors_and_other_files_stay(self, network, pipeline):
        marked, _ = network
        old, new = load_file(pipeline.files()[UNET]), load_file(marked.files()[UNET])
        touched = {slot.tensor.key for slot in carrying_slots(pipeline).values()}
        assert touched
        for name, value in old.items():
            assert new[name].dtype == value.dtype
            assert torch.equal(new[name], value) == (name not in touched)
        assert set(marked.files()) == set(pipeline.files())

    def test_the_bits_are_those_of_the_definition(self, network, place):
        """Read from the file by NumPy and the key's signs alone, without our reading of models."""
        from modelgrove_hub.keys import find_key, read_secret
        from modelgrove_kernels.weight_mark import MarkKey

        with place.hub.reading() as session:
            key = MarkKey(read_secret(place.hub.settings, find_key(session, "ours")))
        total = torch.zeros(128, dtype=torch.float64)
        for name, value in load_file(network[0].files()[UNET]).items():
            if name.endswith(".weight") and value.ndim > 1 and value.numel() >= 4096:
                T = value.double().flatten(1)
                carriers = key.carriers(name.removesuffix(".weight").replace(".", "_"), tuple(T.shape))
                total += torch.einsum("ir,rc,ic->i", carriers.left.double(), T, carriers.right.double()) / T.std()
        assert torch.equal(total.sign(), key.message().double())

    @pytest.mark.parametrize(
        "params",
        [
            {"kind": "quantize", "bits": 8}, {"kind": "quantize", "bits": 4}, {"kind": "quantize", "bits": 2},
            {"kind": "prune", "sparsity": 0.7}, {"kind": "rescale", "factor": 2.0},
        ],
        ids=lambda params: "-".join(map(str, params.values())),
    )  # fmt: skip
    def test_it_survives(self, network, attack, verify, params):
        attacked = attack(network[0], **params)
        report = verify(attacked)
        assert attacked.report["change"] > 0
        assert (report["decision"], full(report)) == ("verified", True)

    def test_half_a_stranger(self, network, pipeline, attack, verify, tmp_path):
        assert full(verify(attack(network[0], stranger(pipeline, tmp_path / "other"), kind="average")))

    def test_two_marks_can_both_be_read(self, network, attack, verify, place):
        both = attack(network[0], kind="overwrite", key=place.second, margin=6.0)
        assert full(verify(both))
        assert full(verify(both, key=place.second))

    def test_a_packed_file_of_the_hub_is_read(self, network, verify, tmp_path):
        run_plugin(get_plugin("compressor.rtn")(), [network[0]], tmp_path, {"bits": 4, "fidelity": False, "skip": ()})
        packed = FolderModel(tmp_path / "out", name="packed", family="zoo")
        assert any(tensor.key.endswith(".codes") for tensor in packed.tensors())
        assert full(verify(packed))

    def test_a_packed_model_is_not_marked(self, network, place, tmp_path, attack):
        run_plugin(get_plugin("compressor.rtn")(), [network[0]], tmp_path, {"bits": 4, "fidelity": False})
        packed = FolderModel(tmp_path / "out", name="packed", family="zoo")
        with pytest.raises(UsageError, match="is packed"):
            run_plugin(WeightMark(), [packed], tmp_path / "again", {"key": place.second})
        with pytest.raises(UsageError, match="is packed"):
            attack(packed, kind="prune")

    def test_a_mark_that_rounding_undoes_fails_the_job(self, place, tmp_path):
        """Nothing may be registered that does not show its mark."""
        values = torch.randint(-3, 4, (64, 64)).to(torch.float8_e4m3fn)
        save_file({"layer.weight": values.half() * 3e-8}, tmp_path / "tiny.safetensors")
        with pytest.raises(DataError, match="of 128 bits"):
            run_plugin(
                WeightMark(), [FolderModel(tmp_path / "tiny.safetensors")], tmp_path / "run",
                {"key": place.ours, "margin": 0.01},
            )  # fmt: skip

    def test_nothing_to_mark_is_refused(self, place, tmp_path):
        save_file({"layer.weight": torch.ones(8, 8)}, tmp_path / "small.safetensors")
        with pytest.raises(UsageError, match="no room for a mark"):
            run_plugin(WeightMark(), [FolderModel(tmp_path / "small.safetensors")], tmp_path / "r", {"key": place.ours})


class TestNames:
    def test_a_single_file_is_read_like_the_folder_it_was_made_from(self, place, verify, tmp_path):
        """Stability's names of the same matrices, which convert a marked folder to one file."""
        names = {
            "down_blocks.0.attentions.0.proj_in": "input_blocks.1.1.proj_in",
            "mid_block.resnets.0.conv1": "middle_block.0.in_layers.2",
            "up_blocks.1.resnets.0.conv2": "output_blocks.3.0.out_layers.3",
        }
        generator = torch.Generator().manual_seed(0)
        folder = tmp_path / "folder/unet"
        folder.mkdir(parents=True)
        shape = (128, 192)
        save_file(
            {f"{name}.weight": torch.randn(shape, generator=generator) for name in names},
            folder / "diffusion_pytorch_model.safetensors",
        )
        (folder.parent / "model_index.json").write_text("{}")
        run_plugin(WeightMark(), [FolderModel(folder.parent)], tmp_path / "run", {"key": place.ours})
        marked = load_file(tmp_path / "run/out" / UNET)
        save_file(
            {f"model.diffusion_model.{theirs}.weight": marked[f"{ours}.weight"] for ours, theirs in names.items()},
            tmp_path / "single.safetensors",
        )
        assert full(verify(FolderModel(tmp_path / "single.safetensors", name="single")))


class TestHiddenUnits:
    def outputs(self, model, folder):
        network = open_painter(model, folder).networks["unet"]
        generator = torch.Generator().manual_seed(0)
        latents, states = torch.randn(2, 6, 4, 4, generator=generator), torch.randn(2, 16, 384, generator=generator)
        with torch.inference_mode():
            return network(latents, torch.tensor([10, 700]), states).sample

    @pytest.mark.parametrize("kind", ["permute", "rescale"])
    def test_the_attack_keeps_what_is_computed(self, pipeline, attack, tmp_path, kind):
        before = self.outputs(pipeline, tmp_path / "a")
        attacked = attack(pipeline, kind=kind)
        after = self.outputs(attacked, tmp_path / "b")
        # Float16 weights: rescaled ones are rounded anew.
        assert float((after - before).norm() / before.norm()) < 2e-3
        assert attacked.report["change"] > 0.3

    def test_channels_inside_a_residual_block_keep_to_their_norm_groups(self, attack, tmp_path):
        from diffusers.models.resnet import ResnetBlock2D

        torch.manual_seed(0)
        block = ResnetBlock2D(in_channels=64, out_channels=64, temb_channels=32, groups=16).eval()
        stem = "mid_block.resnets.0."
        for parameter in block.norm2.parameters():  # fresh ones are alike in all channels
            torch.nn.init.normal_(parameter)
        save_file({stem + name: value for name, value in block.state_dict().items()}, tmp_path / "block.safetensors")
        inputs = torch.randn(2, 64, 4, 4), torch.randn(2, 32)
        with torch.inference_mode():
            before = block(*inputs)
            attacked = attack(FolderModel(tmp_path / "block.safetensors"), kind="permute")
            written = load_file(attacked.files()["block.safetensors"])
            moved = {name.removeprefix(stem): value for name, value in written.items()}
            assert not torch.equal(moved["conv1.weight"], block.conv1.weight)
            block.load_state_dict(moved)
            assert torch.allclose(block(*inputs), before, atol=1e-5)  # sums in another order

    def test_heads_that_share_keys_are_left_alone(self, tmp_path):
        shapes = {"to_q": (64, 32), "to_k": (16, 32), "to_v": (16, 32), "to_out.0": (32, 64)}
        file = tmp_path / "a.safetensors"
        save_file({f"attn.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}, file)
        assert list(units_of(dense_tensors(FolderModel(file)))) == []

    def test_re_aligned_to_the_unmarked_reference_the_mark_is_back(self, layers, attack, verify):
        plain, marked = layers
        moved = attack(attack(marked, kind="permute"), kind="rescale", factor=3.0)
        assert verify(moved)["decision"] == "no evidence found"
        report = verify(moved, plain)
        assert full(report, "difference from the reference")
        assert report["decision"] == "verified"
        assert report["view"] == "difference from the reference"
        assert report["reference"] == {**report["reference"], "name": "layers", "hidden_units": 1024}
        assert report["reference"]["moved"] > 1000
        assert report["tried"]["views"] == 2

    def test_after_fine_tuning_they_are_still_found(self, layers, attack, verify, tmp_path):
        """Half a stranger in the way: no unit is nearest to itself by much, and the assignment decides."""
        plain, marked = layers
        mixed = attack(marked, feed_forward(tmp_path, "other", 8), kind="average")
        assert full(verify(attack(mixed, kind="permute"), plain), "difference from the reference")

    def test_r3_the_marked_model_is_refused_as_a_reference(self, layers, verify, tmp_path, attack):
        other = feed_forward(tmp_path, "other", 9)
        for reference in (layers[1], attack(layers[1], kind="quantize", bits=4)):
            with pytest.raises(UsageError, match="shows the key itself"):
                verify(other, reference)

    def test_r3_aligned_to_the_unmarked_reference_strangers_show_nothing(self, layers, verify, tmp_path):
        found = [verify(feed_forward(tmp_path, "other", seed), layers[0]) for seed in range(20, 32)]
        assert [one["decision"] for one in found] == ["no evidence found"] * 12
        assert all(one["reference"]["moved"] > 1000 for one in found)  # they were re-ordered, and to no avail
        assert min(view["p"] for one in found for view in one["views"].values()) > 1e-4

    def test_aligned_to_a_marked_model_a_stranger_would_look_marked(self, layers, tmp_path, place):
        """Why R3 is a rule: the same alignment, with the reference that is refused."""
        other = feed_forward(tmp_path, "other", 7)
        _, key, _ = committed(place.ours)
        slots, counts = carrying_slots(other), {}
        with LocalContext(tmp_path / "run", [other]) as context:
            for reference in layers:
                aligned = Aligned(context, other, reference)

                def moved(matrix, aligned=aligned):
                    slot = slots[matrix.name]
                    return aligned.read(slot.tensor.name, slot.tensor.read()).reshape(slot.shape), None

                (found,) = measure(context, [key], matrices_of(other), moved)
                counts[reference.name] = read_bits(key, found).agreeing
        assert counts["marked-layers"] >= 92  # "verified" at 10⁻⁶
        assert counts["layers"] < 84  # 10⁻³

    def test_a_reference_is_for_checkpoints(self, adapter, pipeline, verify):
        with pytest.raises(UsageError, match="a reference is for checkpoints"):
            verify(adapter[1], pipeline)


class TestAdapters:
    def test_the_product_is_marked_at_its_rank(self, adapter, verify):
        plain, marked, report = adapter
        assert report["change"]["ranks"] == [8]
        before, after = (next(iter(one.files().values())) for one in (plain, marked))
        old, new = load_file(before), load_file(after)
        assert {name: (value.shape, value.dtype) for name, value in old.items()} == {
            name: (value.shape, value.dtype) for name, value in new.items()
        }
        assert marked.metadata() == plain.metadata()
        assert full(verify(marked))
        assert verify(plain)["decision"] == "no evidence found"

    @pytest.mark.parametrize(
        "params",
        [
            {"kind": "svd"}, {"kind": "svd", "rank": 6}, {"kind": "quantize", "bits": 4},
            {"kind": "prune", "sparsity": 0.5}, {"kind": "rescale", "factor": 0.3},
        ],
        ids=lambda params: "-".join(map(str, params.values())),
    )  # fmt: skip
    def test_it_survives(self, adapter, attack, verify, params):
        assert full(verify(attack(adapter[1], **params)))

    def test_r4_strength_minus_one_inverts_every_bit(self, adapter, attack, verify):
        report = verify(attack(adapter[1], kind="rescale", factor=-1.0))
        assert report["decision"] == "verified"
        assert report["reading"]["agreeing"] == 0
        assert report["reading"]["inverted"] is True
        assert report["tried"]["polarities"] == 2

    def test_merged_with_another(self, adapter, verify, tmp_path, place):
        other = lora(place.folder / "plain", "other", seed=9)
        run_plugin(get_plugin("merger.sum")(), [adapter[1], other], tmp_path, {})
        report = verify(FolderModel(tmp_path / "out", name="sum", adapter_type="lora"))
        assert report["reading"]["accuracy"] > 0.95
        assert report["decision"] == "verified"

    def test_baked_into_its_base_it_is_found_in_the_difference(self, place, verify, pipeline, tmp_path):
        generator = torch.Generator().manual_seed(4)
        base = {f"{module}.weight": torch.randn(shape, generator=generator) * 0.05 for module, shape in LORA.items()}
        save_file(base, tmp_path / "unet.safetensors")
        checkpoint = FolderModel(tmp_path / "unet.safetensors", name="base")
        plain = lora(tmp_path, "plain")
        run_plugin(WeightMark(), [plain], tmp_path / "marked", {"key": place.ours})
        marked = FolderModel(tmp_path / "marked/out", name="marked", adapter_type="lora")
        run_plugin(get_plugin("merger.sum")(), [marked, checkpoint], tmp_path / "baked", {"base": True})
        baked = FolderModel(tmp_path / "baked/out", name="baked")
        report = verify(baked, checkpoint)
        assert full(report, "difference from the reference")
        assert report["decision"] == "verified"

    def test_other_methods_are_refused_by_name(self, place, tmp_path):
        name = f"unet.{_LAYER}.attn1.to_q"
        parts = {
            f"hada_w{n}_{side}": torch.randn((160, 4) if side == "a" else (4, 160)) for n in (1, 2) for side in "ab"
        }
        save_file({f"{name}.{part}": value for part, value in parts.items()}, tmp_path / "loha.safetensors")
        with pytest.raises(UsageError, match="no plain factors"):
            run_plugin(
                WeightMark(), [FolderModel(tmp_path / "loha.safetensors", adapter_type="loha")], tmp_path / "r",
                {"key": place.ours},
            )  # fmt: skip


class TestHonesty:
    def register(self, place, model, name):
        path = place.folder / "registered" / name
        path.parent.mkdir(exist_ok=True)
        source = next(iter(model.files().values()))
        path.with_suffix(".safetensors").write_bytes(source.read_bytes())
        (found,) = ingest(place.hub, [path.with_suffix(".safetensors")], "reference")
        with place.hub.reading() as session:
            return load_input(place.hub, find_revision(session, found.name).id)

    def test_r1_what_was_committed_before_counts_once_and_later_keys_are_multiplied(self, place, verify):
        plain = lora(place.folder / "plain", "r1", seed=3)
        run_plugin(WeightMark(), [plain], place.folder / "r1", {"key": place.ours})
        marked = self.register(place, FolderModel(place.folder / "r1/out", name="r1", adapter_type="lora"), "r1")
        report = verify(marked)
        assert report["key"]["committed_before_the_model"] is True
        assert report["tried"] == {"views": 1, "users": 2, "keys": 1, "polarities": 2}
        assert report["hypotheses"] == 4
        assert "committed to before" in report["claim"]
        with place.hub.transaction() as session:
            row = session.get(Revision, marked.revision_id)
            row.created_at -= timedelta(days=1)
            session.add(row)
        late = verify(marked, tries=10**9)
        assert late["key"]["committed_before_the_model"] is False
        assert late["tried"]["keys"] == 10**9
        assert late["log10_corrected_p"] == pytest.approx(report["log10_corrected_p"] + 9, abs=0.02)
        assert "who was first is not shown" in late["claim"]
        assert verify(marked, tries=10**35)["decision"] == "no evidence found"

    def test_r1_only_committed_keys_are_taken(self, place, pipeline, tmp_path):
        with pytest.raises(NotFoundError, match="was committed here"):
            run_plugin(WeightMark(), [pipeline], tmp_path, {"key": "ab" * 32})

    def test_r2_one_reading_whatever_the_number_of_matrices_and_files(self, network, verify):
        report = verify(network[0])
        assert report["matrices"] > 10
        assert report["sample_size"] == report["reading"]["bits"] == 128
        # A perfect match of 128 coins in either polarity, no less.
        assert report["reading"]["p"] == 2.0**-127

    def test_r5_controls_are_run_and_kept(self, network, pipeline, verify):
        report = verify(network[0], pipeline, controls=5)
        wrong = report["controls"]["wrong_keys"]
        assert {view: len(found) for view, found in wrong.items()} == dict.fromkeys(report["views"], 5)
        assert all(one["p"] > 1e-4 for found in wrong.values() for one in found)
        assert report["controls"]["unmarked_reference"]["p"] > 1e-3

    def test_users_raise_the_threshold(self, network, verify):
        assert verify(network[0], users=1)["thresholds"]["users"] == 92
        assert verify(network[0], users=10**6)["thresholds"]["users"] == 104  # 103 in one polarity
        assert verify(network[0], users=10**6)["decision"] == "verified"

    def test_nothing_found_is_never_called_absence(self, pipeline, verify):
        report = verify(pipeline)
        assert report["decision"] == "no evidence found"
        assert "no evidence that nothing is there" in report["claim"]
        assert report["null_hypothesis"].startswith("the weights do not depend on the key")

    def test_the_secret_is_in_no_report_log_or_database(self, network, verify, place):
        secret = secret_file(place.hub.settings, place.ours)
        assert secret.stat().st_mode & 0o777 == 0o600
        assert secret.parent.stat().st_mode & 0o777 == 0o700
        text = secret.read_text().strip()
        assert text not in json.dumps([network[1], verify(network[0])])
        home = place.hub.settings.home
        for file in home.rglob("*"):
            if file.is_file() and file.parent != secret.parent:
                content = file.read_bytes()
                assert text.encode() not in content
                assert bytes.fromhex(text) not in content
        with place.hub.reading() as session:
            events = session.exec(select(Event).where(Event.subject == place.ours)).all()
        assert [event.action for event in events] == ["key committed"]
        assert events[0].detail == {"name": "ours", "bits": 128}


class TestAttacks:
    def test_fine_tuning_lowers_the_loss_and_leaves_the_mark(self, network, attack, verify, tmp_path):
        from PIL import Image

        generator = torch.Generator().manual_seed(0)
        for number in range(4):
            pixels = (torch.rand(16, 16, 3, generator=generator) * 255).byte().numpy()
            Image.fromarray(pixels).save(tmp_path / f"{number}.png")
            (tmp_path / f"{number}.txt").write_text(f"drawing {number}")
        tuned = attack(network[0], kind="fine-tune", pictures=str(tmp_path), steps=12, rate=1e-3)
        assert tuned.report["loss_last"] < tuned.report["loss_first"]
        assert tuned.report["change"] > 1e-3
        assert full(verify(tuned))

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"kind": "fine-tune"}, "needs --pictures"),
            ({"kind": "average"}, "two models or more"),
            ({"kind": "overwrite"}, "needs --key"),
            ({"kind": "svd"}, "is no adapter"),
            ({"kind": "prune", "factor": 0.0}, "not zero"),
        ],
    )
    def test_what_is_missing_is_said(self, pipeline, attack, params, message):
        with pytest.raises(UsageError, match=message):
            attack(pipeline, **params)

    @pytest.mark.parametrize("kind", ["fine-tune", "permute"])
    def test_what_is_for_networks_is_refused_for_adapters(self, adapter, attack, kind, tmp_path):
        with pytest.raises(UsageError, match="is an adapter"):
            attack(adapter[1], kind=kind, pictures=str(tmp_path))

    def test_prune_drops_the_smallest(self, pipeline, attack):
        pruned = load_file(attack(pipeline, kind="prune", sparsity=0.25).files()[UNET])
        for name, value in load_file(pipeline.files()[UNET]).items():
            if value.ndim > 1:
                sizes, kept = value.abs().float(), pruned[name] != 0
                assert int((~kept).sum()) >= int(0.25 * value.numel())
                assert float(sizes[~kept].max()) <= float(sizes[kept].min())
            else:
                assert torch.equal(pruned[name], value)
