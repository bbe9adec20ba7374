"""Private models and rights: who has no token finds nothing, and the client says so in its own errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError


@pytest.fixture
def apis(guarded, tokens):
    """The client with each token."""
    return {scope: HfApi(endpoint=guarded.url, token=token) for scope, token in tokens.items()}


def test_a_hub_that_demands_tokens_tells_who_the_caller_is(guarded, apis):
    assert apis["write"].whoami()["name"] == "write"
    assert apis["write"].whoami()["auth"]["accessToken"]["role"] == "write"
    assert apis["read"].get_full_repo_name("x") == "read/x"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=guarded.url, token="hf_nobody").whoami()


def test_a_token_that_may_only_read_writes_nothing(apis):
    apis["write"].create_repo("me/x", exist_ok=True)
    for attempt in (
        lambda api: api.create_repo("me/y"),
        lambda api: api.upload_file(path_or_fileobj=b"1", path_in_repo="1.txt", repo_id="me/x"),
        lambda api: api.create_tag("me/x", tag="v1"),
        lambda api: api.delete_repo("me/x"),
        lambda api: api.duplicate_repo("me/x", "me/z"),
    ):
        with pytest.raises(HfHubHTTPError, match="403"):
            attempt(apis["read"])
    assert apis["read"].list_repo_files("me/x") == [".gitattributes"]


def test_a_private_model_is_for_those_with_a_token(server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    token = server.run("token", "create", "someone", "--scope", "write").strip()
    known, anybody = (HfApi(endpoint=server.url, token=given) for given in (token, False))
    known.create_repo("me/secret", private=True)
    known.upload_file(path_or_fileobj=b"secret", path_in_repo="a.txt", repo_id="me/secret")

    assert known.model_info("me/secret").private
    assert [one.id for one in known.list_models()] == ["me/secret"]
    file = hf_hub_download("me/secret", "a.txt", endpoint=server.url, token=token, cache_dir=tmp_path)
    assert Path(file).read_text("utf-8") == "secret"
    assert list(anybody.list_models()) == []
    for attempt in (
        lambda: anybody.model_info("me/secret"),
        lambda: hf_hub_download("me/secret", "a.txt", endpoint=server.url, token=False, cache_dir=tmp_path / "b"),
        lambda: anybody.upload_file(path_or_fileobj=b"1", path_in_repo="1.txt", repo_id="me/secret"),
        lambda: anybody.duplicate_repo("me/secret", "me/mine"),
        lambda: anybody.delete_repo("me/secret"),
    ):
        with pytest.raises(RepositoryNotFoundError):
            attempt()
    copied = known.duplicate_repo("me/secret", "me/copy")
    assert known.model_info(copied.repo_id).private
