"""Pickles of weights as trainers write them, and pickles made to hurt. The second are only ever read as bytes.

What a hostile one would do, were it ever run, is to make the folder `OWNED`.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import io
import lzma
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

OWNED = "/tmp/modelgrove-was-here"


def saved(value: Any, **how: Any) -> bytes:
    """What torch.save writes."""
    stream = io.BytesIO()
    torch.save(value, stream, **how)
    return stream.getvalue()


def state(seed: int = 0) -> OrderedDict[str, torch.Tensor]:
    """A small network's weights."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2)).state_dict()
    return OrderedDict(
        (name, torch.randn(value.shape, generator=generator) if value.is_floating_point() else value)
        for name, value in made.items()
    )


def benign() -> Iterator[tuple[str, bytes, dict[str, torch.Tensor]]]:
    """Name, bytes and the tensors that must come out: plain weights of the kinds that people publish."""
    weights = state()
    plain = dict(weights)
    yield "state-dict.pt", saved(weights), plain
    yield "legacy.bin", saved(weights, _use_new_zipfile_serialization=False), plain
    yield "protocol-3.pth", saved(weights, pickle_protocol=3), plain
    parameters = {name: torch.nn.Parameter(value) for name, value in plain.items() if value.is_floating_point()}
    yield "parameters.pt", saved(parameters), {name: value.detach() for name, value in parameters.items()}
    network = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(4)).sum().backward()
    optimizer.step()
    lightning = {
        "epoch": 3, "global_step": 1000, "pytorch-lightning_version": "2.5.0", "state_dict": weights, "loops": {},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(1.0), "dirpath": "x"}},
        "optimizer_states": [optimizer.state_dict()], "lr_schedulers": [{"last_epoch": 3, "_last_lr": [1e-4]}],
        "hparams_name": "kwargs", "hyper_parameters": {"rank": 4, "names": ("a", "b"), "kept": {1, 2}, "none": None},
    }  # fmt: skip
    yield "lightning.ckpt", saved(lightning), plain
    yield "lightning-legacy.ckpt", saved(lightning, _use_new_zipfile_serialization=False), plain
    trained = {"model": weights, "opt": optimizer.state_dict(), "args": argparse.Namespace(lr=1e-4, name="x")}
    yield "namespace.pt", saved(trained), plain
    yield "numpy-scalars.pt", saved({"model": weights, "best": np.float64(0.5), "seen": np.arange(3)}), plain
    yield "esrgan.pth", saved({"params_ema": weights, "params": state(1)}), plain
    vector = torch.ones(2, 768)
    web_ui = {"string_to_token": {"*": 265}, "string_to_param": {"*": vector}, "name": "x", "step": 500,
              "sd_checkpoint": "7460a6fa", "sd_checkpoint_name": None}  # fmt: skip
    yield "web-ui-embedding.pt", saved(web_ui), {"emb_params": vector}
    yield "learned_embeds.bin", saved({"<cat-toy>": vector[0]}), {"<cat-toy>": vector[0]}
    kinds = {
        str(kind).removeprefix("torch."): torch.ones(2, 2).to(kind)
        for kind in (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
                     torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.uint16)
    }  # fmt: skip
    yield "every-dtype.pt", saved(kinds), kinds
    shared = torch.randn(4, 6)
    tied = {
        "wte": shared,
        "lm_head": shared,
        "rows": shared[1:3],
        "turned": shared.t(),
        "stretched": torch.ones(1).expand(3),
    }
    yield "tied.pt", saved(tied), tied
    odd = {
        "scalar": torch.tensor(2.5),
        "nothing": torch.empty(0, 3),
        "negative": torch.ones(2, dtype=torch.cfloat).conj(),
    }
    yield "odd-shapes.pt", saved(odd), odd
    nested = {"unet": {"a": torch.ones(2)}, "text_encoder": {"a": torch.zeros(2)}, "steps": 5}
    yield "two-networks.bin", saved(nested), {"unet.a": torch.ones(2), "text_encoder.a": torch.zeros(2)}
    # As a machine with a GPU saves: only the place of the storages differs. The zip's checksum covers it.
    pickled = zipfile.ZipFile(io.BytesIO(saved({"w": torch.ones(3)}, pickle_protocol=2)))
    data = pickled.read("archive/data.pkl").replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0")
    yield (
        "cuda.pt",
        archive({"data.pkl": data, "data/0": struct.pack("<3f", 1, 1, 1), "version": b"3\n"}),
        {"w": torch.ones(3)},
    )
    lora = {
        f"lora_unet_mid_block.lora_{side}.weight": torch.ones(shape)
        for side, shape in (("down", (1, 4)), ("up", (4, 1)))
    }
    yield "lora.pt", saved(lora), lora


