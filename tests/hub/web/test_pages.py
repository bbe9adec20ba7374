"""Pages over HTTP: all of them answer, forms do what they say, and strangers' strings stay text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import httpx2
import pytest
from sqlmodel import select

from modelgrove_hub.registry.models import add_revision
from modelgrove_hub.tables import Blob, Job, Model, Source
from modelgrove_hub.verbs.tokens import NewToken, create_token

HTML = {"Accept": "text/html,application/xhtml+xml"}
GUITAR = "/m/local/guitar-0008e6a5"
PAGES = (
    "/", "/?q=violin", "/?q=violin&by=weights&licence=mit", "/?kind=adapter&licence=mit", "/atlas", "/jobs", "/sources",
    "/plugins", "/plugins/merger.sum", "/system", "/signin", "/atlas/model?name=local/zoo-base", GUITAR,
    *(f"{GUITAR}/{part}" for part in ("files", "layers", "family", "similar", "jobs", "actions")),
    "/m/local/zoo-base", "/m/local/zoo-base/layers?by=norm", f"{GUITAR}/actions/compressor.rtn",
    f"{GUITAR}/actions/merger.orthogonal", "/m/guitar-0008e6a5",
)  # fmt: skip
EVIL = """<script>alert(1)</script>"><img src=x onerror=alert(2)>{{ 7*7 }}'"""


