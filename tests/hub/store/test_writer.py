from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modelgrove_hub.errors import StorageError, UsageError
from modelgrove_hub.store import writer as module
from modelgrove_hub.store.dtypes import DTYPES
from modelgrove_hub.store.header import MAX_METADATA, name_fault, read_header
from modelgrove_hub.store.tensors import tensors_of
from modelgrove_hub.store.writer import SafetensorsWriter

WRITABLE = [getattr(torch, dtype.torch) for dtype in DTYPES.values() if dtype.torch and dtype.bits >= 8]


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    left, right = left.contiguous().reshape(-1), right.contiguous().reshape(-1)
    return left.dtype == right.dtype and left.view(torch.uint8).equal(right.view(torch.uint8))


def check(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    header = read_header(path)
    assert header.data_start % 8 == 0
    assert header.metadata == metadata
    assert {info.name for info in header.tensors} == set(tensors)
    loaded = load_file(path)
    for stored in tensors_of(path):
        expected = tensors[stored.name]
        assert stored.shape == expected.shape == loaded[stored.name].shape
        assert same_bits(stored.read(), expected)
        assert same_bits(loaded[stored.name], expected)
    with safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == metadata


NAMES = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=40)


@st.composite
def arbitrary_tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype, shape = draw(st.sampled_from(WRITABLE)), draw(st.lists(st.integers(0, 5), max_size=3))
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    bits = torch.tensor(draw(st.lists(st.integers(0, 255), min_size=8, max_size=8)), dtype=torch.uint8)
    return bits.repeat(math.prod(shape)).view(dtype)[: math.prod(shape)].reshape(shape)


@settings(deadline=None)
@given(
    st.dictionaries(NAMES.filter(lambda name: not name_fault(name)), arbitrary_tensors(), max_size=6),
    st.dictionaries(NAMES, NAMES, max_size=3),
    st.sampled_from([(2**25, 2**20), (0, 2**12), (100, 64), (0, 0)]),
)
def test_any_tensors_come_back_however_they_were_written(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str],
    sizes: tuple[int, int],
):
    """Held in memory, streamed, streamed after some were held, and with a header that outgrew its room."""
    path = tmp_path_factory.mktemp("writer") / "x.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BUFFER", sizes[0])
        patch.setattr(module, "ROOM", sizes[1])
        with SafetensorsWriter(path, metadata) as writer:
            for name, tensor in tensors.items():
                writer.add(name, tensor)

    check(path, tensors, metadata)
    assert list(path.parent.iterdir()) == [path]


def test_a_file_larger_than_the_buffer_is_streamed(tmp_path: Path):
    tensors = {f"layer.{i}": torch.full((2**21,), float(i)) for i in range(5)}  # 8 MB each
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)

        assert [entry.stat().st_size >= 32 * 2**20 for entry in tmp_path.iterdir()] == [True]
        assert not path.exists()

    check(path, tensors, {"format": "pt"})


def test_a_small_file_is_laid_out_exactly_and_aligned(tmp_path: Path):
    tensors = {"b": torch.ones(3, dtype=torch.uint8), "a": torch.ones(2, dtype=torch.float64), "c": torch.ones(2)}
    save_file(tensors, tmp_path / "library.safetensors")
    with SafetensorsWriter(tmp_path / "ours.safetensors") as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)

    assert (tmp_path / "ours.safetensors").stat().st_size == (tmp_path / "library.safetensors").stat().st_size
    assert all(
        stored.offset % DTYPES[stored.dtype].itemsize == 0 for stored in tensors_of(tmp_path / "ours.safetensors")
    )


def test_the_same_tensors_give_the_same_file(tmp_path: Path):
    for name, metadata in (("a", {"x": "1", "y": "2"}), ("b", {"y": "2", "x": "1"})):
        with SafetensorsWriter(tmp_path / name, metadata) as writer:
            writer.add("w", torch.arange(5))

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_views_gradients_and_conjugates_are_written_as_their_values(tmp_path: Path):
    full = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": full.T,
        "strided": full[:, ::2],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "gradient": torch.nn.Parameter(torch.ones(2)),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
        "fp4": torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    }
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)

    read = {stored.name: stored.read() for stored in tensors_of(path)}
    assert read["fp4"].view(torch.uint8).tolist() == [[1, 2], [3, 4]]
    for name in tensors.keys() - {"fp4"}:
        assert read[name].equal(tensors[name].detach()), name
    with safe_open(path, "pt") as file:
        assert file.get_tensor("fp4").shape == (2, 2)


