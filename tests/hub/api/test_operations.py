"""Health, metrics, the log, starting and stopping: real server processes."""

import json
import re
import socket
import ssl
import subprocess
import sys
import threading

import httpx2
import pytest

CLI = [sys.executable, "-c", "from modelgrove_hub.cli.root import main; main()"]


def metric(text, name):
    return {found[1]: float(found[2]) for found in re.finditer(rf"^{name}({{.*}})? (\S+)$", text, re.MULTILINE)}


def test_metrics_count_by_route_and_not_by_address(server):
    for number in range(5):
        assert httpx2.get(f"{server.url}/api/v1/models/no/model-{number}").status_code == 404
    httpx2.request("MADEUP", f"{server.url}/api/v1/models")
    text = httpx2.get(f"{server.url}/metrics").text
    asked = metric(text, "modelgrove_requests_total")
    assert asked['{method="GET",route="/api/v1/models/{model:path}",status="404"}'] == 5
    assert metric(text, "modelgrove_blobs") == {None: 0}
    assert "model-3" not in text
    assert "MADEUP" not in text


def test_readiness_tells_what_does_not_answer(tmp_path, serving):
    served = serving.start(tmp_path / "hub", store_url=f"file://{tmp_path}/store")
    try:
        (tmp_path / "hub/queue/messages").mkdir(parents=True, exist_ok=True)
        assert httpx2.get(served.url + "/readyz").json() == {"database": "ok", "store": "ok", "broker": "ok"}
        with served.hub.engine.connect() as connection:
            connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
            connection.commit()
        answer = httpx2.get(served.url + "/readyz")
        while answer.json()["database"] == "ok":  # it looks again after two seconds
            answer = httpx2.get(served.url + "/readyz")
        assert (answer.status_code, answer.json()["database"]) == (503, "failed")
        assert "modelgrove db upgrade" in served.log.read_text()
        assert httpx2.get(served.url + "/healthz").status_code == 200
    finally:
        serving.stop(served)


def test_the_log_can_be_json_or_silent(tmp_path, serving):
    served = serving.start(tmp_path / "hub", request_log="json")
    httpx2.get(served.url + "/api/v1/models?text=private")
    serving.stop(served)
    line = json.loads(served.log.read_text().splitlines()[-1])
    assert (line["method"], line["path"], line["status"], line["caller"]) == ("GET", "/api/v1/models", 200, "anonymous")

    served = serving.start(tmp_path / "hub", request_log="off")
    httpx2.get(served.url + "/api/v1/models")
    serving.stop(served)
    assert "/api/v1/models" not in served.log.read_text()


def run(tmp_path, *options):
    return subprocess.run(
        [*CLI, "--home", str(tmp_path), "serve", *options], capture_output=True, text=True, timeout=60
    )


def test_an_address_that_cannot_be_taken_is_one_line(server, tmp_path):
    port = server.url.rpartition(":")[2]
    done = run(server.home, "--port", port)
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert f"127.0.0.1:{port} is in use" in done.stderr
    for host in ("192.0.2.1", "no such host"):
        done = run(server.home, "--host", host, "--port", "0")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert run(server.home, "--tls-key", str(server.log)).returncode == 2
    done = run(server.home, "--tls-cert", str(server.log), "--port", "0")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_elsewhere_than_on_loopback_it_demands_tokens(tmp_path, serving):
    served = serving.start(tmp_path / "hub", "--host", "0.0.0.0")
    try:
        assert "Demands tokens" in served.log.read_text()
        port = served.url.rpartition(":")[2]
        assert httpx2.get(f"http://127.0.0.1:{port}/api/v1/models").status_code == 401
    finally:
        serving.stop(served)


def test_only_a_trusted_proxy_is_believed(tmp_path, serving):
    served = serving.start(tmp_path / "hub", trusted_proxies="127.0.0.1")
    token = served.run("token", "create", "reader").strip()
    headers = {"Authorization": f"Bearer {token}", "X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
    signed_in = httpx2.post(served.url + "/signin", data={"token": token, "next": "/"}, headers=headers)
    serving.stop(served)
    assert "203.0.113.9 " in served.log.read_text()
    assert "Secure" in signed_in.headers["set-cookie"]
    assert "HttpOnly" in signed_in.headers["set-cookie"]
    assert "SameSite=strict" in signed_in.headers["set-cookie"]

    served = serving.start(tmp_path / "hub", hosts="hub.example")
    httpx2.get(served.url + "/api/v1/models", headers=headers)
    serving.stop(served)
    assert "203.0.113.9" not in served.log.read_text()


def test_several_processes_answer_as_one(tmp_path, serving):
    served = serving.start(tmp_path / "hub", "--workers", "2")
    try:
        for _ in range(20):
            assert httpx2.get(served.url + "/api/v1/models").status_code == 200
        text = httpx2.get(served.url + "/metrics").text
        assert metric(text, "modelgrove_requests_total")['{method="GET",route="/api/v1/models",status="200"}'] == 20
        assert "modelgrove_queue_depth" in text
    finally:
        serving.stop(served)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
               "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
               "-keyout", folder / "key.pem", "-out", folder / "cert.pem"]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return folder


def test_https(tmp_path, serving, certificate):
    files = ("--tls-cert", str(certificate / "cert.pem"), "--tls-key", str(certificate / "key.pem"))
    served = serving.start(tmp_path / "hub", *files)
    try:
        assert served.url.startswith("https://127.0.0.1")
        trust = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
        assert httpx2.get(served.url + "/healthz", verify=trust).status_code == 200
    finally:
        serving.stop(served)


def test_a_download_under_way_is_finished_when_the_server_stops(tmp_path, serving):
    served = serving.start(tmp_path / "hub")
    size = 64 << 20
    httpx2.post(served.url + "/api/repos/create", json={"name": "big", "organization": "a", "type": "model"})
    oid = served.hub.store.put_chunks(iter([b"\0" * size])).sha256
    lines = [{"key": "header", "value": {"summary": "x"}},
             {"key": "lfsFile", "value": {"path": "big.bin", "algo": "sha256", "oid": oid, "size": size}}]  # fmt: skip
    committed = httpx2.post(served.url + "/api/models/a/big/commit/main", content="\n".join(map(json.dumps, lines)),
                            headers={"Content-Type": "application/x-ndjson"})  # fmt: skip
    assert committed.status_code == 200, committed.text
    with httpx2.stream("GET", served.url + "/a/big/resolve/main/big.bin") as answer:
        chunks = answer.iter_raw()
        seen = len(next(chunks))
        served.process.terminate()
        stopping = threading.Event()
        host, port = served.url.removeprefix("http://").split(":")
        while not stopping.is_set():  # until it takes no connections
            try:
                socket.create_connection((host, int(port)), timeout=5).close()
            except OSError:
                stopping.set()
        seen += sum(map(len, chunks))
    assert seen == size
    serving.stop(served)
