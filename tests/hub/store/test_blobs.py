from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import fsspec
import pytest

from modelgrove_hub.errors import ConflictError, DataError, NotFoundError, StorageError, UsageError
from modelgrove_hub.store.blobs import BlobStore

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(params=["folder", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlobStore]:
    """A store on this machine, given as a path and as a URL, and one that is not."""
    urls = {"folder": str(tmp_path / "blobs"), "file": f"file://{tmp_path / 'blobs'}", "memory": f"memory://{uuid4()}"}
    yield BlobStore(urls[request.param], cache=tmp_path / "cache")
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def local(tmp_path: Path) -> BlobStore:
    return BlobStore(f"file://{tmp_path / 'blobs'}")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.bin"
    path.write_bytes(CONTENT)
    return path


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def test_a_file_comes_back_by_its_hash(store: BlobStore, source: Path):
    stored = store.put(source)

    assert (stored.sha256, stored.size) == (DIGEST, len(CONTENT))
    assert store.exists(DIGEST)
    assert store.path(DIGEST).read_bytes() == CONTENT
    with store.open(DIGEST) as file:
        assert file.read() == CONTENT
    assert store.find(DIGEST) == stored
    assert list(store) == [stored]
    assert store.verify(DIGEST)
    assert source.read_bytes() == CONTENT


def test_bytes_are_stored_like_files(store: BlobStore):
    digests = {store.put_bytes(data).sha256 for data in (b"", b"a", b"b" * 3_000_000)}

    assert {blob.sha256: blob.size for blob in store} == {d: store.path(d).stat().st_size for d in digests}
    assert store.path(hashlib.sha256(b"").hexdigest()).read_bytes() == b""


def test_the_time_a_blob_was_put_is_known_and_renewed(store: BlobStore, source: Path):
    before = time.time_ns() - 20_000_000  # file systems count in ticks of some milliseconds
    os.utime(source, (1, 1))
    first = store.put(source, mode="hardlink")
    time.sleep(0.05)
    second = store.put(source, mode="hardlink")

    assert before < first.added_ns < second.added_ns < time.time_ns() + 20_000_000
    assert store.find(DIGEST) == second
    assert len(list(store)) == 1


def test_a_deleted_blob_is_gone_and_deleting_again_does_nothing(store: BlobStore, source: Path):
    store.put(source)
    store.path(DIGEST)

    assert store.delete(DIGEST)
    assert not store.delete(DIGEST)
    assert not store.exists(DIGEST)
    assert list(store) == []
    for read in (store.path, store.open, store.verify):
        with pytest.raises(NotFoundError, match=DIGEST):
            read(DIGEST)


def test_a_blob_put_after_the_given_moment_is_not_deleted(store: BlobStore, source: Path):
    stored = store.put(source)

    assert not store.delete(DIGEST, unless_newer_than=stored.added_ns / 1e9 - 1)
    assert store.exists(DIGEST)
    assert store.delete(DIGEST, unless_newer_than=stored.added_ns / 1e9 + 1)


def test_what_is_no_digest_is_refused_before_it_becomes_a_path(store: BlobStore):
    for bad in ("", "../../etc/passwd", DIGEST[:-1], DIGEST.upper(), DIGEST + "\n", f"{DIGEST}/..", "g" * 64):
        for action in (store.path, store.open, store.exists, store.delete, store.verify):
            with pytest.raises(UsageError, match="not a sha256"):
                action(bad)


def test_a_source_that_is_no_file_is_refused(store: BlobStore, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(NotFoundError, match="missing"):
        store.put(tmp_path / "missing")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(DataError, match="not a regular file"):
            store.put(path)
    assert list(store) == []


def test_many_may_put_the_same_blob_at_once(store: BlobStore, source: Path):
    with ThreadPoolExecutor(8) as pool:
        stored = list(pool.map(lambda number: store.put(source, mode=("copy", "hardlink")[number % 2]), range(40)))

    assert {blob.sha256 for blob in stored} == {DIGEST}
    assert [blob.sha256 for blob in store] == [DIGEST]
    assert store.verify(DIGEST)
    assert store.sweep(0) == 0  # no draft was left


def test_two_processes_may_put_the_same_blob_at_once(local: BlobStore, source: Path):
    script = (
        "import sys\nfrom pathlib import Path\nfrom modelgrove_hub.store.blobs import BlobStore\n"
        "store = BlobStore(sys.argv[1])\nfor _ in range(30): store.put(Path(sys.argv[2]))"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, local.url, str(source)]) for _ in range(2)]

    assert [process.wait() for process in running] == [0, 0]
    assert [blob.sha256 for blob in local] == [DIGEST]
    assert local.verify(DIGEST)


def test_a_blob_being_put_again_is_never_lost_to_garbage_collection(local: BlobStore, source: Path):
    old = local.put(source).added_ns / 1e9
    time.sleep(0.02)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(100):
            putting = pool.submit(local.put, source)
            pool.submit(local.delete, DIGEST, old).result()

            assert putting.result().sha256 == DIGEST
            assert local.exists(DIGEST)


def test_a_copy_is_read_only_and_independent_of_its_source(local: BlobStore, source: Path):
    local.put(source)
    source.write_bytes(b"changed")

    assert local.path(DIGEST).read_bytes() == CONTENT
    assert local.path(DIGEST).stat().st_mode & 0o222 == 0


def test_a_hard_link_takes_no_space_and_outlives_its_source(local: BlobStore, source: Path):
    local.put(source, mode="hardlink")

    assert local.path(DIGEST).samefile(source)
    source.unlink()
    assert local.path(DIGEST).read_bytes() == CONTENT


