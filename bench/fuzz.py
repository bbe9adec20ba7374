"""Mutated files against every parser that sees a stranger's bytes: `python bench/fuzz.py [--quick] [--json]`.

Each parser runs in a process of its own, limited to 2 GB of address space beyond what it began with. Its inputs are
made from a few real files by one to eight mutations: bits, bytes and borders of integers changed, parts cut out,
doubled, moved, taken from another file. A parser may read an input or refuse it by an error of modelgrove; anything
else is a crash, and so are memory that runs out and an input that takes more than ten seconds.

    inputs     how many were tried; a seed makes the same ones again
    read       how many were read, not refused
    crashes    how many did something else; the first of each kind is kept in the folder given by --keep
    slowest_s  CPU seconds of the slowest input
    grown_mb   how much the process's largest memory grew
    per_s      inputs a second of the parser's CPU time, mutation included
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import re
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from modelgrove_hub.errors import ModelgroveError

MEMORY = 2 * 2**30
LONGEST = 10.0
QUICK = 200
"""The share of inputs that a quick run leaves: one in so many."""
BORDERS = [
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
WORDS = [b'"', b"{", b"[", b"}", b"]", b",", b":", b"-1", b"1e999", b"NaN", b"\\ud800", b"\0", b"..", b"__metadata__",
         b"---\n", b"&a ", b"*a", b"!!python/object", b"cos\nsystem\n", b"\x93", b".", b"PK\5\6", b"alpha"]  # fmt: skip

Target = tuple[Sequence[bytes], Callable[[bytes], object]]


def mutated(seeds: Sequence[bytes], draw: random.Random) -> bytes:
    """One input."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        at, end = sorted((draw.randrange(len(data) + 1), draw.randrange(len(data) + 1)))
        end = min(end, at + 64)
        kind = draw.randrange(8)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = draw.randrange(256)
        elif kind == 2:
            form = draw.choice("BHIQ")
            number = struct.pack(f"<{form}", draw.choice(BORDERS) & (256 ** struct.calcsize(form) - 1))
            data[at : at + len(number)] = number
        elif kind == 3:
            del data[at:end]
        elif kind == 4:
            data[at:at] = data[at:end] * draw.choice((1, 2, 50))
        elif kind == 5:
            data[at:at] = draw.choice(WORDS)
        elif kind == 6:
            other = draw.choice(seeds)
            begin = draw.randrange(len(other) + 1)
            data[at:end] = other[begin : begin + 64]
        else:
            numbers = list(re.finditer(rb"\d+", data))
            if numbers:
                place = draw.choice(numbers)
                data[place.start() : place.end()] = b"%d" % draw.choice([*BORDERS, -1, 10**30])
    if draw.random() < 0.05:
        del data[draw.randrange(len(data) + 1) :]
    return bytes(data)


# ---- the parsers ----------------------------------------------------------------------------


def _safetensors_file(names: Sequence[str] = ("a.weight", "b"), **metadata: str) -> bytes:
    import torch
    from safetensors.torch import save

    return save({name: torch.ones(2, 3) for name in names}, metadata or None)


def header() -> Target:
    from modelgrove_hub.store.header import parse_header

    seeds = [_safetensors_file(), _safetensors_file(note="x"), _safetensors_file([f"m.{i}.weight" for i in range(20)])]
    return seeds, lambda data: parse_header(io.BytesIO(data), len(data), "x")


def _gguf_file() -> bytes:
    import gguf
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder) / "x", "sd")
        writer.add_string("general.name", "x")
        writer.add_array("tokens", ["a", "bc"])
        writer.add_array("numbers", [1, 2])
        writer.add_float32("scale", 0.5)
        writer.add_tensor("a.weight", np.zeros((2, 32), np.float32))
        writer.add_tensor("b.weight", np.zeros((4, 32), np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (Path(folder) / "x").read_bytes()


def gguf_header() -> Target:
    from modelgrove_hub.formats.gguf import parse_gguf

    whole = _gguf_file()
    return [whole, whole[:200], whole[:60]], lambda data: parse_gguf(io.BytesIO(data), len(data), "x")


def _onnx_file() -> bytes:
    import onnx
    from onnx import helper

    weights = [helper.make_tensor(name, onnx.TensorProto.FLOAT, (2, 3), [0.0] * 6) for name in ("a", "b.weight")]
    node = helper.make_node("Add", ["a", "b.weight"], ["c"])
    output = helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, (2, 3))
    model = helper.make_model(helper.make_graph([node], "g", [], [output], weights), producer_name="x")
    helper.set_model_props(model, {"k": "v"})
    outside = weights[0]
    outside.data_location = onnx.TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="x.data")
    return bytes(model.SerializeToString())


def onnx_graph() -> Target:
    from modelgrove_hub.formats.onnx import looks_like_onnx, parse_onnx

    def read(data: bytes) -> None:
        looks_like_onnx(io.BytesIO(data), len(data))
        parse_onnx(io.BytesIO(data), len(data), "x")

    return [_onnx_file()], read


