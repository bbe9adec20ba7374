"""Hugging Face, or any hub that speaks its API, such as another modelgrove."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple
from urllib.parse import unquote, urlsplit

from modelgrove_hub.addresses import check_url, public_addresses
from modelgrove_hub.contracts import API, Context, Kind
from modelgrove_hub.errors import DataError, StorageError, UsageError
from modelgrove_hub.ingest.offers import Offer, SourceParams
from modelgrove_hub.settings import settings

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

_SCHEMES = {"hf": "", "hf+http": "http", "hf+https": "https"}
_GONE = (401, 403, 404, 410, 451)
"""Answers that trying again does not change."""


class _Wanted(NamedTuple):
    endpoint: str
    """Empty for what HF_ENDPOINT says."""
    what: str
    """"author", "model", "collection" or "search"."""
    which: str
    revision: str | None


class HuggingFace:
    """Offers the models of an author, a collection or a search, or a single one, each pinned to its commit."""

    name = "huggingface"
    kind: ClassVar[Kind] = Kind.SOURCE
    api = API
    summary = "Models of a Hugging Face hub: hf://AUTHOR, hf://OWNER/NAME, hf://collections/…, hf://search/WORDS."
    paper = ""

    class Params(SourceParams):
        """As every source has them."""

    def offers(self, context: Context, params: Params) -> Iterator[Offer]:  # noqa: ARG002
        """What the hub lists, pinned to the commit that it has now."""
        wanted = _read(params.url)
        api = _api(wanted, params)
        with _errors(params.url):
            for info in _list(api, wanted):
                # Not every listing tells the commit.
                known = info if info.sha else api.model_info(info.id)
                licence = next((tag[8:] for tag in known.tags or () if tag.startswith("license:")), None)
                yield Offer(known.id, known.sha or "", known.id, licence=licence, details={"revision": known.sha})

    def fetch(self, context: Context, offer: Offer, params: Params, folder: Path) -> Path:  # noqa: ARG002
        """Download the commit; what an earlier attempt brought is not asked for again."""
        from huggingface_hub import snapshot_download

        api, revision = _api(_read(params.url), params), str(offer.details["revision"])
        with _errors(offer.key):
            if params.max_bytes:
                files = api.model_info(offer.key, revision=revision, files_metadata=True).siblings or ()
                if (size := sum(file.size or 0 for file in files)) > params.max_bytes:
                    raise DataError(f"{size} bytes, which is left out by max_bytes")
            snapshot_download(
                offer.key, revision=revision, local_dir=folder, endpoint=api.endpoint, token=api.token, max_workers=2
            )
        return folder


def _read(url: str) -> _Wanted:
    parts = urlsplit(url)
    scheme = _SCHEMES.get(parts.scheme)
    if scheme is None:
        raise UsageError(f"{url}: write hf://AUTHOR, hf://OWNER/NAME, or hf+https://HOST/AUTHOR for another hub")
    endpoint = f"{scheme}://{parts.netloc}" if scheme else ""
    path = unquote(parts.path if scheme else f"{parts.netloc}{parts.path}").strip("/")
    path, _, revision = path.partition("@")
    first, _, rest = path.partition("/")
    if first == "search" and rest:
        return _Wanted(endpoint, "search", rest, None)
    if first == "collections" and "/" in rest:
        return _Wanted(endpoint, "collection", rest, None)
    if path and path.count("/") <= 1 and first not in ("search", "collections"):
        return _Wanted(endpoint, "model" if rest else "author", path, revision or None)
    raise UsageError(f"{url}: names no author, model, collection or search")


def _api(wanted: _Wanted, params: SourceParams) -> HfApi:
    from huggingface_hub import HfApi

    if wanted.endpoint and not params.local:
        private = settings().private_sources
        public_addresses(*check_url(wanted.endpoint, private=private), private=private)
    secret = settings().hf_token.get_secret_value()
    # A token is for the hub that gave it: never the one that a login left on this machine.
    return HfApi(endpoint=wanted.endpoint or None, token=secret or False)


def _list(api: HfApi, wanted: _Wanted) -> Iterator[ModelInfo]:
    if wanted.what == "model":
        yield api.model_info(wanted.which, revision=wanted.revision)
    elif wanted.what == "author":
        yield from api.list_models(author=wanted.which, full=True, sort="last_modified")
    elif wanted.what == "search":
        yield from api.list_models(search=wanted.which, full=True, sort="last_modified")
    else:
        for item in api.get_collection(wanted.which).items:
            if item.item_type == "model":
                yield api.model_info(item.item_id)


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """What the client raises, as our own: refused for good, or to be tried again."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        message = f"{what}: {' '.join(str(error).split())[:300]}"
        raise (DataError if status in _GONE else StorageError)(message) from error
    except (HTTPError, LocalEntryNotFoundError, OSError) as error:
        raise StorageError(f"{what}: {' '.join(str(error).split())[:300]}") from error