def test_an_original_that_is_replaced_does_a_hard_link_no_harm(local: BlobStore, source: Path, tmp_path: Path):
    local.put(source, mode="hardlink")
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "new").replace(source)

    assert local.verify(DIGEST)


def test_an_original_that_is_edited_is_noticed(local: BlobStore, source: Path):
    stored = local.put(source, mode="hardlink")
    assert local.find(DIGEST) == stored
    time.sleep(0.02)
    with source.open("r+b") as file:
        file.write(b"W")
    os.utime(source, ns=(stored.mtime_ns, stored.mtime_ns))  # even if somebody hides it

    assert local.find(DIGEST) != stored
    assert not local.verify(DIGEST)


def test_an_original_that_is_edited_while_it_is_linked_is_refused(
    local: BlobStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def hash_and_edit(file: BinaryIO, name: str) -> Any:
        digest = file_digest(file, name)
        source.write_bytes(b"edited")
        return digest

    file_digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", hash_and_edit)

    with pytest.raises(ConflictError, match="changed while it was hashed"):
        local.put(source, mode="hardlink")
    assert files_in(tmp_path / "blobs") == []


def test_putting_a_damaged_blob_again_heals_it(local: BlobStore, source: Path):
    local.put(source, mode="hardlink")
    source.write_bytes(b"edited in place")
    assert not local.verify(DIGEST)

    local.put_bytes(CONTENT)

    assert local.verify(DIGEST)


def test_a_link_to_a_file_is_stored_as_that_file(local: BlobStore, source: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(source)
    for mode in ("copy", "hardlink"):
        local.put(tmp_path / "link", mode=mode)

        assert not local.path(DIGEST).is_symlink()
        assert local.verify(DIGEST)


def test_across_devices_a_hard_link_becomes_a_copy(source: Path, tmp_path: Path):
    other = Path("/dev/shm") / f"modelgrove-{uuid4()}"
    if not other.parent.is_dir() or other.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is no file system of its own on this machine")
    try:
        store = BlobStore(str(other))
        store.put(source, mode="hardlink")

        assert store.verify(DIGEST)
        assert not store.path(DIGEST).samefile(source)
    finally:
        subprocess.run(["rm", "-rf", other], check=True)


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(
    local: BlobStore, full_disk: Callable[[int], AbstractContextManager[None]], tmp_path: Path
):
    with full_disk(2**16), pytest.raises(StorageError, match="File too large"):
        local.put_bytes(b"x" * 2**17)

    assert files_in(tmp_path / "blobs") == []


def test_a_store_that_cannot_be_a_folder_is_a_storage_error(source: Path):
    with pytest.raises(StorageError, match=r"source\.bin"):
        BlobStore(str(source)).put(source)


def test_a_url_of_an_unknown_kind_is_a_storage_error():
    with pytest.raises(StorageError, match="nowhere://"):
        BlobStore("nowhere://bucket/blobs")


def test_a_killed_writer_leaves_no_blob_and_its_draft_is_swept(local: BlobStore, tmp_path: Path):
    script = (
        "import os, signal, sys\nfrom modelgrove_hub.store.shelves import LocalShelf\nfrom pathlib import Path\n"
        "def chunks():\n    yield b'x' * 1000\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "LocalShelf(Path(sys.argv[1])).write(chunks())"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "blobs")], check=False)

    assert done.returncode == -signal.SIGKILL
    assert list(local) == []
    assert len(files_in(tmp_path / "blobs")) == 1
    assert local.sweep(3600) == 0
    assert local.sweep(0) == 1
    assert files_in(tmp_path / "blobs") == []


def test_a_remote_blob_is_fetched_once_and_whole(tmp_path: Path):
    store = BlobStore(f"memory://{uuid4()}", cache=tmp_path / "cache")
    store.put_bytes(CONTENT)
    assert files_in(tmp_path) == []

    first = store.path(DIGEST)

    assert first.read_bytes() == CONTENT
    assert store.path(DIGEST) == first
    assert files_in(tmp_path / "cache") == [DIGEST]


def test_a_remote_blob_that_arrives_damaged_is_not_kept(tmp_path: Path):
    url = f"memory://{uuid4()}"
    store = BlobStore(url, cache=tmp_path / "cache")
    store.put_bytes(CONTENT)
    memory = fsspec.filesystem("memory")
    [place] = [path for path in memory.find(url.removeprefix("memory:/")) if path.endswith(DIGEST)]
    memory.pipe(place, CONTENT[:-1])

    with pytest.raises(StorageError, match="arrived damaged"):
        store.path(DIGEST)
    assert files_in(tmp_path / "cache") == []
    assert not store.verify(DIGEST)


def test_remote_drafts_that_writers_left_are_swept(tmp_path: Path):
    url = f"memory://{uuid4()}"
    store = BlobStore(url, cache=tmp_path)
    store.put_bytes(CONTENT)
    fsspec.filesystem("memory").pipe(f"{url.removeprefix('memory:/')}/drafts/.0123.part", b"half")

    assert [blob.sha256 for blob in store] == [DIGEST]
    assert store.sweep(3600) == 0
    assert store.sweep(-1, dry_run=True) == 1
    assert store.sweep(-1) == 1
    assert store.exists(DIGEST)


def test_opening_a_store_imports_neither_fsspec_nor_numpy():
    script = (
        "import sys\nfrom modelgrove_hub.store.blobs import BlobStore\nBlobStore('/tmp/x')\n"
        "print({'fsspec', 'numpy', 'torch'} & set(sys.modules))"
    )

    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)

    assert done.stdout.strip() == "set()"