def _pickles() -> list[bytes]:
    import torch

    weights = {"state_dict": {"a": torch.ones(2), "b": torch.nn.Parameter(torch.ones(3))}, "epoch": 3}
    made = []
    for zipped in (True, False):
        stream = io.BytesIO()
        torch.save(weights, stream, _use_new_zipfile_serialization=zipped)
        made.append(stream.getvalue())
    return made + [pickle.dumps({"a": [1, 2.5, "x", b"y", {3}], "b": io.BytesIO}, protocol) for protocol in (0, 2, 4)]


def pickle_report() -> Target:
    from modelgrove_hub.formats.pickles import inspect_pickle, looks_like_pickle

    def read(data: bytes) -> None:
        if looks_like_pickle(io.BytesIO(data), len(data)):
            inspect_pickle(io.BytesIO(data), len(data))

    return _pickles(), read


def plain_pickle() -> Target:
    from modelgrove_hub.formats.plain_pickles import check_plain

    return _pickles()[:2], lambda data: check_plain(io.BytesIO(data), len(data), "x")


def card() -> Target:
    from modelgrove_hub.formats.card import read_card

    place = Path(tempfile.mkdtemp()) / "README.md"
    seeds = [
        b"---\nlicense: mit\ntags: [a, 'c']\nbase_model:\n  - x/y\n---\n# Title\n<img src=x onerror=alert(1)>\n",
        b"---\nlicense: apache-2.0\ninstance_prompt: a photo of sks\nwidget:\n- t: >\n    x\n  o: {u: a}\n---\nx",
    ]

    def read(data: bytes) -> None:
        place.write_bytes(data)
        read_card({"README.md": place})

    return seeds, read


def adapter_keys() -> Target:
    from modelgrove_hub.formats.adapter_keys import foreign_method, module_of, parse_key

    names = [
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "unet.mid_block.attentions.0.proj_in.lora_A.weight", "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
        "base_model.model.transformer.blocks.3.ff.net.0.proj.lora_B.weight", "lycoris_blocks_0_attn.hada_w1_a",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_up.weight", "diffusion_model.x.oft_blocks",
        "double_blocks.0.processor.qkv_lora1.down.weight", "unet.conv_in.diff_b",
    ]  # fmt: skip

    def read(data: bytes) -> None:
        name = data.decode("utf-8", "replace")
        parse_key(name), module_of(name), foreign_method(name)

    return [name.encode() for name in names], read


def _manifest(texts: Sequence[dict[str, Any]], key: str, read_manifest: Any, check_parts: Any) -> Target:
    from modelgrove_hub.formats import sara
    from modelgrove_hub.store.header import TensorInfo

    parts = {".codes": ("U8", (320, 480)), ".scales": ("F16", (320, 15)), ".zeros": ("U8", (320, 15)),
             sara.VALUES: ("F32", (3,)), sara.MASK: ("U8", (8,))}  # fmt: skip
    stored = [TensorInfo(f"conv.weight{suffix}", dtype, shape, 0, 0) for suffix, (dtype, shape) in parts.items()]

    def read(data: bytes) -> None:
        manifest = read_manifest({key: data.decode("utf-8", "replace")}, "x")
        check_parts(manifest, stored, "x")

    return [json.dumps(text).encode() for text in texts], read


def quantized_manifest() -> Target:
    from modelgrove_hub.formats import quantized

    entry = {"layout": "int4", "bits": 4, "group": 64, "dtype": "F16", "shape": [320, 100, 3, 3], "axes": [0, 2, 3, 1],
             "error": 0.1, "bytes": 1000}  # fmt: skip
    text = {"version": 1, "method": "rtn", "parent": "0" * 64, "tensors": {"conv.weight": entry}}
    return _manifest([text], quantized.KEY, quantized.read_manifest, quantized.check_parts)


def sparse_manifest() -> Target:
    from modelgrove_hub.formats import sara

    text = {"version": 1, "threshold": 0.01, "tensors": {"conv.weight": {"shape": [6, 10], "sha256": "0" * 64}}}
    return _manifest([text], sara.KEY, sara.read_manifest, sara.check_parts)


def file_manifest() -> Target:
    from modelgrove_hub.store.manifest import FileScan, scan

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "x.safetensors"
        place.write_bytes(_safetensors_file(note="x"))
        return [scan(place).to_json().encode()], FileScan.from_json


def listing() -> Target:
    """A file of any format, and what it is recognised as."""
    from modelgrove_hub.formats.listing import list_model
    from modelgrove_hub.formats.recognise import recognise

    place = Path(tempfile.mkdtemp()) / "model.bin"
    lora = [f"lora_unet_mid_block_attentions_0_proj_in.lora_{side}.weight" for side in ("down", "up")]
    seeds = [_safetensors_file(lora, ss_network_dim="2"), _gguf_file(), _onnx_file(), *_pickles()]

    def read(data: bytes) -> None:
        place.write_bytes(data)
        recognise(list_model(place))

    return seeds, read


