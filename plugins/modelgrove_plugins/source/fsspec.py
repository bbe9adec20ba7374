"""File systems that fsspec knows (s3://, gs://, …), and web servers: a file, or a page that lists some."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar
from urllib.parse import unquote, urljoin, urlsplit

from modelgrove_hub.addresses import check_url, public_addresses
from modelgrove_hub.contracts import API, Context, Kind
from modelgrove_hub.errors import DataError, StorageError, UsageError
from modelgrove_hub.ingest.discover import WEIGHT_SUFFIXES
from modelgrove_hub.ingest.offers import Offer, SourceParams
from modelgrove_hub.settings import settings

_WEB = ("http", "https")
_STORES = ("s3", "gs", "gcs", "az", "abfs")
"""Where the host is the provider's, whatever the address says."""
_MAX_PAGE = 8 << 20
_CHUNK = 1 << 20
_SECONDS = 60.0
_RANGE = re.compile(r"bytes (\d+)-")


class Remote:
    """Offers every weight file below an address as a model of its own."""

    name = "fsspec"
    kind: ClassVar[Kind] = Kind.SOURCE
    api = API
    summary = "Weight files on s3://, gs:// and what else fsspec knows, and on web pages that list them."
    paper = ""

    class Params(SourceParams):
        """As every source has them."""

    def offers(self, context: Context, params: Params) -> Iterator[Offer]:  # noqa: ARG002
        """The weight files that are listed; folders of a web server are not entered."""
        yield from _pages(params) if urlsplit(params.url).scheme in _WEB else _files(params)

    def fetch(self, context: Context, offer: Offer, params: Params, folder: Path) -> Path:
        """Copy the file; what an earlier attempt brought from a web server is not asked for again."""
        target = folder / PurePosixPath(offer.key).name
        address = str(offer.details["address"])
        if urlsplit(address).scheme in _WEB:
            _download(context, address, offer, target, params)
            return target
        with _errors(address):
            system, path = _system(address, params)
            with system.open(path, "rb") as there, target.open("wb") as here:
                shutil.copyfileobj(there, here, _CHUNK)
        return target


# ---- file systems ---------------------------------------------------------------------------


def _files(params: SourceParams) -> Iterator[Offer]:
    url = params.url
    with _errors(url):
        system, top = _system(url, params)
        found = system.find(top, detail=True) if system.isdir(top) else {top: system.info(top)}
        if not found and not system.exists(top):
            raise StorageError(f"{url}: there is nothing")
        for path, facts in sorted(found.items()):
            place = PurePosixPath(path)
            if place.suffix not in WEIGHT_SUFFIXES:
                continue
            key = path.removeprefix(top).strip("/") or place.name
            told = {name: str(facts.get(name)) for name in ("ETag", "etag", "mtime", "LastModified", "created", "size")}
            stamp = sha256(repr(sorted(told.items())).encode()).hexdigest()[:32]
            details = {"address": system.unstrip_protocol(path)}
            yield Offer(key, stamp, _named(key), int(facts.get("size") or 0), details=details)


def _system(url: str, params: SourceParams) -> tuple[Any, str]:
    import fsspec

    if "::" in url:
        raise UsageError(f"{url}: chained addresses are not read")
    if not params.local and urlsplit(url).scheme not in _STORES:
        raise UsageError(f"{url}: over the network only {', '.join(_STORES)}, http and https can be added")
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{url}: {error}") from error
    return system, str(path).rstrip("/")


# ---- web servers ----------------------------------------------------------------------------


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _pages(params: SourceParams) -> Iterator[Offer]:
    url = params.url
    with _errors(url), _client(params) as client:
        if PurePosixPath(urlsplit(url).path).suffix in WEIGHT_SUFFIXES:
            addresses = [url]
        else:
            links = _Links()
            links.feed(_page(client, url))
            joined = {urljoin(url, link).partition("#")[0] for link in links.found}
            addresses = sorted(one for one in joined if one.startswith(url.rpartition("/")[0]))
        for address in addresses:
            key = unquote(PurePosixPath(urlsplit(address).path).name)
            if PurePosixPath(key).suffix not in WEIGHT_SUFFIXES or "/" in key:
                continue
            told = client.head(address).raise_for_status().headers
            size = int(told.get("content-length") or 0)
            facts = [told.get("etag"), told.get("last-modified"), size]
            stamp = sha256(repr(facts).encode()).hexdigest()[:32]
            yield Offer(key, stamp, _named(key), size, details={"address": address, "etag": told.get("etag")})


def _page(client: Any, url: str) -> str:
    with client.stream("GET", url) as answer:
        answer.raise_for_status()
        page = b""
        for chunk in answer.iter_bytes(_CHUNK):
            page += chunk
            if len(page) > _MAX_PAGE:
                raise DataError(f"{url}: a page of more than {_MAX_PAGE >> 20} MiB")
    return page.decode("utf-8", "replace")


def _download(context: Context, address: str, offer: Offer, target: Path, params: SourceParams) -> None:
    limit, part = params.max_bytes, target.with_name(f"{target.name}.part")
    done = part.stat().st_size if part.exists() else 0
    etag = offer.details.get("etag")
    # Without a strong tag nobody can say that the rest belongs to what is here.
    resumed = done and etag and not etag.startswith("W/")
    headers = {"Range": f"bytes={done}-", "If-Range": etag} if resumed else {}
    with _errors(address), _client(params) as client, client.stream("GET", address, headers=headers) as answer:
        answer.raise_for_status()
        goes_on = answer.status_code == 206 and _starts_at(answer.headers.get("content-range", "")) == done
        if answer.status_code == 206 and not goes_on:
            raise StorageError(f"{address}: sent another part than it was asked for")
        with part.open("ab" if goes_on else "wb") as out:
            for chunk in answer.iter_raw(_CHUNK):
                out.write(chunk)
                if limit and out.tell() > limit:
                    raise DataError(f"more than {limit} bytes, which is left out by max_bytes")
                context.progress(0, f"{offer.name}: {out.tell() >> 20} MiB")
    if offer.size and part.stat().st_size != offer.size:
        raise StorageError(f"{address}: {part.stat().st_size} bytes came, {offer.size} were told")
    part.replace(target)


def _starts_at(told: str) -> int:
    found = _RANGE.match(told)
    return int(found[1]) if found else -1


def _client(params: SourceParams) -> Any:
    import httpx2

    def check(request: Any) -> None:
        private = settings().private_sources
        public_addresses(*check_url(str(request.url), private=private), private=private)

    # Redirects too are requests: each is checked before it is sent.
    hooks = {"request": [] if params.local else [check]}
    return httpx2.Client(
        timeout=_SECONDS, follow_redirects=True, event_hooks=hooks, headers={"Accept-Encoding": "identity"}
    )


# ---- both -----------------------------------------------------------------------------------


def _named(key: str) -> str:
    return str(PurePosixPath(key).with_suffix(""))


@contextmanager
def _errors(what: str) -> Iterator[None]:
    from httpx2 import HTTPError, HTTPStatusError

    try:
        yield
    except HTTPStatusError as error:
        status = error.response.status_code
        kind = DataError if status in (401, 403, 404, 410) else StorageError
        raise kind(f"{what}: the server answers {status}") from error
    except (HTTPError, OSError) as error:
        raise StorageError(f"{what}: {type(error).__name__}: {error}") from error