# ---- made to hurt ---------------------------------------------------------------------------


def call(name: str, *arguments: str) -> bytes:
    """A pickle, protocol 2, that calls `name` ("os.mkdir") with texts."""
    module, _, function = name.rpartition(".")
    texts = b"".join(b"X" + struct.pack("<I", len(text)) + text.encode() for text in arguments)
    return b"\x80\x02c" + f"{module}\n{function}\n".encode() + b"(" + texts + b"tR."


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_STORED, top: str = "archive/") -> bytes:
    """A zip like torch's."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as made:
        for name, content in members.items():
            made.writestr(top + name, content)
    return stream.getvalue()


def in_zip(data: bytes) -> bytes:
    """A pickle where torch's archive has it."""
    return archive({"data.pkl": data, "version": b"3\n"})


def in_legacy(data: bytes) -> bytes:
    """A pickle where torch's legacy format has it: the fourth of five."""
    old = saved({}, _use_new_zipfile_serialization=False)
    stream = io.BytesIO(old)
    for _ in range(3):
        list(pickle_opcodes(stream))
    return old[: stream.tell()] + data + pickle.dumps([], 2)


def pickle_opcodes(stream: io.BytesIO) -> Iterator[Any]:
    import pickletools

    return pickletools.genops(stream)


CALLED = (
    "os.mkdir", "os.system", "posix.system", "nt.system", "subprocess.Popen", "subprocess.check_output",
    "builtins.eval", "builtins.exec", "builtins.__import__", "builtins.getattr", "builtins.open",
    "__builtin__.apply", "io.open", "io.FileIO", "importlib.import_module", "marshal.loads", "pickle.loads",
    "_pickle.loads", "torch.load", "torch.hub.load", "torch.jit.load", "torch.serialization.load",
    "torch.ops.load_library", "numpy.load", "runpy.run_path", "pty.spawn", "shutil.rmtree", "ctypes.CDLL",
    "code.interact", "timeit.timeit", "functools.partial", "functools.reduce", "operator.attrgetter",
    "operator.methodcaller", "types.CodeType", "types.FunctionType", "webbrowser.open", "socket.create_connection",
    "urllib.request.urlopen", "multiprocessing.util.spawnv_passfds", "pip.main", "pdb.run", "cProfile.run",
    "pydoc.locate", "pathlib.Path.write_text", "logging.FileHandler", "tempfile.mkdtemp", "sys.settrace",
    "torch._utils._rebuild_wrapper_subclass", "torch._tensor._rebuild_from_type_v2",
    "torch._inductor.codecache.compile_file", "torch.distributed.rpc.rpc_sync",
    "numpy.testing._private.utils.runstring", "numpy.f2py.crackfortran.getlincoef",
    "transformers.pipelines.pipeline", "diffusers.DiffusionPipeline", "torch.nn.Linear", "datetime.datetime",
)  # fmt: skip
"""What a pickle of weights has no business to name; the last are harmless, and still not on our list."""


def hostile() -> Iterator[tuple[str, bytes]]:
    """Name and bytes: none of these may be converted."""
    yield from calling()
    yield from abusing()


