"""What an attacker tries against a real server process, and that it is refused."""

import base64
import gzip
import json
import socket
import time
from urllib.parse import urlsplit

import httpx2
import pytest

CUT = "cut off"


def raw(server, data, seconds=5.0):
    """What the server says to these bytes, until it closes or is silent."""
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=seconds) as connection:
        said = b""
        try:
            connection.sendall(data)
            while more := connection.recv(65536):
                said += more
        except TimeoutError:
            pass
        except (ConnectionResetError, BrokenPipeError):  # refused while we were still sending
            return said.decode("latin-1") or CUT
    return said.decode("latin-1")


@pytest.fixture(scope="module")
def web(server):
    with httpx2.Client(base_url=server.url) as client:
        yield client


def ask(guarded, token=None, method="GET", path="/api/v1/models", **kwargs):
    headers = {**({"Authorization": f"Bearer {token}"} if token else {}), **kwargs.pop("headers", {})}
    return httpx2.request(method, guarded.url + path, headers=headers, **kwargs)


# ---- pages of other sites ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "localhost.evil.example"]
)
def test_a_name_that_was_pointed_at_this_machine_is_refused(web, host):
    answer = web.get("/api/v1/models", headers={"Host": host})
    assert answer.status_code == 421
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1", "127.9.9.9", "[::1]:8765"])
def test_names_of_loopback_are_ours(web, host):
    assert web.get("/api/v1/models", headers={"Host": host}).status_code == 200


def test_a_named_hub_is_called_by_its_name_only(guarded, tokens):
    assert ask(guarded, tokens["read"], headers={"Host": "hub.example"}).status_code == 200
    assert ask(guarded, tokens["read"], headers={"Host": "other.example"}).status_code == 421


def test_an_open_hub_answers_nobody_through_a_proxy(web):
    assert web.get("/api/v1/models", headers={"X-Forwarded-For": "203.0.113.9"}).status_code == 403


FOREIGN = [
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost:3000"},
]


@pytest.mark.parametrize("headers", FOREIGN)
@pytest.mark.parametrize("path", ["/api/v1/models/remove", "/signin", "/api/repos/create"])
def test_a_page_of_another_site_changes_nothing(web, headers, path):
    answer = web.post(path, headers=headers, json={"models": ["x"]})
    assert answer.status_code == 403
    assert "another site" in answer.text


def test_a_page_of_another_site_cannot_use_a_cookie(guarded, tokens):
    cookie = {"Cookie": f"modelgrove_token={tokens['admin']}"}
    same = {"Sec-Fetch-Site": "same-origin", **cookie}
    body = {"json": {"models": ["no/such"]}, "method": "POST", "path": "/api/v1/models/remove"}
    assert ask(guarded, headers=same, **body).status_code == 404
    for headers in FOREIGN:
        assert ask(guarded, headers={**headers, **cookie}, **body).status_code == 403


def test_programs_and_our_own_pages_may(web):
    origin = str(web.base_url).rstrip("/")
    for headers in ({}, {"Origin": origin}, {"Sec-Fetch-Site": "same-origin"}, {"Authorization": "Bearer x"}):
        answer = web.post("/api/v1/models/remove", headers=headers, json={"models": ["no/such"]})
        assert answer.status_code == (401 if "Authorization" in headers else 404)


def test_other_sites_may_link_to_us_and_embed_nothing(web):
    visit = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert web.get("/", headers=visit).status_code == 200
    for mode, dest in (("navigate", "iframe"), ("no-cors", "image"), ("no-cors", "script"), ("cors", "empty")):
        headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest}
        assert web.get("/api/v1/models", headers=headers).status_code == 403


def test_no_other_site_is_let_in_by_cors(web):
    answer = web.options(
        "/api/v1/models", headers={"Origin": "https://a.example", "Access-Control-Request-Method": "GET"}
    )
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "path", ["/", "/api/v1/models", "/api/v1/nothing", "/healthz", "/models/no/such", "/static/style.css"]
)
def test_every_answer_says_what_a_browser_may_make_of_it(web, path):
    headers = web.get(path, headers={"Accept": "text/html"}).headers
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "server" not in headers


# ---- bodies, headers, connections --------------------------------------------------------------


def test_a_large_body_is_refused_before_it_comes(web):
    said = raw_post(web, "Content-Length: 5000000\r\n", b"")
    assert said.startswith("HTTP/1.1 413")


def raw_post(web, headers, body, seconds=5.0):
    url = str(web.base_url)
    head = f"POST /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}\r\n"
    return raw(type("Where", (), {"url": url}), head.encode() + body, seconds)


def test_a_large_body_without_a_length_is_refused_on_its_way(web):
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    said = raw_post(web, "Transfer-Encoding: chunked\r\n", chunk * 5)
    assert said.startswith(("HTTP/1.1 413", CUT))


def test_a_large_form_is_refused(web):
    assert web.post("/signin", data={"token": "x" * (5 << 20)}).status_code == 413


@pytest.mark.parametrize("packing", ["gzip", "br", "deflate, gzip", "x-unknown"])
def test_a_packed_body_is_never_unpacked(web, packing):
    bomb = gzip.compress(b"0" * (1 << 20))
    headers = {"Content-Encoding": packing, "Content-Type": "application/json"}
    for path in ("/api/v1/jobs", "/api/repos/create", "/api/models/a/b/commit/main"):
        assert web.post(path, content=bomb, headers=headers).status_code == 415


def test_deep_json_is_refused(web):
    for body in (
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"plugin":"x","params":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
    ):
        answer = web.post("/api/v1/jobs", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422)
    assert web.get("/healthz").status_code == 200


