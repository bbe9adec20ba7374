"""What a listing holds, from real files and folders."""

import json
from pathlib import Path

import pytest
import torch
from original_names import clip_text
from real_configs import shapes
from safetensors.torch import save_file

from modelgrove_hub.errors import CorruptFileError, DataError, NotFoundError, UnsafeFileError
from modelgrove_hub.formats.listing import ListedTensor, Role, list_model
from modelgrove_hub.formats.quantized import PackedTensor, QuantManifest
from modelgrove_hub.formats.recognise import recognise
from modelgrove_hub.store.dtypes import DTYPES


def weights(path, names=("a", "b"), metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.zeros(2, 3) for name in names}, path, metadata)


def sparse(path, tensors, metadata=None):
    """A file with the real header of `tensors` (name → shape, or dtype and shape) and holes for data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header, at = {"__metadata__": metadata or {}}, 0
    for name, entry in tensors.items():
        dtype, shape = entry if entry and isinstance(entry[0], str) else ("F16", entry)
        size = DTYPES[dtype].itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)


def test_a_file_is_listed_with_its_metadata_and_its_one_element_values(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {
        "m.lora_down.weight": torch.zeros(4, 8, dtype=torch.bfloat16),
        "m.alpha": torch.tensor(4.0, dtype=torch.float16),
        "n.alpha": torch.tensor([2.5], dtype=torch.bfloat16),
        "step": torch.tensor(7),
    }
    save_file(tensors, path, {"ss_network_dim": "4"})
    listed = list_model(path)
    assert listed.tensors["m.lora_down.weight"] == ListedTensor("BF16", (4, 8))
    assert listed.scalars == {"m.alpha": 4.0, "n.alpha": 2.5, "step": 7.0}
    assert (listed.format, listed.metadata, listed.parts) == ("safetensors", {"ss_network_dim": "4"}, ())
    assert listed.files == {"x.safetensors": Role.WEIGHTS}


def test_the_bytes_decide_and_not_the_name(tmp_path):
    weights(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").rename(tmp_path / "x.ckpt")
    assert list_model(tmp_path / "x.ckpt").format == "safetensors"


@pytest.mark.parametrize("name", ["x.bin", "x.safetensors", "x.gguf", "x.onnx", "x"])
@pytest.mark.parametrize("data", [b"", b"hello, this is no model", bytes(1000), b"\xff" * 64])
def test_a_file_of_no_known_format_is_refused_whatever_its_name(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorruptFileError, match=name):
        list_model(tmp_path / name)


def test_what_is_not_there_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match="nowhere"):
        list_model(tmp_path / "nowhere")


def test_shards_are_listed_as_one_model(tmp_path):
    for number in (1, 2):
        weights(tmp_path / f"model-0000{number}-of-00002.safetensors", [f"t{number}"])
    places = {f"t{n}": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    listed = list_model(tmp_path)
    assert (set(listed.tensors), listed.parts, listed.format) == ({"t1", "t2"}, (), "sharded")
    assert listed.files["model.safetensors.index.json"] is Role.INDEX


@pytest.mark.parametrize(("said", "noted"), [(48, False), (4000, True), ("a\n" * 99, True), (None, False)])
def test_an_index_that_is_wrong_about_the_size_is_read_and_said_to_be(tmp_path, said, noted):
    weights(tmp_path / "model-00001-of-00001.safetensors", ["a", "b"])
    index = {"metadata": {"total_size": said}, "weight_map": dict.fromkeys("ab", "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    notes = [reason for reason in recognise(list_model(tmp_path)).reasons if "total_size" in reason]
    assert [note.endswith("bytes; its tensors have 48") and note.isprintable() for note in notes] == [True] * noted


@pytest.mark.parametrize("indexed", [True, False])
def test_missing_shards_are_named(tmp_path, indexed):
    weights(tmp_path / "model-00001-of-00003.safetensors", ["t1"])
    weights(tmp_path / "model-00003-of-00003.safetensors", ["t3"])
    if indexed:
        places = {f"t{n}": f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CorruptFileError, match="missing shards: model-00002-of-00003"):
        list_model(tmp_path)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ({"weight_map": {"t": "../../etc/passwd"}}, UnsafeFileError, "outside the folder"),
        ({"weight_map": {"t": "gone.safetensors"}}, CorruptFileError, "missing shards: gone"),
        ({"weight_map": {"ghost": "model.safetensors"}}, CorruptFileError, "tensors in no shard: ghost"),
        ({"weight_map": [1]}, CorruptFileError, "no weight_map"),
        ([], CorruptFileError, "not a JSON object"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, index, error, message):
    weights(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(error, match=message):
        list_model(tmp_path)


@pytest.fixture
def pipeline(tmp_path):
    folder = tmp_path / "sd"
    sparse(folder / "unet/diffusion_pytorch_model.safetensors", shapes("sd1.5"))
    (folder / "unet/config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    sparse(folder / "vae/diffusion_pytorch_model.safetensors", shapes("vae"))
    sparse(folder / "text_encoder/model.safetensors", clip_text())
    sparse(folder / "v1-5.safetensors", {"spare": (1,)})
    (folder / "text_encoder/pytorch_model.bin").write_bytes(b"\x80\x02}.")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (folder / "README.md").write_text("---\nlicense: openrail\nbase_model: [a/b]\n---\nHello")
    return folder


def test_a_diffusers_folder_is_listed_by_parts_and_recognised_as_a_whole(pipeline):
    listed = list_model(pipeline)
    assert (listed.format, listed.parts) == ("diffusers", ("text_encoder", "unet", "vae"))
    assert listed.tensors["unet/conv_in.weight"].shape == (320, 4, 3, 3)
    assert listed.files["v1-5.safetensors"] is Role.SPARE
    assert listed.files["text_encoder/pytorch_model.bin"] is Role.PICKLE
    found = recognise(listed)
    assert (found.kind, found.family, found.variant) == ("checkpoint", "sd1", "text-to-image")
    assert found.parts == {"text_encoder": "clip", "unet": "sd1", "vae": "autoencoder-kl"}
    assert (found.trust, found.coverage, found.licence, found.declared_base) == ("ok", 1, "openrail", "a/b")
    assert "unet/config agrees: UNet2DConditionModel" in found.reasons


def test_a_pipeline_whose_denoiser_is_strange_is_a_checkpoint_of_unknown_family(pipeline):
    sparse(pipeline / "unet/diffusion_pytorch_model.safetensors", {"strange.weight": (3, 3)})
    found = recognise(list_model(pipeline))
    assert (found.kind, found.family) == ("checkpoint", "unknown")
    assert found.parts["unet"] == "unknown"


def test_a_part_that_is_there_only_as_a_pickle_quarantines_the_pipeline(pipeline):
    (pipeline / "vae/diffusion_pytorch_model.safetensors").unlink()
    (pipeline / "vae/diffusion_pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    assert recognise(list_model(pipeline)).trust == "quarantined"


def test_full_precision_is_listed_before_its_copies(tmp_path):
    weights(tmp_path / "unet/diffusion_pytorch_model.fp16.safetensors", ["half"])
    (tmp_path / "model_index.json").write_text("{}")
    assert set(list_model(tmp_path).tensors) == {"unet/half"}
    weights(tmp_path / "unet/diffusion_pytorch_model.safetensors", ["full"])
    assert set(list_model(tmp_path).tensors) == {"unet/full"}


def test_a_peft_folder_is_listed_with_its_config(tmp_path):
    prefix = "base_model.model.encoder.layer.0.attention.self.query"
    save_file(
        {f"{prefix}.lora_A.weight": torch.zeros(8, 384), f"{prefix}.lora_B.weight": torch.zeros(384, 8)},
        tmp_path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "lora_alpha": 16, "base_model_name_or_path": "all-MiniLM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    listed = list_model(tmp_path)
    assert (listed.format, listed.configs["adapter_config.json"]["lora_alpha"]) == ("peft", 16)
    found = recognise(listed)
    assert (found.kind, found.family, found.adapter_type, found.alphas["common"]) == ("adapter", "bert", "lora", 16.0)
    assert (found.declared_base, found.convention) == ("all-MiniLM", "peft")


def test_unrelated_files_side_by_side_become_parts(tmp_path):
    weights(tmp_path / "cat.safetensors", ["x"])
    weights(tmp_path / "dog.safetensors", ["x"])
    listed = list_model(tmp_path)
    assert (listed.parts, set(listed.tensors)) == (("cat", "dog"), {"cat/x", "dog/x"})


def test_a_link_out_of_the_folder_is_refused_unless_it_stays_within(tmp_path):
    weights(tmp_path / "blobs/x")
    folder = tmp_path / "snapshots/a"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to(Path("../../blobs/x"))
    with pytest.raises(UnsafeFileError, match="a link to"):
        list_model(folder)
    assert set(list_model(folder, within=tmp_path).tensors) == {"a", "b"}


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\xff", "x" * (2**20 + 1)])
def test_a_config_that_is_no_small_json_object_is_refused(tmp_path, text):
    weights(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CorruptFileError, match=r"config\.json"):
        list_model(tmp_path)


def test_a_folder_without_weights_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="no weights"):
        list_model(tmp_path)


def test_python_code_in_a_folder_is_marked(tmp_path):
    weights(tmp_path / "model.safetensors")
    (tmp_path / "modeling.py").write_text("print('hello')")
    listed = list_model(tmp_path)
    assert listed.files["modeling.py"] is Role.CODE
    assert recognise(listed).trust == "quarantined"


def test_every_file_of_the_hostile_corpus_is_listed_or_refused_like_its_header(tmp_path, hostile):
    for case in hostile.corpus(tmp_path / "corpus"):
        if case.path.is_symlink():
            continue
        try:
            listed = list_model(case.path)
        except DataError:
            assert case.refused, case
            continue
        # What is refused as safetensors may be listed as what it really is: a pickle, zip or GGUF.
        assert not case.refused or listed.format != "safetensors", case
        assert recognise(listed).kind == "unknown", case


def test_a_packed_file_is_judged_as_it_was_before(tmp_path):
    # Every matrix of the zoo's UNet as int8 codes with one scale a row of 32 columns.
    parts, entries = {}, {}
    for name, shape in shapes("zoo").items():
        if len(shape) != 2:
            parts[name] = ("F16", shape)
            continue
        fields = {"layout": "int8", "bits": 8, "group": 32, "dtype": "F32", "shape": shape, "axes": (0, 1)}
        entries[name] = PackedTensor(**fields, error=0.0, bytes=0)
        parts |= {f"{name}.{suffix}": (min(form.dtypes), form.shape) for suffix, form in entries[name].parts().items()}
    manifest = QuantManifest(method="test", parent="0" * 64, tensors=entries)
    path = tmp_path / "packed.safetensors"
    sparse(path, parts, manifest.metadata())
    found = recognise(list_model(path))
    assert (found.family, found.coverage) == ("zoo", 1), found.reasons
    assert any("packed by modelgrove" in reason for reason in found.reasons)
    del parts["time_embedding.linear_1.weight.scales"]
    sparse(path, parts, manifest.metadata())
    with pytest.raises(CorruptFileError, match="scales is missing"):
        list_model(path)