def test_a_tensor_changed_after_it_was_added_does_not_change_the_file(tmp_path: Path):
    path, tensor = tmp_path / "x.safetensors", torch.zeros(3)
    with SafetensorsWriter(path) as writer:
        writer.add("x", tensor)
        tensor.fill_(7)

    assert load_file(path)["x"].tolist() == [0, 0, 0]


def test_what_cannot_be_stored_is_refused_by_name(tmp_path: Path):
    writer = SafetensorsWriter(tmp_path / "x.safetensors")
    writer.add("once", torch.ones(1))
    refused = {
        "once": torch.ones(1),
        "": torch.ones(1),
        "a\nb": torch.ones(1),
        "__metadata__": torch.ones(1),
        "complex128": torch.ones(1, dtype=torch.complex128),
        "sparse": torch.ones(2, 2).to_sparse(),
        "meta": torch.ones(1, device="meta"),
        "nine": torch.ones([1] * 9),
    }
    for name, tensor in refused.items():
        with pytest.raises(UsageError):
            writer.add(name, tensor)
    writer.close()

    assert set(load_file(tmp_path / "x.safetensors")) == {"once"}


def test_metadata_must_be_text(tmp_path: Path):
    with pytest.raises(UsageError, match="'steps' is not text"):
        SafetensorsWriter(tmp_path / "x.safetensors", {"steps": 100})  # type: ignore[dict-item]  # the mistake tested


@pytest.mark.parametrize("buffer", [0, 2**25])
def test_metadata_may_be_known_last(buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BUFFER", buffer)
    monkeypatch.setattr(module, "ROOM", 512)
    path, tensors = tmp_path / "x.safetensors", {"a": torch.arange(3.0), "b": torch.ones(5, dtype=torch.uint8)}
    large = "error of a tensor " * 100  # more than the room for the header
    with SafetensorsWriter(path, {"format": "pt", "error": "unknown"}) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.describe("error", large)
        writer.describe("rank", "4")

    check(path, tensors, {"format": "pt", "error": large, "rank": "4"})
    assert list(tmp_path.iterdir()) == [path]


def test_metadata_that_cannot_be_written_is_refused_at_once_and_too_much_of_it_at_the_end(tmp_path: Path):
    writer = SafetensorsWriter(tmp_path / "x.safetensors")
    writer.add("a", torch.ones(1))
    with pytest.raises(UsageError, match="cannot be stored"):
        writer.describe("k", "a\0b")
    for key in ("one", "two"):
        writer.describe(key, "x" * (MAX_METADATA // 2))
    with pytest.raises(UsageError, match=f"more than {MAX_METADATA}"):
        writer.close()
    with pytest.raises(UsageError, match="closed already"):
        writer.describe("k", "v")
    assert list(tmp_path.iterdir()) == []


def write_twice(path: Path) -> None:
    with SafetensorsWriter(path) as writer:
        writer.add("a", torch.ones(100))
        writer.add("a", torch.ones(100))


@pytest.mark.parametrize("buffer", [0, 2**25])
def test_a_failed_or_aborted_writer_leaves_nothing(buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BUFFER", buffer)
    path = tmp_path / "x.safetensors"
    with pytest.raises(UsageError, match="already"):
        write_twice(path)
    aborted = SafetensorsWriter(path)
    aborted.add("a", torch.ones(100))
    aborted.abort()

    assert list(tmp_path.iterdir()) == []
    for action in (aborted.close, lambda: aborted.add("b", torch.ones(1))):
        with pytest.raises(UsageError, match="closed already"):
            action()


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_file({"old": torch.ones(1)}, path)
    writer = SafetensorsWriter(path)
    writer.add("new", torch.ones(1))
    assert set(load_file(path)) == {"old"}
    writer.close()

    assert set(load_file(path)) == {"new"}


@pytest.mark.parametrize("buffer", [0, 2**25])
def test_a_full_disk_is_a_storage_error_and_leaves_nothing(
    buffer: int,
    full_disk: Callable[[int], AbstractContextManager[None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(module, "BUFFER", buffer)
    monkeypatch.setattr(module, "ROOM", 4096)
    with (
        full_disk(2**16),
        pytest.raises(StorageError, match=r"x\.safetensors: File too large"),
        SafetensorsWriter(tmp_path / "x.safetensors") as writer,
    ):
        writer.add("a", torch.ones(2**15))

    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_file_under_the_name(tmp_path: Path):
    script = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from modelgrove_hub.store import writer\n"
        "writer.BUFFER = 0\n"
        "w = writer.SafetensorsWriter(Path(sys.argv[1]))\n"
        "w.add('a', torch.ones(10))\n"
        "w.describe('known', 'last')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x.safetensors")], check=False)

    assert done.returncode == -signal.SIGKILL
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