def calling() -> Iterator[tuple[str, bytes]]:
    """Pickles that import, and would call, what weights do not need."""
    for name in CALLED:
        yield f"zip-{name}.pt", in_zip(call(name, OWNED))
    for name in CALLED[:12]:
        yield f"legacy-{name}.bin", in_legacy(call(name, OWNED))
        yield f"bare-{name}.pkl", call(name, OWNED)
    yield from _hidden()


def abusing() -> Iterator[tuple[str, bytes]]:
    """Archives that two readers see differently, that hide something or are no pickle, and sizes beyond all bounds."""
    yield from _odd_archives()
    yield from _too_much()


def _hidden() -> Iterator[tuple[str, bytes]]:
    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    named = text("os") + text("mkdir") + b"\x93(" + text(OWNED) + b"tR."
    yield "protocol-4.pt", in_zip(b"\x80\x04" + named)
    yield "stack-global.pt", in_zip(b"\x80\x02" + named)
    yield "no-protocol.pt", in_zip(named)
    yield "inst.pt", in_zip(b"(X" + struct.pack("<I", len(OWNED)) + OWNED.encode() + b"ios\nmkdir\n.")
    yield "obj.pt", in_zip(b"(cos\nmkdir\nX" + struct.pack("<I", len(OWNED)) + OWNED.encode() + b"o.")
    yield "extension.pt", in_zip(b"\x80\x02\x82\x01.")
    yield "persid.pt", in_zip(b"Pos.system\n.")
    yield "newobj-ex.pt", in_zip(b"\x80\x04cos\nmkdir\n)}\x92.")
    yield "second-pickle.pt", in_zip(pickle.dumps({}, 2) + call("os.mkdir", OWNED))
    yield "truncated.pt", in_zip(call("os.mkdir", OWNED)[:-1])
    yield "after-stop.bin", in_legacy(pickle.dumps({}, 2)).replace(pickle.dumps([], 2), call("os.mkdir", OWNED))
    magic = saved({}, _use_new_zipfile_serialization=False)[:18]
    yield "second-of-legacy.bin", magic + call("os.mkdir", OWNED) * 4
    yield "module.pt", saved(torch.nn.Linear(2, 2))
    yield "numpy-object.npy", _npy()


def _npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return stream.getvalue()


def _odd_archives() -> Iterator[tuple[str, bytes]]:
    good = pickle.dumps({}, 2)
    bad = call("os.mkdir", OWNED)
    base = {"data.pkl": good, "version": b"3\n"}
    for name, member in (
        ("up", "../../etc/cron.d/x"), ("code", "code/__torch__.py"), ("constants", "constants.pkl"), ("python", "x.py"),
        ("deeper", "data/0/data.pkl"), ("backslash", "data\\0"),
    ):  # fmt: skip
        yield f"member-{name}.pt", archive({**base, member: bad})
    yield "absolute.pt", archive(base, top="/archive/")
    two = io.BytesIO(archive(base))
    with zipfile.ZipFile(two, "a") as made:
        made.writestr("other/data.pkl", bad)
    yield "two-tops.pt", two.getvalue()
    twice = io.BytesIO(archive(base))
    with zipfile.ZipFile(twice, "a") as made, _no_warnings():
        made.writestr("archive/data.pkl", bad)
    yield "member-twice.pt", twice.getvalue()
    link = zipfile.ZipInfo("archive/data/0")
    link.external_attr = 0o120777 << 16
    linked = io.BytesIO(archive(base))
    with zipfile.ZipFile(linked, "a") as made:
        made.writestr(link, "/etc/passwd")
    yield "link.pt", linked.getvalue()
    whole = archive({**base, "data/0": bytes(64)})
    yield "checksum.pt", whole.replace(bytes(64), bytes(63) + b"\1", 1)
    yield "other-name.pt", whole.replace(b"archive/data.pkl", b"archive/DATA.PKL", 1)
    yield "encrypted.pt", whole[:6] + b"\x01" + whole[7:]
    far = io.BytesIO(whole)
    with zipfile.ZipFile(far, "a") as made:
        made.writestr("archive/data/1", bytes(4))
        made.filelist[-1].header_offset = 2**63
    yield "far.pt", far.getvalue()
    yield "before.pt", b"PK\3\4" + bytes(60) + whole
    yield "after.pt", whole + bytes(64)
    yield "comment.pt", whole[:-2] + struct.pack("<H", 8) + b"PK\3\4MZ\0\0"
    yield "cut.pt", saved(state())[:-40]
    for name, method in (("deflated", 8), ("bzip2", 12), ("lzma", 14)):
        yield f"bomb-{name}.pt", archive({**base, "data/0": bytes(2**22)}, method)
    yield "nested.pt", archive({"data.pkl": good, "data/0": whole, "inner.zip": in_zip(bad)})
    yield "no-pickle.pt", archive({"version": b"3\n"})
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as made_tar:
        entry = tarfile.TarInfo("pickle")
        entry.size = len(bad)
        made_tar.addfile(entry, io.BytesIO(bad))
    yield "tar.pt", tar.getvalue()
    for name, packed in (("gz", gzip.compress(bad)), ("bz2", bz2.compress(bad)), ("xz", lzma.compress(bad))):
        yield f"packed-{name}.pt", packed
    yield "joblib.pkl", zlib.compress(bad)
    yield "7z.bin", b"7z\xbc\xaf\x27\x1c" + bytes(99)


