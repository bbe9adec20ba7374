"""What the real client reads: infos, lists, trees, files, and its own errors where there is nothing."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfFileSystem, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

CARD = "---\nlicense: mit\nbase_model: me/base\ntags:\n- cats\n---\n# Cats\n\nIt draws <script>cats</script>.\n"


@pytest.fixture(scope="module")
def folder(server, lora, tmp_path_factory):
    """A folder of two models, registered where it lies."""
    top = tmp_path_factory.mktemp("models") / "me"
    (top / "cats").mkdir(parents=True)
    (top / "cats/model.safetensors").write_bytes(lora(1).read_bytes())
    (top / "cats/README.md").write_text(CARD, "utf-8")
    (top / "dogs").mkdir()
    (top / "dogs/dogs.safetensors").write_bytes(lora(2).read_bytes())
    (top / "dogs/README.md").write_text("# Dogs\n", "utf-8")
    server.run("ingest", str(top.parent))
    return top


@pytest.fixture(scope="module", autouse=True)
def ready(api, folder):
    """Every test finds the client and the models."""


def test_a_model_is_described(api):
    info = api.model_info("me/cats", files_metadata=True)

    assert (info.id, info.author, info.private, info.gated) == ("me/cats", "me", False, False)
    assert {"cats", "lora", "license:mit", "base_model:me/base", "diffusers", "safetensors"} <= set(info.tags)
    assert info.card_data.license == "mit"
    assert info.safetensors.total == 4 * 64 * 2 + 1
    assert len(info.sha) == 40
    weights = next(one for one in info.siblings if one.rfilename == "model.safetensors")
    assert weights.lfs.sha256 == hashlib.sha256(weights_of(api)).hexdigest()
    assert weights.lfs.size == weights.size


def weights_of(api):
    return Path(hf_hub_download("me/cats", "model.safetensors")).read_bytes()


def test_models_are_listed_searched_filtered_and_paged(api):
    assert [one.id for one in api.list_models()] == ["me/dogs", "me/cats"]
    assert [one.id for one in api.list_models(search="CAT")] == ["me/cats"]
    assert [one.id for one in api.list_models(author="me", limit=1)] == ["me/dogs"]
    assert [one.id for one in api.list_models(author="you")] == []
    assert [one.id for one in api.list_models(filter="license:mit")] == ["me/cats"]
    assert [one.id for one in api.list_models(filter=["cats", "lora"], full=True)] == ["me/cats"]
    assert [one.id for one in api.list_models(filter="base_model:me/base")] == ["me/cats"]
    pages = httpx2.get(f"{api.endpoint}/api/models", params={"limit": 1})
    assert len(pages.json()) == 1
    assert [one["id"] for one in httpx2.get(pages.links["next"]["url"]).json()] == ["me/cats"]


def test_a_tree_has_files_as_git_names_them(api, folder):
    tree = {one.path: one for one in api.list_repo_tree("me/cats", recursive=True, expand=True)}

    git = subprocess.run(["git", "hash-object", folder / "cats/README.md"], capture_output=True, text=True, check=True)
    assert tree["README.md"].blob_id == git.stdout.strip()
    assert tree["README.md"].lfs is None
    assert tree["model.safetensors"].lfs.size == (folder / "cats/model.safetensors").stat().st_size
    assert tree["README.md"].last_commit.title == "First version"
    found = api.get_paths_info("me/cats", ["README.md", "nothing.txt"])
    assert [one.path for one in found] == ["README.md"]


def test_refs_and_commits(api):
    refs = api.list_repo_refs("me/cats")
    assert [one.name for one in refs.branches] == ["main"]
    (commit,) = api.list_repo_commits("me/cats")
    assert commit.commit_id == refs.branches[0].target_commit == api.model_info("me/cats").sha


def test_a_snapshot_is_the_files_and_the_second_one_loads_nothing(api, folder, tmp_path):
    place = snapshot_download("me/cats")
    assert sorted(file.name for file in Path(place).iterdir()) == ["README.md", "model.safetensors"]
    assert snapshot_download("me/cats", local_files_only=True) == place
    only = snapshot_download("me/cats", allow_patterns="*.md", local_dir=tmp_path)
    assert [file.name for file in Path(only).glob("[!.]*")] == ["README.md"]


def test_what_is_not_there_is_the_client_s_own_error(api):
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("me/nobody")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("me/cats", revision="v9")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("me/cats", "nothing.txt")
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info("me/cats")
    assert not api.repo_exists("me/nobody")
    assert not api.file_exists("me/cats", "nothing.txt")
    assert api.revision_exists("me/cats", "main")
    answer = httpx2.get(f"{api.endpoint}/api/spaces/me/x/secrets")
    assert answer.status_code == 404
    assert "models" in answer.json()["error"]


def test_cards_headers_and_the_file_system_are_read(api):
    assert ModelCard.load("me/cats").data.license == "mit"
    header = api.get_safetensors_metadata("me/cats")
    assert header.parameter_count == {"F32": 513}
    system = HfFileSystem(endpoint=api.endpoint)
    assert sorted(system.ls("me/cats", detail=False)) == ["me/cats/README.md", "me/cats/model.safetensors"]
    with system.open("me/cats/README.md") as file:
        assert file.read(3) == b"---"
    assert system.glob("me/cats/*.safetensors") == ["me/cats/model.safetensors"]


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-9", slice(0, 10)),
        ("bytes=5-", slice(5, None)),
        ("bytes=-7", slice(-7, None)),
        ("bytes=3-99999999", slice(3, None)),
    ],
)
def test_ranges_are_slices(api, folder, asked, part):
    whole = (folder / "cats/model.safetensors").read_bytes()
    url = f"{api.endpoint}/me/cats/resolve/main/model.safetensors"
    answer = httpx2.get(url, headers={"Range": asked})

    assert answer.status_code == 206
    assert answer.content == whole[part]
    etag = answer.headers["etag"]
    assert httpx2.get(url, headers={"Range": asked, "If-Range": '"other"'}).content == whole
    assert httpx2.get(url, headers={"If-None-Match": etag}).status_code == 304
    assert httpx2.get(url, headers={"Range": f"bytes={len(whole)}-"}).status_code == 416


def test_head_says_what_get_would(api, folder):
    url = f"{api.endpoint}/me/cats/resolve/main/model.safetensors"
    head, got = httpx2.head(url), httpx2.get(url)
    for name in ("content-length", "etag", "x-repo-commit", "x-linked-etag", "x-linked-size", "accept-ranges"):
        assert head.headers[name] == got.headers[name], name
    assert got.headers["x-repo-commit"] == api.model_info("me/cats").sha
    raw = httpx2.get(f"{api.endpoint}/me/cats/raw/main/model.safetensors").text
    assert raw.startswith("version https://git-lfs.github.com/spec/v1\noid sha256:")


def test_a_referenced_file_that_changed_is_refused_and_never_sent_under_its_old_hash(api, folder, server, lora):
    place = folder / "dogs/dogs.safetensors"
    before = place.read_bytes()
    place.write_bytes(lora(3).read_bytes())
    try:
        answer = httpx2.get(f"{api.endpoint}/me/dogs/resolve/main/dogs.safetensors")
        assert answer.status_code == 400
        assert "has changed" in answer.headers["x-error-message"]
    finally:
        place.write_bytes(before)


def test_the_hf_command_downloads(api, tmp_path):
    hf = [
        sys.executable,
        "-m",
        "huggingface_hub.cli.hf",
        "download",
        "me/cats",
        "README.md",
        "--local-dir",
        str(tmp_path),
    ]
    subprocess.run([*hf, "--local-dir", str(tmp_path)], check=True, capture_output=True)
    assert (tmp_path / "README.md").read_text("utf-8") == CARD
