"""Lists: what the real client filters by, and that one model whose files went does not take the others along."""

from __future__ import annotations

import httpx2
import pytest
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import BadRequestError, RemoteEntryNotFoundError, RepositoryNotFoundError

CARD = """---
license: mit
base_model: me/base
datasets: [me/pictures]
language: [en, de]
pipeline_tag: image-to-image
library_name: peft
tags: [cats]
---
# Cats
"""


@pytest.fixture(scope="module", autouse=True)
def models(server, api, lora, tmp_path_factory):
    """An adapter with a full card, one whose card has no fields, and a repository without weights."""
    top = tmp_path_factory.mktemp("models") / "me"
    for seed, name in enumerate(("cats", "dogs")):
        (top / name).mkdir(parents=True)
        (top / name / "model.safetensors").write_bytes(lora(seed).read_bytes())
    (top / "cats/README.md").write_text(CARD, "utf-8")
    (top / "dogs/README.md").write_text("# Dogs\n", "utf-8")
    server.run("ingest", str(top.parent))
    api.create_repo("you/empty")
    return top


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({"pipeline_tag": "image-to-image"}, ["me/cats"]),
        ({"pipeline_tag": "text-generation"}, []),
        ({"trained_dataset": "me/pictures"}, ["me/cats"]),
        ({"filter": "dataset:me/other"}, []),
        ({"filter": ["en", "de", "peft"]}, ["me/cats"]),
        ({"filter": "diffusers"}, ["me/dogs"]),
        ({"filter": "safetensors"}, ["me/dogs", "me/cats"]),
        ({"filter": "license:MIT"}, ["me/cats"]),
        ({"filter": "base_model:adapter:me/base"}, ["me/cats"]),
        ({"filter": "adapter", "limit": 1}, ["me/dogs"]),
        ({"num_parameters": "min:500,max:1K"}, ["me/dogs", "me/cats"]),
        ({"num_parameters": "min:1B"}, []),
        ({"gated": True}, []),
        ({"gated": False, "author": "me"}, ["me/dogs", "me/cats"]),
        ({"inference": "warm"}, []),
        ({"inference_provider": "all"}, []),
        ({"apps": "vllm"}, []),
        ({"sort": "last_modified"}, ["you/empty", "me/dogs", "me/cats"]),
    ],
    ids=str,
)
def test_models_are_chosen_by_what_lists_say_of_them(api, asked, names):
    assert [one.id for one in api.list_models(**asked)] == names


def test_a_bound_that_is_none_is_refused(api):
    with pytest.raises(BadRequestError, match="num_parameters is like"):
        list(api.list_models(num_parameters="many"))


def test_every_page_of_a_filtered_list_follows_the_one_before(api):
    pages = [httpx2.get(f"{api.endpoint}/api/models", params={"filter": "adapter", "limit": 1})]
    while "next" in pages[-1].links:
        pages.append(httpx2.get(pages[-1].links["next"]["url"]))
    assert [one["id"] for page in pages for one in page.json()] == ["me/dogs", "me/cats"]
    assert len(pages) == 2


def test_what_is_expanded_is_all_that_comes(api):
    info = api.model_info("me/cats", expand=["sha", "cardData", "usedStorage"])
    assert info.sha == api.model_info("me/cats").sha
    assert info.card_data.datasets == ["me/pictures"]
    assert (info.tags, info.siblings) == (None, None)
    (listed,) = api.list_models(search="cats", expand=["safetensors"])
    assert (listed.safetensors.total, listed.sha) == (513, None)


def test_a_file_that_went_spoils_no_list(api, models):
    for path in ("cats/README.md", "cats/model.safetensors"):
        place = models / path
        place.rename(place.with_suffix(".away"))
    try:
        assert [one.id for one in api.list_models(author="me", full=True)] == ["me/dogs", "me/cats"]
        assert api.model_info("me/cats").safetensors is None
    finally:
        for path in ("cats/README.md", "cats/model.safetensors"):
            (models / path).with_suffix(".away").rename(models / path)
    assert api.model_info("me/cats").safetensors.total == 513


def test_names_without_an_owner_are_nothing_here(api):
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("gpt2")
    with pytest.raises((RepositoryNotFoundError, RemoteEntryNotFoundError)):
        hf_hub_download("gpt2", "config.json")


def test_what_nobody_did_is_empty(api):
    assert list(api.list_repo_likers("me/cats")) == []
    assert list(api.get_repo_discussions("me/cats")) == []
    (large,) = api.list_lfs_files("me/cats")
    assert large.filename == "model.safetensors"
    with pytest.raises(RepositoryNotFoundError):
        list(api.list_repo_likers("me/nobody"))


def test_storage_of_all_models(api):
    found = {one.id: one for one in api.list_user_repos()}
    assert found.keys() == {"me/cats", "me/dogs", "you/empty"}
    held = (entry.size for entry in api.list_repo_tree("me/dogs", recursive=True))
    assert found["me/dogs"].storage == sum(held)
    assert {one.id for one in api.list_user_repos(namespace="you")} == {"you/empty"}


def test_a_repository_is_duplicated(api):
    api.duplicate_repo("me/cats", "me/copy")
    assert set(api.list_repo_files("me/cats")) <= set(api.list_repo_files("me/copy"))
    assert api.model_info("me/copy").card_data.datasets == ["me/pictures"]
    api.duplicate_repo("me/cats", "me/copy", exist_ok=True)
    with pytest.raises(RepositoryNotFoundError):
        api.duplicate_repo("me/nobody", "me/other")
    api.delete_repo("me/copy")


def test_other_kinds_of_repositories_are_none(api):
    assert list(api.list_datasets()) == list(api.list_spaces()) == []
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("me/cats", "data.csv", repo_type="dataset")
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info("me/cats")


@pytest.mark.parametrize("asked", ["limit=many", "cursor=-1", "cursor=99999999999999999999", "full=perhaps"])
def test_what_is_no_number_is_refused_with_its_name(api, asked):
    answer = httpx2.get(f"{api.endpoint}/api/models?{asked}")
    assert answer.status_code == 400
    assert asked.partition("=")[0] in answer.headers["x-error-message"]


def test_paths_are_asked_for_in_a_form_or_in_json(api):
    url = f"{api.endpoint}/api/models/me/cats/paths-info/main"
    asked = {"paths": ["README.md", "nothing"], "expand": True}
    for answer in (httpx2.post(url, json=asked), httpx2.post(url, data=asked)):
        assert [(one["path"], "lastCommit" in one) for one in answer.json()] == [("README.md", True)]
    for wrong in ([], {}, {"paths": [1]}, {"paths": 1}):
        assert httpx2.post(url, json=wrong).status_code == 400


def test_the_sha_of_a_list_is_that_of_main(api):
    """Also where a newer commit of another branch has the same content."""
    before = api.model_info("you/empty").sha
    api.create_branch("you/empty", branch="apart")
    api.upload_file(path_or_fileobj=b"1", path_in_repo="1.txt", repo_id="you/empty", revision="apart")
    api.delete_file("1.txt", "you/empty", revision="apart")
    (listed,) = api.list_models(author="you")
    assert listed.sha == before == api.model_info("you/empty").sha