class _Elements(HTMLParser):
    """Collects what would run or load something that is not the hub's."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.found |= {f"{tag} {name}" for name in given if name.startswith("on") or name == "style"}
        for name in ("src", "href", "action", "formaction"):
            address = given.get(name) or ""
            if not re.match(r"/(?!/)|$", address):
                self.found.add(f"{tag} {name}={address}")
        if tag in ("iframe", "object", "embed", "base", "style") or (tag == "script" and "src" not in given):
            self.found.add(tag)


def found_in(text: str) -> set[str]:
    parser = _Elements()
    parser.feed(text)
    return parser.found - {"a href=#main"}


@pytest.fixture(scope="module")
def client(grove: Any) -> Any:
    with httpx2.Client(base_url=grove.url, headers=HTML, follow_redirects=True, timeout=60) as opened:
        yield opened


@pytest.mark.parametrize("path", PAGES)
def test_every_page_answers_and_has_nothing_inline(client, path):
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert found_in(answer.text) == set()  # which a strict content security policy would refuse
    assert "None" not in re.sub(r"<[^>]*>", "", answer.text)


@pytest.mark.parametrize("path", ["/m/nobody/nothing", "/nowhere", "/jobs/0000", "/plugins/none.none"])
def test_browsers_get_a_page_about_what_went_wrong_and_programs_a_problem(client, path):
    page = client.get(path)
    assert page.status_code == 404
    assert "<h1>Not Found</h1>" in page.text
    problem = client.get(path, headers={"Accept": "application/json"})
    assert problem.headers["content-type"] == "application/problem+json"
    assert client.get(f"/api/v1/models{path}").headers["content-type"] == "application/problem+json"


def test_search_says_why_and_keeps_its_filters_in_the_address(client):
    found = client.get("/?q=a+string+instrument&by=weights").text
    assert "weights say <b>" in found
    assert 'value="weights" checked' in found
    filtered = client.get("/?q=a+string+instrument&licence=mit").text
    assert '<input type="hidden" name="licence" value="mit">' in filtered
    assert "cc-by-4.0</span></p>" not in filtered
    assert client.get("/?q=x&rank=many").text.count("give one, as 16") == 1


def test_newest_models_are_paged(client):
    first = client.get("/").text
    older = re.search(r'href="(/\?after=\d+)">Older', first)
    assert older
    second = client.get(older[1]).text
    names = [set(re.findall(r'href="(/m/local/[^"]+)"', page)) for page in (first, second)]
    assert len(names[0]) == 24
    assert not names[0] & names[1]


def test_a_model_says_what_it_is_why_and_how_to_use_it(client, grove):
    page = client.get(GUITAR).text
    assert "guitar, electric guitar" in page
    assert "the adapted modules have the names and widths of zoo" in page
    assert f"HF_ENDPOINT={grove.url} hf download local/guitar-0008e6a5" in page
    assert 'aria-label="Family of local/guitar-0008e6a5' in page
    files = client.get(f"{GUITAR}/files").text
    links = re.findall(r'href="(/local/guitar-0008e6a5/resolve/main/[^"]+)"', files)
    assert len(links) == 2
    assert client.get(links[1]).headers["content-length"] == "81672"


def test_an_older_revision_is_shown_by_its_digest(client, grove):
    digest = client.get("/api/v1/models/local/guitar-0008e6a5", headers={"Accept": "*/*"}).json()["revision"]
    page = client.get(f"{GUITAR}?revision={digest[:12]}")
    assert f"revision {digest[:12]}" in page.text
    assert client.get(f"{GUITAR}?revision=ffffffffffff").status_code == 404


def test_wrong_values_are_said_beside_their_fields(client):
    answer = client.post(f"{GUITAR}/actions/merger.orthogonal", data={"rank": "0", "weights": "1\nmuch"})
    assert answer.status_code == 422
    assert re.search(r'id="field-rank-error">[^<]*greater than or equal to 1', answer.text)
    assert re.search(r'id="field-weights-error">[^<]*valid number', answer.text)
    assert ">1\nmuch</textarea>" in answer.text
    missing = client.post(f"{GUITAR}/actions/previewer.diffusers", data={})
    assert 'id="field-prompts-error">is needed' in missing.text


def test_a_form_gives_work_once(client, grove):
    data = {":target": "me/smaller", "bits": "4", "fidelity": ""}
    first = client.post("/m/local/zoo-base/actions/compressor.rtn", data=data)
    again = client.post("/m/local/zoo-base/actions/compressor.rtn", data=data)
    assert first.url == again.url
    assert "compressor.rtn" in first.text
    number = str(first.url).rpartition("/")[2]
    with grove.hub.reading() as session:
        job = session.get(Job, number)
    assert (job.target, job.params["bits"], job.params["fidelity"]) == ("me/smaller", 4, False)
    assert "cancelled" in client.post(f"/jobs/{number}/cancel").text
    assert client.post(f"/jobs/{number}/cancel").status_code == 200
    unknown = client.post("/m/local/zoo-base/actions/merger.sum", data={":others": "nobody/nothing"})
    assert "no model &#39;nobody/nothing&#39;" in unknown.text


def test_the_colours_are_chosen_without_javascript(client):
    answer = client.post("/theme", data={"theme": "dark", "next": "/plugins"})
    assert str(answer.url).endswith("/plugins")
    assert 'data-theme="dark"' in answer.text
    client.post("/theme", data={"theme": "auto", "next": "//evil.example/"})


@pytest.mark.parametrize("address", ["https://evil.example/", "//evil.example", "/\\evil.example", "javascript:x"])
def test_forms_lead_to_this_hub_only(grove, address):
    answer = httpx2.post(f"{grove.url}/theme", data={"theme": "light", "next": address}, follow_redirects=False)
    assert answer.headers["location"] == "/"


def test_a_token_is_kept_in_a_cookie_that_scripts_cannot_read(grove):
    secret = create_token(grove.hub, token=NewToken(name="web")).token
    with httpx2.Client(base_url=grove.url, headers=HTML) as client:
        wrong = client.post("/signin", data={"token": "wrong", "next": "/jobs"})
        assert wrong.status_code == 401
        assert "not known here" in wrong.text
        right = client.post("/signin", data={"token": secret, "next": "/jobs"})
        assert right.headers["location"] == "/jobs"
        cookie = right.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert "Sign out" in client.get("/jobs").text
        assert client.get("/system").status_code == 403
        assert client.post("/m/local/zoo-base/preview", data={"prompt": "x"}).status_code == 403
        client.post("/signout")
        assert "Sign in" in client.get("/jobs").text


def _hostile(grove: Any) -> str:
    """A model, a job and a source of which every text that a stranger chooses is hostile."""
    with grove.hub.transaction() as session:
        stored = grove.hub.store.put_bytes(b"x")
        session.merge(Blob(sha256=stored.sha256, size=stored.size))
        _, revision, _ = add_revision(
            session, name="evil/model", files={f"{EVIL.replace('/', '|')}.bin": stored.sha256}, manifests={},
            kind="adapter", family="zoo", adapter_type="lora", declared_base=EVIL, licence=EVIL, tags=[EVIL],
            card=f"# {EVIL}\n\n[a](javascript:alert(3)) <iframe src=//x></iframe> ![b](//x/y.png)\n\n`{EVIL}`",
            trust="quarantined", summary={"reasons": [EVIL], "variant": EVIL, "trust": "quarantined"},
            weights_hash=None, values_hash=None, inventory_hash=None, parameters=1, size=1,
        )  # fmt: skip
        session.add(Source(name=EVIL, plugin=EVIL, url=EVIL, schedule=EVIL))
        job = Job(
            id="e" * 32, plugin=EVIL, params={EVIL: EVIL}, inputs=[revision.id], idempotency_key="evil", state="failed",
            message=EVIL, log=EVIL, error=EVIL,
            outputs={"report": {EVIL: [{EVIL: EVIL}]}, "models": [EVIL], "artefacts": {f"{EVIL}.png": stored.sha256,
                     "page.html": stored.sha256}},
        )  # fmt: skip
        session.add(job)
    return "/m/evil/model"


def test_hostile_strings_stay_text_everywhere(client, grove):
    model = _hostile(grove)
    try:
        parts = [f"{model}/{part}" for part in ("files", "family", "jobs", "similar", "layers", "actions")]
        for path in ("/", "/jobs", f"/jobs/{'e' * 32}", "/sources", "/system", model, *parts):
            page = client.get(path)
            assert page.status_code == 200, path
            assert found_in(page.text) == set(), path
            assert ">49<" not in page.text, path
        shown = client.get(model).text
        assert "Quarantined: these files may run code" in shown
        assert "resolve/main" not in client.get(f"{model}/files").text
        page = client.get(f"/jobs/{'e' * 32}/files/page.html")
        assert page.headers["content-type"] == "application/octet-stream"
        assert page.headers["content-disposition"].startswith("attachment")
    finally:
        with grove.hub.transaction() as session:
            session.delete(session.get(Job, "e" * 32))
            session.delete(session.exec(select(Model).where(Model.name == "evil/model")).one())
            session.delete(session.exec(select(Source)).one())


def test_pictures_of_private_models_are_shown_to_those_with_a_token_only(client, grove):
    with grove.hub.transaction() as session:
        stored = grove.hub.store.put_bytes(b"\x89PNG of a private model")
        session.merge(Blob(sha256=stored.sha256, size=stored.size))
        model, revision, _ = add_revision(
            session, name="me/secret", files={"a.bin": stored.sha256}, manifests={}, kind="adapter", family="zoo",
            adapter_type=None, declared_base=None, licence=None, tags=[], card="", trust="ok", summary={},
            weights_hash=None, values_hash=None, inventory_hash=None, parameters=1, size=1,
        )  # fmt: skip
        model.private = True
        outputs = {"artefacts": {"preview.png": stored.sha256}}
        session.add(Job(id="a" * 32, plugin="previewer.diffusers", inputs=[revision.id], idempotency_key="secret",
                        state="done", outputs=outputs))  # fmt: skip
    try:
        assert client.get("/m/me/secret").status_code == 404
        assert client.get(f"/jobs/{'a' * 32}/files/preview.png").status_code == 404
        assert "secret" not in client.get("/jobs").text
        assert "secret" not in client.get("/").text
    finally:
        with grove.hub.transaction() as session:
            session.delete(session.get(Job, "a" * 32))
            session.delete(session.exec(select(Model).where(Model.name == "me/secret")).one())


def test_an_empty_hub_says_what_to_type(serving, tmp_path):
    served = serving.start(tmp_path / "hub")
    try:
        with httpx2.Client(base_url=served.url, headers=HTML) as client:
            expected = {
                "/": "modelgrove ingest", "/atlas": "modelgrove expert fit", "/jobs": "modelgrove worker",
                "/sources": "modelgrove ingest", "/?q=violin": "modelgrove ingest", "/system": "Nothing happened yet",
            }  # fmt: skip
            for path, said in expected.items():
                answer = client.get(path)
                assert answer.status_code == 200
                assert said in answer.text
    finally:
        serving.stop(served)