def configs() -> Target:
    """A folder whose configs and index are a stranger's."""
    from modelgrove_hub.formats.listing import list_model
    from modelgrove_hub.formats.recognise import recognise

    folder = Path(tempfile.mkdtemp())
    (folder / "model-00001-of-00001.safetensors").write_bytes(_safetensors_file())
    shard = "model-00001-of-00001.safetensors"
    seeds = [
        json.dumps({"metadata": {"total_size": 48}, "weight_map": {"a.weight": shard, "b": shard}}).encode(),
        json.dumps({"_class_name": "UNet2DConditionModel", "auto_map": {"A": "b.C"}, "model_type": "x"}).encode(),
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "x/y"}).encode(),
    ]

    def read(data: bytes) -> None:
        for name in ("model.safetensors.index.json", "config.json", "adapter_config.json"):
            (folder / name).write_bytes(seeds[0] if name.endswith("index.json") and b"weight_map" not in data else data)
        recognise(list_model(folder))

    return seeds, read


TARGETS: dict[str, tuple[Callable[[], Target], int]] = {
    "safetensors header": (header, 300_000),
    "GGUF header": (gguf_header, 200_000),
    "ONNX graph": (onnx_graph, 150_000),
    "pickle, what it is": (pickle_report, 100_000),
    "pickle, is it plain": (plain_pickle, 100_000),
    "card": (card, 50_000),
    "adapter keys": (adapter_keys, 200_000),
    "quantized manifest": (quantized_manifest, 50_000),
    "sparse manifest": (sparse_manifest, 50_000),
    "scan manifest": (file_manifest, 50_000),
    "any file, recognised": (listing, 40_000),
    "configs of a folder": (configs, 10_000),
}
"""What is fuzzed, and how many inputs a full run makes."""


def run(name: str, inputs: int, seed: int, keep: str, memory: int = MEMORY) -> dict[str, Any]:
    """Fuzz one parser in this process, which gets `memory` bytes more address space; 0 sets no limit."""
    seeds, read = TARGETS[name][0]()
    draw = random.Random(f"{name} {seed}")
    for text in seeds:
        with suppress(ModelgroveError):
            read(text)  # what is imported on first use
    if memory:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    well, slowest, crashes, kinds = 0, 0.0, 0, set()
    for _ in range(inputs):
        data = mutated(seeds, draw)
        started, fault = time.process_time(), ""
        try:
            read(data)
            well += 1
        except ModelgroveError:
            pass
        except Exception as error:  # noqa: BLE001  (that is what is looked for)
            fault = f"{type(error).__name__}: {error}"
        took = time.process_time() - started
        slowest = max(slowest, took)
        if took > LONGEST:
            fault = fault or f"{took:.0f} seconds"
        if fault:
            crashes += 1
            if keep and fault[:40] not in kinds:
                place = Path(keep) / f"{name.replace(' ', '-')}-{hashlib.sha256(data).hexdigest()[:8]}"
                place.write_bytes(data)
                click.echo(f"{place}: {fault}", err=True)
            kinds.add(fault[:40])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {
        "parser": name, "inputs": inputs, "read": well, "crashes": crashes, "kinds": sorted(kinds),
        "slowest_s": slowest, "grown_mb": grown, "per_s": inputs / (time.process_time() - began),
    }  # fmt: skip


@click.command()
@click.option("--quick", is_flag=True, help=f"One input in {QUICK}.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--seed", type=int, default=0, show_default=True, help="Other inputs.")
@click.option("--times", type=float, default=1.0, show_default=True, help="So many times the inputs.")
@click.option("--only", multiple=True, type=click.Choice(list(TARGETS)), help="This parser alone; may be repeated.")
@click.option("--keep", type=click.Path(file_okay=False, exists=True), default="", help="Folder for inputs that crash.")
def main(quick: bool, as_json: bool, seed: int, times: float, only: tuple[str, ...], keep: str) -> None:
    """Mutated files against every parser that sees a stranger's bytes."""
    rows = []
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in only or TARGETS:
            inputs = max(1, int(TARGETS[name][1] * times / (QUICK if quick else 1)))
            rows.append(pool.apply(run, (name, inputs, seed, keep)))
            click.echo(json.dumps(rows[-1]), err=True)
    if as_json:
        click.echo(json.dumps({"inputs": sum(row["inputs"] for row in rows), "results": rows}, indent=2))
    else:
        forms = {"inputs": ",d", "read": ",d", "crashes": "d", "slowest_s": ".2f", "grown_mb": ".0f", "per_s": ",.0f"}
        table = Table("parser", *forms)
        for row in rows:
            table.add_row(row["parser"], *(format(row[key], form) for key, form in forms.items()))
        Console(width=120).print(table)
        click.echo(f"{sum(row['inputs'] for row in rows):,} inputs, {sum(row['crashes'] for row in rows)} crashes")
    sys.exit(any(row["crashes"] for row in rows))


if __name__ == "__main__":
    main()
