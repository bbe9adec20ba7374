"""What the real client writes: repositories, files by every way there is, commits, branches and tags."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, constants
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from sqlmodel import select

from modelgrove_hub.registry.models import find, find_revision, latest_revision
from modelgrove_hub.tables import Event


@pytest.fixture
def repo(api, request):
    """A repository of the test's own."""
    name = f"me/{request.function.__name__[5:60]}-{uuid4().hex[:6]}"
    return str(api.create_repo(name).repo_id)


@pytest.fixture(params=["xet", "lfs", "parts"])
def way(request, patched):
    """Every way by which clients send large files: as they do by default, without `hf_xet`, and in parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_DISABLE_XET", request.param != "xet")
        yield request.param


def test_a_new_repository_is_there_once(api, repo):
    assert api.list_repo_files(repo) == [".gitattributes"]
    assert api.create_repo(repo, exist_ok=True).repo_id == repo
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(repo)
    api.delete_repo(repo)
    assert not api.repo_exists(repo)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(repo)


def test_a_file_goes_up_and_comes_back_and_is_recognised(api, repo, lora, way, server, tmp_path):
    file = lora(11 + ["xet", "lfs", "parts"].index(way))
    made = api.upload_file(path_or_fileobj=file, path_in_repo="model.safetensors", repo_id=repo)

    back = api.hf_hub_download(repo, "model.safetensors", revision=made.oid)
    assert Path(back).read_bytes() == file.read_bytes()
    with server.hub.reading() as session:
        model = find(session, repo)
        revision = latest_revision(session, model)
        assert (model.kind, model.adapter_type) == ("adapter", "lora")
        assert revision.values_hash
        registered = session.exec(select(Event).where(Event.subject == repo, Event.action == "registered")).all()
        assert registered[-1].detail["revision"] == revision.digest


def test_a_large_file_goes_up_in_parts(api, repo, tmp_path, server, monkeypatch):
    from modelgrove_hub.api.hf import lfs

    size = lfs.LARGEST_PART + 4096
    file = tmp_path / "large.bin"
    with file.open("wb") as out:
        out.write(os.urandom(4096))
        out.truncate(size)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    api.upload_file(path_or_fileobj=file, path_in_repo="large.bin", repo_id=repo)
    info = api.get_paths_info(repo, "large.bin")[0]
    assert info.lfs.size == size
    assert not list((server.home / "incoming").glob("parts-*"))


def test_a_folder_goes_up_with_what_is_ignored_left_out_and_old_files_deleted(api, repo, lora, way, tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/one.safetensors").write_bytes(lora(21).read_bytes())
    (tmp_path / "notes.tmp").write_text("not for you")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".gitignore").write_text("*.tmp\n")
    api.upload_file(path_or_fileobj=b"old", path_in_repo="old.txt", repo_id=repo)
    api.upload_folder(folder_path=tmp_path, repo_id=repo, delete_patterns="*.txt")
    expected = [".gitattributes", ".gitignore", "a/b/one.safetensors", "empty.txt"]
    assert sorted(api.list_repo_files(repo)) == expected
    api.upload_folder(folder_path=tmp_path, repo_id=repo)
    assert len(api.list_repo_commits(repo)) == 3  # nothing had changed


def test_files_and_folders_are_deleted_and_copied(api, repo):
    api.create_commit(
        repo, [CommitOperationAdd(f"in/{name}.txt", name.encode()) for name in "abc"], commit_message="three"
    )
    copy = CommitOperationCopy("in/a.txt", "out/a.txt")
    api.create_commit(repo, [copy, CommitOperationDelete("in/b.txt")], commit_message="move")
    assert sorted(api.list_repo_files(repo)) == [".gitattributes", "in/a.txt", "in/c.txt", "out/a.txt"]
    api.delete_folder("in", repo)
    assert sorted(api.list_repo_files(repo)) == [".gitattributes", "out/a.txt"]
    with pytest.raises(HfHubHTTPError):
        api.delete_file("in/a.txt", repo)


def test_a_branch_is_apart_from_main_and_a_tag_stays(api, repo, server, lora):
    api.upload_file(path_or_fileobj=lora(31), path_in_repo="model.safetensors", repo_id=repo)
    api.create_branch(repo, branch="dev")
    api.create_tag(repo, tag="v1")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(repo, branch="dev")
    api.create_branch(repo, branch="dev", exist_ok=True)
    api.upload_file(path_or_fileobj=lora(32), path_in_repo="model.safetensors", repo_id=repo, revision="dev")
    api.upload_file(path_or_fileobj=b"# New\n", path_in_repo="README.md", repo_id=repo)

    def held(revision):
        return {one.path: one.lfs and one.lfs.sha256 for one in api.list_repo_tree(repo, revision=revision)}

    assert held("main")["model.safetensors"] == held("v1")["model.safetensors"] != held("dev")["model.safetensors"]
    assert "README.md" not in held("v1")
    with server.hub.reading() as session:
        assert find_revision(session, f"{repo}@dev").id != latest_revision(session, find(session, repo)).id
    api.delete_branch(repo, branch="dev")
    api.delete_tag(repo, tag="v1")
    refs = api.list_repo_refs(repo)
    assert ([one.name for one in refs.branches], refs.tags) == (["main"], [])


def test_history_can_be_squashed(api, repo):
    for number in range(3):
        api.upload_file(path_or_fileobj=bytes([number]), path_in_repo="n.txt", repo_id=repo)
    assert len(api.list_repo_commits(repo)) == 4
    api.super_squash_history(repo, commit_message="all of it")
    assert [one.title for one in api.list_repo_commits(repo)] == ["all of it"]


def test_a_commit_on_an_older_parent_is_refused_and_commits_at_once_are_all_kept(api, repo):
    first = api.list_repo_commits(repo)[0].commit_id
    api.upload_file(path_or_fileobj=b"1", path_in_repo="1.txt", repo_id=repo)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(path_or_fileobj=b"2", path_in_repo="2.txt", repo_id=repo, parent_commit=first)

    def commit(number):
        return api.upload_file(path_or_fileobj=b"x", path_in_repo=f"at-once-{number}.txt", repo_id=repo).oid

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(commit, range(4)))) == 4
    assert {f"at-once-{number}.txt" for number in range(4)} <= set(api.list_repo_files(repo))


@pytest.mark.parametrize("path", ["broken.safetensors", "sub/broken.safetensors"])
def test_a_broken_file_is_refused_by_name_and_nothing_changes(api, repo, path):
    before = api.model_info(repo).sha
    with pytest.raises(BadRequestError, match="too short for a safetensors file"):
        api.upload_file(path_or_fileobj=b"garbage", path_in_repo=path, repo_id=repo)
    assert api.model_info(repo).sha == before


def test_a_pickle_is_kept_apart(api, repo, server, pickled_bomb):
    api.upload_file(path_or_fileobj=pickled_bomb, path_in_repo="model.ckpt", repo_id=repo)
    status = api.model_info(repo, securityStatus=True)
    assert status.security_repo_status["filesWithIssues"] == [{"path": "model.ckpt", "level": "unsafe"}]
    with server.hub.reading() as session:
        assert find(session, repo).trust == "quarantined"


@pytest.fixture
def pickled_bomb():
    import pickle

    class Bomb:
        def __reduce__(self):
            return os.system, ("touch /tmp/modelgrove-was-here",)

    return pickle.dumps(Bomb())


def test_the_card_of_a_model_is_its_readme(api, repo, server, lora):
    def push_card(text):
        api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=repo)

    api.upload_file(path_or_fileobj=lora(41), path_in_repo="model.safetensors", repo_id=repo)
    push_card("---\nlicense: mit\ntags: [one]\n---\n# First\n")
    push_card("---\nlicense: apache-2.0\ntags: [two]\n---\n# Second\n")
    with server.hub.reading() as session:
        model = find(session, repo)
        assert (model.licence, model.tags, model.card) == ("apache-2.0", ["two"], "# Second")
    with server.hub.transaction() as session:
        find(session, repo).licence = "cc0-1.0"  # a person knows better
    push_card("---\nlicense: mit\n---\n# Third\n")
    with server.hub.reading() as session:
        model = find(session, repo)
        assert (model.licence, model.tags, model.card) == ("cc0-1.0", [], "# Third")


def test_settings_and_names_change(api, repo):
    api.move_repo(repo, f"{repo}-moved")
    assert api.repo_exists(f"{repo}-moved")
    assert not api.repo_exists(repo)
    with pytest.raises(BadRequestError, match="gated"):
        api.update_repo_settings(f"{repo}-moved", gated="auto")
    api.update_repo_settings(f"{repo}-moved", visibility="private")
    assert not api.repo_exists(f"{repo}-moved")  # nobody without a token sees it
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(f"{repo}-moved")


def test_the_hf_command_uploads(api, repo, lora):
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", "upload", repo, str(lora(51)), "up.safetensors"]
    subprocess.run(command, check=True, capture_output=True)
    assert "up.safetensors" in api.list_repo_files(repo)


def test_what_is_not_there_is_not_deleted(api, repo):
    with pytest.raises(RemoteEntryNotFoundError, match="to delete"):
        api.delete_file("none.txt", repo)


def test_a_commit_copies_by_name(api, repo):
    """The JavaScript client asks for it so; ours sends the hash."""
    api.upload_file(path_or_fileobj=b"1", path_in_repo="1.txt", repo_id=repo)
    url = f"{api.endpoint}/api/models/{repo}/commit/main"

    def commit(value, **header):
        items = [("header", {"summary": "copied", **header}), ("copyFile", value)]
        lines = (json.dumps({"key": key, "value": item}) for key, item in items)
        return httpx2.post(url, content="\n".join(lines)).status_code

    assert commit({"path": "2.txt", "srcPath": "1.txt"}) == 200
    assert {"1.txt", "2.txt"} <= set(api.list_repo_files(repo))
    assert commit({"path": "3.txt", "srcPath": "none.txt"}) == 404
    assert commit({"path": "3.txt", "srcPath": "1.txt", "srcRevision": "none"}) == 404
    assert commit({"path": "3.txt", "srcPath": "1.txt"}, parentCommit=5) == 400