def test_large_headers_and_addresses_are_refused(server):
    start = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
    assert raw(server, start + b"X-A: " + b"a" * 66_000).startswith(("HTTP/1.1 431", CUT))
    assert raw(server, b"GET /" + b"a" * 66_000).startswith(("HTTP/1.1 431", CUT))
    many = b"".join(b"X-%d: a\r\n" % number for number in range(60_000))
    assert raw(server, start + many).startswith(("HTTP/1.1 431", CUT))


def test_two_readings_of_one_request_are_refused(server):
    lengths = b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    both = b"POST /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\n" + lengths
    assert raw(server, both, 2).startswith("HTTP/1.1 4")


TRAVERSAL = [
    "../../etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/etc/passwd",
    "..\\..\\etc",
    "a%00b",
    "/etc/passwd",
]


@pytest.mark.parametrize("path", TRAVERSAL)
@pytest.mark.parametrize(
    "route", ["/api/v1/models/{}", "/a/b/resolve/main/{}", "/static/{}", "/jobs/abcd/files/{}", "/models/{}",
              "/api/models/a/b/tree/main/{}", "/api/v1/jobs/{}", "/api/v1/plugins/{}", "/api/lfs/{}"]
)  # fmt: skip
def test_no_path_leaves_the_hub(server, route, path):
    said = raw(server, f"GET {route.format(path)} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert said.startswith(("HTTP/1.1 4", "HTTP/1.1 307"))
    assert "root:" not in said


@pytest.mark.parametrize(
    "path", ["../escape.json", "a/../../b", "/etc/x", "a\x00b", ".git/config", "a\r\nSet-Cookie: x=1"]
)
def test_no_file_is_uploaded_under_a_name_that_leaves_its_model(server, web, path):
    made = web.post("/api/repos/create", json={"name": "odd", "organization": "a", "type": "model"})
    assert made.status_code in (200, 409)
    content = base64.b64encode(b"x").decode()
    lines = [
        {"key": "header", "value": {"summary": "x"}},
        {"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}},
    ]
    answer = web.post(
        "/api/models/a/odd/commit/main", content="\n".join(map(json.dumps, lines)),
        headers={"Content-Type": "application/x-ndjson"},
    )  # fmt: skip
    assert 400 <= answer.status_code < 500
    assert not list(server.home.parent.rglob("escape.json"))
    assert "set-cookie" not in answer.headers


def test_a_files_name_writes_no_header_and_its_content_is_no_page(web):
    web.post("/api/repos/create", json={"name": "page", "organization": "a", "type": "model"})
    name = 'x";\u00e9 filename=evil.html'
    content = base64.b64encode(b"<script>alert(1)</script>").decode()
    lines = [
        {"key": "header", "value": {"summary": "x"}},
        {"key": "file", "value": {"path": name, "content": content, "encoding": "base64"}},
    ]
    body = "\n".join(map(json.dumps, lines))
    made = web.post("/api/models/a/page/commit/main", content=body, headers={"Content-Type": "application/x-ndjson"})
    assert made.status_code == 200
    answer = web.get(f"/a/page/resolve/main/{name}")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment")
    assert "sandbox" in answer.headers["content-security-policy"]
    page = web.get("/models/a/page/files", headers={"Accept": "text/html"})
    assert "<script>alert" not in page.text


# ---- tokens ------------------------------------------------------------------------------------


def test_without_a_token_nothing_is_said_but_that_the_server_lives(guarded):
    for path in (
        "/api/v1/models",
        "/api/v1/jobs/events",
        "/metrics",
        "/api/v1/events",
        "/api/models",
        "/a/b/resolve/main/c",
    ):
        answer = ask(guarded, path=path)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    assert ask(guarded, path="/healthz").status_code == 200
    assert set(ask(guarded, path="/readyz").json()) == {"database", "store", "broker"}


def test_scopes_hold(guarded, tokens):
    work = {"method": "POST", "path": "/api/v1/models/remove", "json": {"models": ["no/such"]}}
    assert [ask(guarded, tokens[scope], **work).status_code for scope in ("read", "write", "admin")] == [403, 404, 404]
    assert [ask(guarded, tokens[s], path="/api/v1/tokens").status_code for s in ("read", "write", "admin")] == [
        403,
        403,
        200,
    ]
    assert ask(guarded, tokens["read"], path="/metrics").status_code == 200


def test_guessing_tokens_is_slowed_down_and_a_good_token_still_works(guarded, tokens):
    answers = [ask(guarded, f"modelgrove_{number:064x}") for number in range(40)]
    assert {answer.status_code for answer in answers} == {401, 429}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)
    assert answers[-1].status_code == 429
    assert ask(guarded, tokens["read"]).status_code == 200
    signed_in = httpx2.post(guarded.url + "/signin", data={"token": "wrong", "next": "/"})
    assert signed_in.status_code == 429


def test_a_revoked_token_is_good_no_more(guarded):
    token = guarded.run("token", "create", "leaver").strip()
    assert ask(guarded, token).status_code == 200
    guarded.run("token", "revoke", "leaver")
    assert ask(guarded, token).status_code in (401, 429)


def test_no_secret_is_in_the_log(guarded, tokens):
    ask(guarded, path=f"/api/v1/models?token={tokens['read']}")
    ask(guarded, headers={"Cookie": f"modelgrove_token={tokens['write']}"})
    ask(guarded, method="PUT", path=f"/api/lfs/{tokens['admin']}.123.abc", content=b"x")
    ask(guarded, "modelgrove_" + "5" * 64)
    deadline = time.monotonic() + 10
    while "/api/lfs/" not in guarded.log.read_text():
        assert time.monotonic() < deadline
    log = guarded.log.read_text()
    assert "write GET /api/v1/models 200" in log
    for secret in (*tokens.values(), "5" * 64, "?"):
        assert secret not in log
