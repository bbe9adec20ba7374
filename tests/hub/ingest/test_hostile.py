"""A folder of files made to hurt, ingested by the command itself: one line each, and a clean hub after it."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save, save_file

from modelgrove_hub.cli.ingest import ingest
from modelgrove_hub.hub import Hub
from modelgrove_hub.ingest import pipeline, prepare
from modelgrove_hub.registry.models import list_models
from modelgrove_hub.settings import Settings
from modelgrove_hub.store.fsck import check
from modelgrove_migrations.run import upgrade

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def safetensors(header: bytes | dict[str, Any] | None = None, data: bytes = bytes(4)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header or {"a": ONE}).encode()
    return struct.pack("<Q", len(text)) + text + data


def numbered(number: int) -> bytes:
    """A good file that no other is equal to."""
    return safetensors(data=struct.pack("<I", number))


@pytest.fixture
def hub(own_hub: Hub) -> Hub:
    """The hub that the commands open."""
    return own_hub


@pytest.fixture
def outcomes(hub: Hub) -> Callable[..., dict[str, str]]:
    """Ingest a folder by the command: path in it → the line said about it. The hub is checked too."""

    def run(folder: Path, *options: str) -> dict[str, str]:
        done = CliRunner().invoke(ingest, [str(folder), "--json", *options])
        models = json.loads(done.stdout)["models"]
        printed = CliRunner().invoke(ingest, [str(folder), *options])
        lines = printed.stdout.splitlines()
        assert len(lines) == len(models)
        assert all(line.isprintable() for line in lines)
        assert [finding for finding in check(hub) if finding.level == "error"] == []
        refused = [model for model in models if model["outcome"] == "refused"]
        assert done.exit_code == (1 if len(refused) == len(models) else 0), done.exception
        top = str(folder.resolve())
        return {model["path"].removeprefix(top).strip("/"): model["reason"] or "ok" for model in models}

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the files go; a good one is always there."""
    made = tmp_path / "in"
    made.mkdir()
    (made / "good.safetensors").write_bytes(numbered(1))
    return made


def write(path: Path, content: bytes | str | dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    return path


def test_special_files_and_links_are_refused_and_never_waited_for(folder: Path, outcomes: Any, tmp_path: Path):
    os.mkfifo(folder / "pipe.safetensors")
    server = socket.socket(socket.AF_UNIX)
    place = Path.cwd()
    os.chdir(folder)  # the path of a socket may have 108 bytes
    server.bind("socket.ckpt")
    os.chdir(place)
    links = {
        "zero.safetensors": "/dev/zero", "nowhere.gguf": "missing", "loop.onnx": "loop.onnx", "folder.pt": ".",
        "away.bin": str(write(tmp_path / "secret.bin", numbered(2))), "inside.safetensors": "good.safetensors",
    }  # fmt: skip
    for name, target in links.items():
        (folder / name).symlink_to(target)

    said = outcomes(folder)
    server.close()

    assert said.pop("good.safetensors") == said.pop("inside.safetensors") == "ok"
    wanted = {
        "pipe.safetensors": "a named pipe", "socket.ckpt": "a socket", "zero.safetensors": "a link to a device",
        "nowhere.gguf": "a link to not there", "loop.onnx": "not to be opened", "folder.pt": "a link to a folder",
        "away.bin": "outside",
    }  # fmt: skip
    assert said.keys() == wanted.keys()
    assert [name for name, rule in wanted.items() if rule not in said[name]] == []


@pytest.mark.parametrize("kind", ["pipe", "device", "loop"])
def test_a_special_file_that_is_named_is_refused_too(kind: str, hub: Hub, tmp_path: Path):
    path = tmp_path / "x.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)

    done = CliRunner().invoke(ingest, [str(path)])

    assert done.stdout.startswith("refused  ")
    assert type(done.exception).__name__ == "DataError"


PICKLE = pickle.dumps({"a": 1})
DISGUISED = {
    "pickle-2.safetensors": (pickle.dumps([1], 2), "is a pickle"),
    "pickle-0.safetensors": (pickle.dumps({"a": [1.5, "x"]}, 0), "is a pickle"),
    "number-0.safetensors": (pickle.dumps(12, 0), "is a pickle"),
    "pickle.gguf": (PICKLE, "is a pickle"),
    "gguf.safetensors": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "is a GGUF file"),
    "7z.safetensors": (b"7z\xbc\xaf\x27\x1c" + bytes(99), "is a 7z archive"),
    "rar.bin": (b"Rar!\x1a\x07\x01\0" + bytes(99), "is a RAR archive"),
    "gzip.pt": (b"\x1f\x8b\x08" + bytes(99), "is a gzip file"),
    "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
    "page.safetensors": (b"<!doctype html><title>404</title>", "web page"),
    "empty.safetensors": (b"", "empty"),
    "empty.pkl": (b"", "empty"),
    "empty.gguf": (b"", "empty"),
    "text.ckpt": (b"hello", "known weight formats"),
    "dot.bin": (b".", "known weight formats"),
}


