"""Refuses requests that other sites make a visitor's browser send, to the API or to the page.

A browser sends whatever a page makes it send, to any address that it can reach, also on private networks and its own
machine. Its headers name the page's origin (`check_origin`), and without a preflight a page can set only a few content
types (`check_json`). A page whose own host name points to this server counts as this server's; without a key, only that
name reveals it (`check_host`). Programs other than browsers send none of these headers and are not affected.

Sites in --cors_origins may use the API and read all of its answers (`cors_headers`, `preflight`), but never the page.
"""

import ipaddress
import re
import socket
from collections.abc import Collection

import idna
from starlette.datastructures import Headers
from starlette.requests import Request

from fusion_jax.errors import check
from fusion_jax.server.error import ApiError

# Nobody can register a public name under these.
_PRIVATE = (".localhost", ".local", ".internal", ".home.arpa")
_FORM = re.compile(r"(?:([\w.-]+)|\[([\w:.%]+)\])(?::(\d{0,5}))?", re.ASCII)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_PORTS = {"http": 80, "https": 443}
_TOKENS = re.compile(r"[\w!#$%&'*+.^`|~-]+(?:[ ,]+[\w!#$%&'*+.^`|~-]+)*", re.ASCII)
_MAX_AGE = 600  # seconds that a browser may remember a preflight's answer
_HOST = "The server does not answer to this host name: set FUSION_API_KEY, or start it with --host_names."


def read_host_names(texts: Collection[str]) -> tuple[str, ...]:
    """The names of --host_names as browsers send them. Raises UserError for anything but a host name."""
    names = []
    for text in texts:
        place = _place(_ascii(text))
        valid = place is not None and place[1] is None
        check(valid, f"--host_names: {text!r} must be a host name such as demo.example.org, without scheme and port.")
        names.append(place[0])
    return tuple(names)


def read_origins(texts: Collection[str]) -> tuple[str, ...]:
    """The origins of --cors_origins as browsers send them, or ("*",). Raises UserError for anything but an origin."""
    if "*" in texts:
        check(len(texts) == 1, "--cors_origins: * allows all origins; give it alone.")
        return ("*",)
    origins = []
    for text in texts:
        origin = _origin(_ascii(text.removesuffix("/")))
        check(origin != "", f"--cors_origins: {text!r} must be an origin such as https://app.example.org, no path.")
        origins.append(origin)
    return tuple(origins)


def check_host(request: Request, names: Collection[str]) -> None:
    """Raises ApiError 421 for a host name that anybody could own, unless it is this machine's or in `names`."""
    header = request.headers.get("host")
    if header is None:  # browsers always send it
        return
    host, _ = _place(header) or ("", None)
    known = {_bare(socket.gethostname()), *map(_bare, names)}
    private = host and ("." not in host or host.endswith(_PRIVATE))
    if not (private or host in known or _is_address(host)):
        raise ApiError(421, _HOST, "unknown_host")


def check_origin(request: Request, allowed: Collection[str] = ()) -> None:
    """Raises ApiError 403 where a page of another site made a browser send this. allowed: see `read_origins`."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if origin is not None and _is_allowed(origin, allowed):
        return
    if site is not None:
        same = site in ("same-origin", "none")
    else:
        same = origin is None or _same_place(origin, request.headers.get("host", ""))
    if not same:
        raise ApiError(403, "Another site may not use this server.", "foreign_origin")


def cors_headers(headers: Headers, allowed: Collection[str]) -> dict[str, str]:
    """The headers that let a page read an answer, where its origin is allowed.

    Every answer carries them, errors as well: otherwise the page could not read why it was refused.

    Args:
      headers: the request's headers. allowed: see `read_origins`.
    """
    if not allowed:
        return {}
    if "*" in allowed:
        return {"access-control-allow-origin": "*", "access-control-expose-headers": "Retry-After"}
    origin = headers.get("origin")
    if origin is None or not _is_allowed(origin, allowed):
        return {"vary": "Origin"}
    return {
        "access-control-allow-origin": origin,
        "access-control-allow-credentials": "true",
        "access-control-expose-headers": "Retry-After",
        "vary": "Origin",
    }


def is_preflight(method: str, headers: Headers) -> bool:
    """Whether the request is a CORS preflight."""
    return method == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers


def preflight(headers: Headers, allowed: Collection[str], methods: str) -> dict[str, str]:
    """The headers that answer a preflight. Raises ApiError 403 for an origin that is not allowed.

    Args:
      methods: those that the address accepts, for instance "GET, HEAD".
    """
    if not _is_allowed(headers["origin"], allowed):
        raise ApiError(403, "Another site may not use this server.", "foreign_origin")
    requested = headers.get("access-control-request-headers", "")
    allow_headers = {"access-control-allow-headers": requested} if _TOKENS.fullmatch(requested) else {}
    return {
        "access-control-allow-methods": methods,
        "access-control-max-age": str(_MAX_AGE),
        "vary": "Access-Control-Request-Method, Access-Control-Request-Headers",
        **allow_headers,
    }


def check_json(request: Request) -> None:
    """Raises ApiError 415 for other content than JSON, such as the types that browsers send without a preflight."""
    if media_type(request) != "application/json":
        raise ApiError(415, "The content must be of the type application/json.", "unsupported_type")


def media_type(request: Request) -> str:
    """The media type in the request's Content-Type, in lower case without parameters; "" where it has none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def from_browser(request: Request) -> bool:
    """Whether a page in a browser sent the request."""
    return "origin" in request.headers or "sec-fetch-site" in request.headers


def _is_allowed(origin: str, allowed: Collection[str]) -> bool:
    return bool(allowed) and ("*" in allowed or _origin(origin) in allowed)


def _origin(text: str) -> str:
    """An origin in one spelling; "" for anything else."""
    scheme, _, rest = text.lower().partition("://")
    place = _place(rest)
    if place is None or not _SCHEME.fullmatch(scheme):
        return ""
    host, port = place
    shown = f"[{host}]" if ":" in host else host
    return f"{scheme}://{shown}" + (f":{port}" if port not in (None, _PORTS.get(scheme)) else "")


def _same_place(origin: str, host: str) -> bool:
    """Whether an origin is the server of a Host header, in which the scheme's default port may be left out or not."""
    scheme, _, rest = origin.lower().partition("://")
    one, other, port = _place(rest), _place(host), _PORTS.get(scheme)
    return None not in (one, other) and (one[0], one[1] or port) == (other[0], other[1] or port)


def _place(text: str) -> tuple[str, int | None] | None:
    """The host, in one spelling without brackets, and the port of HOST or HOST:PORT. None for anything else."""
    form = _FORM.fullmatch(text.lower())
    if form is None:
        return None
    name, address, port = form.groups()
    if address is not None:
        try:
            name = str(ipaddress.IPv6Address(address))
        except ValueError:
            return None
    name = _bare(name)
    return (name, int(port) if port else None) if name else None


def _bare(name: str) -> str:
    """A host name in lower case, without a final dot."""
    return name.lower().removesuffix(".")


def _ascii(text: str) -> str:
    """The text with an international host name in ASCII, as browsers send it; "" where it is invalid."""
    scheme, mark, rest = text.rpartition("://")
    host, colon, port = rest.partition(":")
    try:
        host = host if text.isascii() else idna.encode(host, uts46=True).decode()
    except UnicodeError:
        return ""
    return scheme + mark + host + colon + port


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
