"""Which addresses the hub itself fetches from, when a source or a caller says where.

A URL of somebody else must not have us ask the machines behind our firewall, nor this one. So what a URL may be is
checked twice: when it is given, and for each connection with the very address that is connected to, for a name may be
pointed elsewhere in between.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from modelgrove_hub.errors import StorageError, UsageError

SCHEMES = ("https", "http")
_PORTS = {"https": 443, "http": 80}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def check_url(url: str, *, private: bool = False) -> tuple[str, int]:
    """The host and port of a URL that may be fetched. With `private`, hosts of the own network may be, too.

    Raises:
        UsageError: it is no http or https URL, holds a password, or names an address that is not public.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise UsageError(f"{url[:200]!a} is no URL: {error}") from error
    if parts.scheme not in SCHEMES or not host:
        raise UsageError(f"{url[:200]!a}: only http:// and https:// are fetched")
    if parts.username is not None or parts.password is not None:
        raise UsageError(f"URL of {host!a}: it may hold no name or password")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        check_address(str(address), host, private=private)
    return host, port or _PORTS[parts.scheme]


def public_addresses(host: str, port: int, *, private: bool = False) -> Sequence[str]:
    """What a host's name means now: connect to one of these, and do not look the name up again.

    Raises:
        UsageError: one of them is not public.
        StorageError: the name is not known.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise StorageError(f"{host!a} is not known: {getattr(error, 'strerror', None) or error}") from error
    addresses = list(dict.fromkeys(str(one[4][0]) for one in found))
    for address in addresses:
        check_address(address, host, private=private)
    return addresses


def check_address(address: str, host: str, *, private: bool = False) -> None:
    """Refuse an address of this machine or, unless `private`, of the own network.

    Raises:
        UsageError: it is such.
    """
    found = _meant(ipaddress.ip_address(address.partition("%")[0]))
    never = found.is_loopback or found.is_link_local or found.is_multicast or found.is_unspecified
    if never or not (found.is_global or private):
        way = "" if never else ": the setting `private_sources` allows the own network"
        raise UsageError(f"{host!a} is {found}, which is not public and not fetched from{way}")


def _meant(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The IPv4 address that an IPv6 address carries, if it does."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address
