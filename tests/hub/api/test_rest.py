"""The OpenAPI document: that the server keeps to it, whatever it is asked, and what the document promises."""

import re

import httpx2
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance

from modelgrove_hub.api import rest

EXAMPLES = 12
METHODS = {"get", "post", "put", "patch", "delete"}
load_all_checks()
APP = FastAPI()
APP.include_router(rest.make_router())
rest.describe(APP)
WITHOUT_SECURITY = {
    path: {
        method: {name: value for name, value in operation.items() if name != "security"}
        for method, operation in item.items()
    }
    for path, item in APP.openapi()["paths"].items()
}  # every request has the token: else schemathesis takes what it leaves out for accepted
schema = schemathesis.openapi.from_dict({**APP.openapi(), "paths": WITHOUT_SECURITY})


@pytest.fixture(scope="module")
def document(guarded):
    return httpx2.get(guarded.url + "/api/v1/openapi.json").json()


@schema.exclude(path_regex="/events$").parametrize()
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
          suppress_health_check=list(HealthCheck))  # fmt: skip
def test_the_server_keeps_to_its_document(case, guarded, tokens):
    # What a plugin or a search takes is in no schema of ours; bad tokens are slowed down, and tried below.
    case.call_and_validate(
        base_url=guarded.url, headers={"Authorization": f"Bearer {tokens['admin']}"}, checks=CHECKS.get_all(),
        excluded_checks=[positive_data_acceptance, ignored_auth],
    )  # fmt: skip


def operations(document):
    for path, item in document["paths"].items():
        yield from ((method, path, item[method]) for method in item.keys() & METHODS)


def test_nothing_is_answered_without_a_token(guarded, document):
    asked = 0
    for method, path, operation in operations(document):
        answer = httpx2.request(method, guarded.url + re.sub("{.*?}", "x", path), json={})
        assert answer.status_code == 401 or (answer.status_code == 422 and method == "post")
        assert operation["security"] == [{"HTTPBearer": []}]
        asked += answer.status_code == 401
    assert asked > 15


def test_every_error_is_a_problem_and_work_says_where_it_is(document):
    schemes = document["components"]["securitySchemes"]
    assert schemes["HTTPBearer"]["scheme"] == "bearer"
    for _, _, operation in operations(document):
        for status, answer in operation["responses"].items():
            if status >= "4":
                assert set(answer["content"]) == {"application/problem+json"}
        if "202" in operation["responses"]:
            assert "Location" in operation["responses"]["202"]["headers"]
            assert "Idempotency-Key" in [one["name"] for one in operation["parameters"]]


def test_other_methods_are_refused_by_name(guarded):
    answer = httpx2.put(guarded.url + "/api/v1/models/a/b")
    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, GET")
    assert answer.headers["content-type"] == "application/problem+json"