def test_a_file_of_another_format_is_refused_as_what_it_is(folder: Path, outcomes: Any):
    for name, (content, _) in DISGUISED.items():
        write(folder / name, content)
    with zipfile.ZipFile(folder / "zip.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", PICKLE)

    said = outcomes(folder)

    wanted = {name: rule for name, (_, rule) in DISGUISED.items()} | {"zip.safetensors": "archive of pickles"}
    assert [(name, said[name]) for name, rule in wanted.items() if rule not in said[name]] == []


def test_pickles_of_every_protocol_and_archive_bombs_are_quarantined(folder: Path, outcomes: Any, hub: Hub):
    for protocol in range(6):
        write(folder / f"p{protocol}.pkl", pickle.dumps({"a": [protocol]}, protocol))
    methods = {"stored": 0, "deflated": 8, "bzip2": 12, "lzma": 14}
    for name, method in methods.items():
        with zipfile.ZipFile(folder / f"bomb-{name}.pt", "w", method) as archive:
            archive.writestr("archive/data.pkl", PICKLE if method == 0 else bytes(50 * 2**20))
    whole = (folder / "bomb-deflated.pt").read_bytes()
    write(folder / "damaged.pt", whole[:60] + b"\xff" * 20 + whole[80:])
    write(folder / "cut.ckpt", whole[: len(whole) // 2])
    write(folder / "claims.bin", whole[:-10] + b"\xff" * 4 + whole[-6:])
    write(folder / "opcodes.pkl", b"(" + b"N" * (16 * 2**20))

    said = outcomes(folder)

    refused = {name for name, reason in said.items() if reason != "ok"}
    assert refused == {"opcodes.pkl"}
    with hub.transaction() as session:
        trusts = {model.name: model.trust for model in list_models(session, limit=100)}
    assert trusts.pop("local/good") == "ok"
    assert set(trusts.values()) == {"quarantined"}


CARDS = {
    "tag": "---\nlicense: !!python/object/apply:os.system ['touch owned']\n---\n",
    "aliases": "---\na: &a [x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(20)) + "---\n",
    "merges": "---\na: &a {x: 1}\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)}\n  <<: [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(20)) + "---\n",
    "date": "---\ndate: 2024-13-45\nlicense: mit\n---\n",
    "types": "---\ntags: {a: b}\nlicense: [[1]]\nbase_model: {x: y}\n---\n",
    "kinds": "---\ntags: [1, null, [x], {a: b}, !!binary xx]\n---\n",
    "deep": "---\nx: " + "[" * 50_000 + "\n---\n",
    "large": "---\nlicense: mit\ntags: [" + "x, " * 300_000 + "]\n---\n",
    "field": "---\nbase_model: " + "x" * 100_000 + "\n---\n",
    "nul": "---\nlicense: mit\n---\na\0b\x1b[2J",
    "not-utf8": b"---\nlicense: \xff\xfe\n---\n",
    "unclosed": "---\nlicense: mit\n",
    "digits": "---\nx: " + "9" * 10_000 + "\n---\n",
}  # fmt: skip


def test_a_hostile_card_harms_no_model(folder: Path, outcomes: Any):
    for number, (name, text) in enumerate(CARDS.items()):
        write(folder / name / "lora.safetensors", numbered(100 + number))
        write(folder / name / "README.md", text)

    said = outcomes(folder)

    assert said == dict.fromkeys([*CARDS, "good.safetensors"], "ok")
    assert not Path("owned").exists()


MODEL_INDEX: dict[str, tuple[bytes | str | dict[str, Any], str]] = {
    "array": ("[1]", "not a JSON object"),
    "large": ('{"a":"' + "x" * (2 * 2**20) + '"}', "bytes of JSON"),
    "deep": ('{"a":' + "[" * 50_000 + "]" * 50_000 + "}", "JSON"),
    "brackets": ('{"a":[' + "[]," * 300_000 + "[]]}", "brackets"),
    "twice": ('{"a":1,"a":2}', "twice"),
    "not-utf8": (b'{"a":"\xff"}', "not JSON"),
    "digits": ('{"a":' + "9" * 10_000 + "}", "not JSON"),
    "empty": ("", "not JSON"),
    "types": ({"_class_name": 7, "unet": {"a": []}, "vae": ["diffusers"], "text_encoder": None}, "ok"),
    "paths": ({"_class_name": "X", "../../etc": ["diffusers", "../../x"], "/etc/passwd": ["os", "system"]}, "ok"),
    "nan": ('{"_class_name": "X", "a": NaN, "b": Infinity, "c": 1e999}', "ok"),
}


def test_a_hostile_pipeline_folder_is_refused_or_read_by_its_tensors(folder: Path, outcomes: Any):
    for number, (name, (content, _)) in enumerate(MODEL_INDEX.items()):
        write(folder / name / "model_index.json", content)
        write(folder / name / "unet/diffusion_pytorch_model.safetensors", numbered(200 + number))
    write(folder / "weightless/model_index.json", "{}")

    said = outcomes(folder)

    assert "no weights" in said["weightless"]
    wrong = {name: said[name] for name, (_, rule) in MODEL_INDEX.items() if rule not in said[name]}
    assert wrong == {}


ASKS_FOR_CODE: dict[str, tuple[str, dict[str, Any]]] = {
    "auto-map": ("config.json", {"auto_map": {"AutoModel": "someone/else--modeling.Model"}}),
    "in-a-part": ("unet/config.json", {"auto_map": {"AutoModel": "modeling.Model"}}),
    "custom": ("model_index.json", {"_class_name": "X", "custom_pipeline": "someone/else"}),
    "class": ("model_index.json", {"_class_name": ["pipeline", "MyPipeline"]}),
    "module": ("model_index.json", {"_class_name": "X", "unet": ["diffusers_modules.local.unet", "U"]}),
}


def test_a_config_that_asks_for_code_of_its_own_is_quarantined(folder: Path, outcomes: Any, hub: Hub):
    for number, (name, (file, content)) in enumerate(ASKS_FOR_CODE.items()):
        write(folder / name / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
        write(folder / name / file, content)
        write(folder / name / "unet/diffusion_pytorch_model.safetensors", numbered(250 + number))
    write(folder / "plain/model_index.json", {"_class_name": "X", "safety_checker": ["stable_diffusion", "Y"]})
    write(folder / "plain/unet/diffusion_pytorch_model.safetensors", numbered(299))

    assert outcomes(folder) == dict.fromkeys([*ASKS_FOR_CODE, "plain", "good.safetensors"], "ok")

    with hub.reading() as session:
        trusts = {model.name.rpartition("/")[2]: model.trust for model in list_models(session, limit=100)}
    assert {name for name, trust in trusts.items() if trust == "quarantined"} == set(ASKS_FOR_CODE)


LORA = {
    f"base_model.model.unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_{side}.weight": {
        "dtype": "F32", "shape": shape, "data_offsets": [start, start + 16]}
    for side, shape, start in (("A", [1, 4], 0), ("B", [4, 1], 16))
}  # fmt: skip
ADAPTER_CONFIGS: list[str] = [
    '{"peft_type": 1}', '{"peft_type": ["LORA"], "r": "x"}', '{"peft_type": "LORA", "lora_alpha": 1e999}',
    '{"lora_alpha": NaN}', '{"lora_alpha": {"a": 1}}', '{"base_model_name_or_path": ["a"]}',
    '{"base_model_name_or_path": "\\u0000\\ud800\\u202e"}', '{"peft_type": "\\ud800\\u0000"}', '{"r": -1}',
    '{"target_modules": {"a": 1}, "alpha_pattern": "(((((", "rank_pattern": 5}', '{"lora_alpha": true}',
]  # fmt: skip


def test_an_adapter_config_of_wrong_types_harms_nothing(folder: Path, outcomes: Any):
    for number, text in enumerate(ADAPTER_CONFIGS):
        write(folder / f"c{number}/adapter_model.safetensors", safetensors(LORA, bytes([number]) * 32))
        write(folder / f"c{number}/adapter_config.json", text)

    said = outcomes(folder)

    assert said == dict.fromkeys([*(f"c{number}" for number in range(len(ADAPTER_CONFIGS))), "good.safetensors"], "ok")


SHARD = "model-00001-of-00001.safetensors"
INDICES: dict[str, tuple[str, str]] = {
    "up": ('{"weight_map": {"a": "../good.safetensors"}}', "outside the folder"),
    "absolute": ('{"weight_map": {"a": "/etc/passwd"}}', "outside the folder"),
    "missing": ('{"weight_map": {"a": "other.safetensors"}}', "missing shards"),
    "lost": (json.dumps({"weight_map": {"a": SHARD, "b": SHARD}}), "in no shard"),
    "twice": (f'{{"weight_map": {{"a": "{SHARD}", "a": "../x"}}}}', "twice"),
    "list": ('{"weight_map": ["a"]}', "no weight_map"),
    "number": ('{"weight_map": {"a": 1}}', "no weight_map"),
    "control": ('{"weight_map": {"a": "x\\n\\u001b[2J\\ud800"}}', "missing shards"),
    "long": (json.dumps({"weight_map": {"a": "x" * 100_000}}), "missing shards"),
    "nothing": ("", "not JSON"),
    "huge": ('{"weight_map": {"a": [' + "[]," * 200_000 + "[]]}}", "brackets"),
}


def test_a_hostile_shard_index_is_refused(folder: Path, outcomes: Any):
    for number, (name, (text, _)) in enumerate(INDICES.items()):
        write(folder / name / "model.safetensors.index.json", text)
        write(folder / name / SHARD, numbered(300 + number))
    write(folder / "few/model.safetensors.index.json", '{"weight_map": {"a": "model-00001-of-00009.safetensors"}}')
    write(folder / "few/model-00001-of-00009.safetensors", numbered(399))

    said = outcomes(folder)

    assert said.pop("good.safetensors") == "ok"
    assert "missing shards" in said.pop("few")
    assert {name: said[name] for name, (_, rule) in INDICES.items() if rule not in said[name]} == {}
    assert max(map(len, said.values())) < 3000


def test_names_of_every_kind_are_ingested_or_refused_in_one_line(folder: Path, outcomes: Any):
    good = ["猫", "👨‍👩‍👧", "a b", "-rf", "$(id)", "'; DROP TABLE model; --", "%s%n", "x" * 243, "é", "e\u0301"]
    bad = ["new\nline", "esc\x1b[2J", "bidi\u202egpj", "del\x7f", "nel\x85"]
    for number, name in enumerate([*good, *bad]):
        write(folder / f"{name}.safetensors", numbered(400 + number))
    write(Path(os.fsdecode(os.fsencode(folder) + b"/latin\xe9.safetensors")), numbered(450))
    write(folder / ("y" * 252 + ".pt"), PICKLE)
    write(folder / "odd\nfolder/inside.safetensors", numbered(451))

    said = outcomes(folder)

    refused = {name for name, reason in said.items() if reason != "ok"}
    assert len(said) == len(good) + len(bad) + 4
    assert len(refused) == len(bad) + 2
    assert all("control characters" in said[name] for name in refused)


def test_folders_nested_without_end_are_given_up_and_the_others_read(folder: Path, outcomes: Any):
    deep = folder / "deep" / "/".join("d" * 300)
    write(deep / "x.safetensors", numbered(500))
    write(folder / "marked/config.json", "{}")
    write(folder / "marked/model.safetensors", numbered(501))
    write(folder / "marked" / "/".join("e" * 300) / "x.txt", "x")

    said = outcomes(folder)

    assert said.pop("good.safetensors") == "ok"
    assert len(said) == 2
    assert all("nested deeper" in reason for reason in said.values())


def test_a_card_beside_one_file_does_not_swallow_the_models_below(folder: Path, outcomes: Any):
    write(folder / "README.md", "my LoRAs")
    write(folder / "below/one.safetensors", numbered(600))
    write(folder / "below/bad.safetensors", b"\xff" * 99)

    said = outcomes(folder)

    assert {name for name, reason in said.items() if reason == "ok"} == {"good.safetensors", "below/one.safetensors"}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who gives up its rights for a moment")
def test_unreadable_files_and_folders_are_refused_and_the_others_ingested():
    place = Path(tempfile.mkdtemp(prefix="modelgrove-unreadable-"))
    try:
        inside = place / "in"
        home = Hub.open(Settings(home=place / "home"))
        upgrade(home.settings.database)
        for path in (place, *place.rglob("*")):
            path.chmod(0o777)
        write(inside / "a.safetensors", numbered(1)).chmod(0)
        write(inside / "closed/b.safetensors", numbered(2)).parent.chmod(0)
        write(inside / "z.safetensors", numbered(3))
        os.seteuid(65534)
        said = {Path(item.path).name: item.outcome for item in pipeline.ingest(home, [inside], "reference")}
    finally:
        os.seteuid(0)
        home.engine.dispose()
        shutil.rmtree(place)

    assert said == {"a.safetensors": "refused", "z.safetensors": "new", "closed": "refused"}


@pytest.mark.parametrize("mode", ["copy", "hardlink"])
def test_a_file_that_changes_before_it_is_stored_is_refused_and_the_next_one_ingested(
    mode: str, folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    write(folder / "a.safetensors", numbered(700))
    write(folder / "b.safetensors", numbered(701))
    read = prepare.prepare

    def meddle(found: Any) -> Any:
        made = read(found)
        if found.root.name == "a.safetensors":
            write(found.root, numbered(702))
        if found.root.name == "b.safetensors":
            found.root.unlink()
        return made

    monkeypatch.setattr(prepare, "prepare", meddle)
    said = {Path(item.path).name: item.outcome for item in pipeline.ingest(hub, [folder], mode)}

    assert said == {"a.safetensors": "refused", "b.safetensors": "refused", "good.safetensors": "new"}
    assert [finding for finding in check(hub) if finding.level == "error"] == []


def test_weight_files_of_every_kind_that_people_publish_are_taken(
    folder: Path, outcomes: Any, pickled: ModuleType, hub: Hub
):
    for name, content, _ in pickled.benign():
        write(folder / name, content)
    weights = {"a.weight": torch.ones(2, 32), "b": torch.ones(3)}
    save_file(weights, folder / "plain.safetensors", {"format": "pt"})
    for number, name in enumerate(weights, 1):
        write(folder / f"sharded/model-0000{number}-of-00002.safetensors", save({name: weights[name]}))
    places = {name: f"model-0000{number}-of-00002.safetensors" for number, name in enumerate(weights, 1)}
    write(folder / "sharded/model.safetensors.index.json", {"metadata": {"total_size": 268}, "weight_map": places})
    write(folder / "pipeline/model_index.json", {"_class_name": "StableDiffusionPipeline"})
    write(folder / "pipeline/unet/config.json", {"_class_name": "UNet2DConditionModel"})
    write(folder / "pipeline/unet/diffusion_pytorch_model.fp16.safetensors", save({"w": torch.ones(2).half()}))
    write(folder / "pipeline/unet/diffusion_pytorch_model.bin", pickled.saved(weights))
    write(folder / "peft/adapter_config.json", {"peft_type": "LORA", "r": 1})
    write(folder / "peft/adapter_model.safetensors", safetensors(LORA, bytes(32)))
    writer = gguf.GGUFWriter(folder / "model.gguf", "sd")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_string("tokenizer.chat_template", "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    writer.add_tensor("a.weight", weights["a.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, (2,), [1.0, 2.0])
    graph = onnx.helper.make_graph([], "g", [], [], [stored])
    write(folder / "model.onnx", onnx.helper.make_model(graph).SerializeToString())

    said = outcomes(folder)

    assert len(said) == 24
    assert [(name, reason) for name, reason in said.items() if reason != "ok"] == []
    with hub.reading() as session:
        unsafe = {model.name.rpartition("/")[2] for model in list_models(session, limit=100) if model.trust != "ok"}
    assert {Path(name).stem for name, _, _ in pickled.benign()} - unsafe == set()
    assert {"plain", "sharded", "pipeline", "peft", "model"} & unsafe == set()


def test_gguf_and_onnx_that_claim_too_much_are_refused(folder: Path, outcomes: Any):
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    head = b"GGUF" + struct.pack("<I", 3)
    aligned = text("general.alignment")
    tensor = text("a") + struct.pack("<IQIQ", 1, 8, 0, 0)
    other = text("b") + struct.pack("<IQIQ", 1, 8, 0, 0)
    made = {
        "counts.gguf": head + struct.pack("<QQ", 2**64 - 1, 2**64 - 1),
        "negative.gguf": head + struct.pack("<qq", -1, -1),
        "string.gguf": head + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2**63),
        "alignment-text.gguf": head + struct.pack("<QQ", 0, 1) + aligned + struct.pack("<I", 8) + text("9" * 5000),
        "alignment-square.gguf": head + struct.pack("<QQ", 0, 1) + aligned + struct.pack("<I", 8) + text("²"),
        "alignment-huge.gguf": head + struct.pack("<QQ", 0, 1) + aligned + struct.pack("<II", 4, 2**32 - 1),
        "overlap.gguf": head + struct.pack("<QQ", 2, 0) + tensor + other + bytes(200),
        "cut.gguf": head,
    }
    outside = b"\x0a\x08location\x12\x0d../../secret0"
    weight = b"\x08\x01\x10\x01\x42\x01w\x6a" + bytes([len(outside)]) + outside + b"\x70\x01"
    graph = b"\x2a" + bytes([len(weight)]) + weight
    made["outside.onnx"] = b"\x08\x0a\x3a" + bytes([len(graph)]) + graph
    made["fields.onnx"] = b"\x08\x01" * 5_000_000
    made["endless.onnx"] = b"\x08\x0a\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"
    for name, content in made.items():
        write(folder / name, content)

    said = outcomes(folder)

    assert said.pop("good.safetensors") == "ok"
    assert [name for name, reason in said.items() if reason == "ok" or "bug" in reason] == []
    assert "outside the model's folder" in said["outside.onnx"]
    assert "overlaps" in said["overlap.gguf"]


def test_the_whole_corpus_takes_bounded_memory(hostile: ModuleType, hub: Hub, tmp_path: Path):
    files = hostile.corpus(tmp_path / "in")
    variables = {**os.environ, "MODELGROVE_HOME": str(hub.settings.home), "OMP_NUM_THREADS": "1"}
    # Its own peak: ru_maxrss of a child starts at what its parent, the process of the tests, held when it was forked.
    measured = (
        "import sys\n"
        "from modelgrove_hub.cli.root import main\n"
        "try: main()\n"
        "finally: print(next(row for row in open('/proc/self/status') if row.startswith('VmHWM')), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", measured, "ingest", str(tmp_path / "in"), "--json"],
        env=variables, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    counts = json.loads(done.stdout)["counts"]
    assert counts["refused"] == sum(file.refused for file in files)
    # 100,000 tensors with their rows and hashes; a header of 32 MB.
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stderr)
    assert peak
    assert int(peak[1]) < 1200 * 1024
