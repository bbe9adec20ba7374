"""SSRF: what the hub does not fetch from, however it is written."""

import socket

import pytest

from modelgrove_hub.addresses import check_address, check_url, public_addresses
from modelgrove_hub.errors import StorageError, UsageError

INSIDE = [
    "http://127.0.0.1/", "http://[::1]/", "http://0.0.0.0/", "http://10.1.2.3/", "http://192.168.0.1:8765/",
    "http://172.16.0.1/", "http://169.254.169.254/latest/meta-data", "http://[fe80::1]/", "http://[fd00::1]/",
    "http://[::ffff:127.0.0.1]/", "http://[64:ff9b::7f00:1]/", "http://[2002:7f00:1::]/", "http://100.64.0.1/",
    "http://224.0.0.1/",
]  # fmt: skip


@pytest.mark.parametrize("url", INSIDE)
def test_addresses_inside_are_refused(url):
    with pytest.raises(UsageError, match="not public"):
        check_url(url)


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "gopher://a.example/", "ftp://a.example/", "//a.example/", "a.example", "http://", "http://[::1",
     "http://user:pass@a.example/", "http://a.example:99999/", "javascript:alert(1)", ""],
)  # fmt: skip
def test_only_plain_urls_of_the_web_are_taken(url):
    with pytest.raises(UsageError):
        check_url(url)


def test_what_is_public_is_taken_and_the_own_network_where_it_is_allowed():
    assert check_url("https://hub.example/a/b?c=d") == ("hub.example", 443)
    assert check_url("http://8.8.8.8:8080/") == ("8.8.8.8", 8080)
    assert check_url("http://192.168.0.1/", private=True) == ("192.168.0.1", 80)
    for url in ("http://127.0.0.1/", "http://169.254.169.254/"):
        with pytest.raises(UsageError):
            check_url(url, private=True)


@pytest.mark.parametrize("name", ["localhost", "127.1", "0x7f000001", "2130706433", "0177.0.0.1"])
def test_a_name_is_judged_by_what_it_means(name):
    assert check_url(f"http://{name}/")[0] == name  # a name so far
    with pytest.raises(UsageError, match="not public"):
        public_addresses(name, 80)


def test_a_name_that_is_pointed_elsewhere_is_refused_by_its_new_address(monkeypatch):
    answers = [["93.184.216.34"], ["93.184.216.34", "127.0.0.1"]]

    def look_up(host, port, type):  # noqa: A002  (the name of getaddrinfo's argument)
        return [(socket.AF_INET, type, 6, "", (address, port)) for address in answers.pop(0)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert public_addresses("rebinding.example", 80) == ["93.184.216.34"]
    with pytest.raises(UsageError, match=r"127\.0\.0\.1"):
        public_addresses("rebinding.example", 80)


def test_a_name_that_is_not_known_is_said():
    with pytest.raises(StorageError, match="is not known"):
        public_addresses("nothing.invalid", 80)


def test_a_scope_does_not_hide_an_address():
    with pytest.raises(UsageError):
        check_address("fe80::1%eth0", "a.example")