def _no_warnings() -> Any:
    import warnings

    return warnings.catch_warnings(action="ignore")


def _too_much() -> Iterator[tuple[str, bytes]]:
    rebuild, storage = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n"

    def tensor(size: bytes, stride: bytes) -> bytes:
        place = b"(X\x07\0\0\0storage" + storage + b"X\x01\0\0\x000X\x03\0\0\0cpuK\x01tQ"
        return rebuild + b"(" + place + b"K\0" + size + stride + b"\x89ccollections\nOrderedDict\n)RtR"

    def numbers(*values: int) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

    def weights(pickled: bytes) -> bytes:
        return archive({"data.pkl": pickled, "data/0": bytes(4), "version": b"3\n"})

    name = b"X\x01\0\0\0w"
    yield "stretched.pt", weights(b"\x80\x02}" + name + tensor(numbers(2**40), numbers(0)) + b"s.")
    yield "overflow.pt", weights(b"\x80\x02}" + name + tensor(numbers(2**62, 4), numbers(0, 0)) + b"s.")
    yield "negative.pt", weights(b"\x80\x02}" + name + tensor(numbers(-5), numbers(1)) + b"s.")
    yield "outside.pt", weights(b"\x80\x02}" + name + tensor(numbers(10**6), numbers(1)) + b"s.")
    keys = [b"X\x02\0\0\0%02d" % place for place in range(60)]
    lists = b"".join(
        keys[place] + b"](h%ch%ceq%c" % (place - 1, place - 1, place) if place else keys[0] + b"]q\0"
        for place in range(60)
    )
    yield "doubled.pt", in_zip(b"\x80\x02}(" + lists + b"u.")
    yield "deep.pt", in_zip(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    yield "itself.pt", in_zip(b"\x80\x02}q\0" + name + b"h\0s.")
    yield "length.pt", in_zip(b"\x80\x02X\xff\xff\xff\x7fx.")
    yield "length-8.pt", in_zip(b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.")
    yield "memo-far.pt", in_zip(b"\x80\x02]r\xff\xff\xff\xff.")
    yield "digits.pt", in_zip(b"I" + b"9" * 100_000 + b"\n.")
    yield "bytes.pt", in_zip(b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + struct.pack("<q", 2**40)[:6] + b"\x85R.")


def was_run() -> bool:
    """Whether something hostile was run since the folder was last removed."""
    return os.path.exists(OWNED)  # noqa: PTH110
