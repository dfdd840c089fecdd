"""Fetches an untrusted address without giving it access to the network that this process runs in."""

import contextlib
import ipaddress
import re
import time
from collections.abc import Collection
from urllib.parse import quote, urljoin, urlsplit

import idna

from fusion_jax.web.client import Web, WebError

MAX_URL = 8192  # characters
PORTS = {"http": 80, "https": 443}

# Networks that are not on the internet, though `ipaddress` calls parts of them global: protocol assignments, relays of
# 6to4, and the address under which Azure serves its own machines.
_INNER_4 = [ipaddress.IPv4Network(net) for net in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")]
# Of IPv6 only global unicast addresses may be reached, and of those none that contains an IPv4 address (Teredo and
# the rest of 2001::/23, 6to4) or is reserved for documentation. All other forms that contain an IPv4 address (mapped,
# compatible, translated, NAT64) and the site-local, private and link-local ranges are outside of it.
_GLOBAL_6 = ipaddress.IPv6Network("2000::/3")
_INNER_6 = [ipaddress.IPv6Network(net) for net in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")]

_PLACE = re.compile(r"(?P<host>[^\[\]:@%]+|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{0,5}))?", re.IGNORECASE | re.ASCII)
_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_SENTENCES = {  # by `WebError.reason`
    "timeout": "The answer was not complete within {seconds:g} s",
    "no_host": "The host is not known",
    "forbidden": "The host is not on the public network",
    "no_connection": "The host cannot be reached",
    "cut": "The host sent an answer that is not HTTP, or cut it short",
    "too_large": "The file has more than {max_bytes} bytes",
    "encoded": "The host sent a compressed answer, which the request excludes",
    "invalid": "The address cannot be requested",
}

Place = tuple[str, int]  # host, in lower case and without brackets, and port


class FetchError(Exception):
    """Nothing was fetched. The message is one sentence for the person who wrote the address.

    Attributes:
      reason: bad_url, redirect, status, or a reason of `WebError`.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def fetch(
    url: str,
    *,
    max_bytes: int,
    seconds: float,
    redirects: int = 0,
    ports: Collection[int] = tuple(PORTS.values()),
    private: Collection[Place] = (),
    headers: dict[str, str] | None = None,
) -> bytes:
    """Fetches the body of an http or https address.

    All of a host's addresses must be public, and the connection goes to one of those that were checked. Proxies of
    the environment are not used: they would look the name up again.

    Args:
      max_bytes: a longer body is refused.
      seconds: for everything, redirects included.
      redirects: how many are followed; each is checked like the first address, and none may lead from https to http.
      ports: that are allowed.
      private: hosts and ports that are allowed in any network, but not as the target of another host's redirect.

    Raises:
      FetchError: the address is malformed or not allowed, or no whole answer with status 200 came in time.
    """
    end = time.monotonic() + seconds
    for _ in range(redirects + 1):
        address, place = _parse(url)
        own = place in private
        if not own:
            private = ()
            if place[1] not in ports:
                allowed = ", ".join(map(str, sorted(ports)))
                raise FetchError("bad_url", f"The address names port {place[1]}; allowed: {allowed}.")
        # A new pool: an idle connection to another host could answer for one that is not allowed.
        web = Web(allowed=None if own else is_public)
        try:
            left = max(end - time.monotonic(), 0.0)
            sent = {"Accept": "image/*", "User-Agent": "fusion_jax"} | (headers or {})
            answer = web.send("GET", address, sent, None, left, max_bytes)
        except WebError as error:
            sentence = _SENTENCES[error.reason].format(seconds=seconds, max_bytes=max_bytes)
            raise FetchError(error.reason, f"{sentence}.") from error
        finally:
            web.close()
        if answer.status == 200:
            return answer.body
        if not (redirects and answer.status in (301, 302, 303, 307, 308)):
            raise FetchError("status", f"The host answered with status {answer.status}.")
        url = _next(address, answer.headers.get("location", ""))
    raise FetchError("redirect", f"The address leads over more than {redirects} redirects.")


def _next(address: str, location: str) -> str:
    with contextlib.suppress(UnicodeError):  # headers are read as Latin-1; hosts write UTF-8
        location = location.encode("latin-1").decode()
    try:
        url = urljoin(address, location) if location and not _unfit(location) else ""
    except ValueError:
        url = ""
    if not url:
        raise FetchError("redirect", "The host redirects to no proper address.")
    if address.startswith("https:") and not url.lower().startswith("https:"):
        raise FetchError("redirect", "The host redirects from https to an address without it.")
    return url


def _unfit(url: str) -> bool:
    """Whether the address holds characters that `urlsplit` skips, or that programs understand differently.

    A space inside is neither: it is sent as %20.
    """
    return url != url.strip() or any(c < " " or c in "\\\x7f" or "\ud800" <= c <= "\udfff" for c in url)


def _parse(url: str) -> tuple[str, Place]:
    """The address in plain ASCII, without its fragment, and the host and port that it names."""
    if len(url) > MAX_URL:
        raise FetchError("bad_url", f"The address has more than {MAX_URL} characters.")
    try:
        if _unfit(url):
            raise ValueError(url)
        parts = urlsplit(url)
        named = _PLACE.fullmatch(parts.netloc)
        if parts.scheme not in PORTS or named is None:
            raise ValueError(url)
        host = _host(named["host"])
        port = int(named["port"]) if named["port"] else PORTS[parts.scheme]
        if not 0 < port < 1 << 16:
            raise ValueError(url)
        # Existing escapes are kept.
        target = quote(parts.path or "/", safe="%/:=&~+!$,;'@()*") + (
            "?" + quote(parts.query, safe="%/:=&~+!$,;'@()*?") if parts.query else ""
        )
    except ValueError as error:  # UnicodeError among them
        raise FetchError(
            "bad_url", "The address must be http://HOST/... or https://HOST/..., without a user."
        ) from error
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}{'' if port == PORTS[parts.scheme] else f':{port}'}{target}", (host, port)


def _host(name: str) -> str:
    """A host in lower case and ASCII, as browsers write it (UTS 46: `straße.de` is not `strasse.de`).

    Raises:
      ValueError: it is not a host, or an IPv4 address in an unusual spelling.
    """
    if name.startswith("["):
        return str(ipaddress.IPv6Address(name[1:-1]))
    name = name.lower() if name.isascii() else idna.encode(name, uts46=True).decode()
    name = name.removesuffix(".")
    if len(name) > 253 or not _NAME.fullmatch(name):
        raise ValueError(name)
    if _NUMBER.fullmatch(name.rpartition(".")[2]):  # 127.1, 0x7f000001, 2130706433
        return str(ipaddress.IPv4Address(name))
    return name


def is_public(address: str) -> bool:
    """Whether an IP address belongs to a host on the internet, and does not contain another address."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if not ip.is_global or ip.is_multicast:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in net for net in _INNER_4)
    isatap = (int(ip) >> 32) & 0xFDFFFFFF == 0x5EFE  # ...:[02]00:5efe:IPv4
    return ip in _GLOBAL_6 and ip.scope_id is None and not isatap and not any(ip in net for net in _INNER_6)
