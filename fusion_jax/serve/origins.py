"""What other sites make a visitor's browser send is refused, by the API as by the page.

A browser sends what any page tells it to, to any address that it reaches: this machine's own and private ones among
them. It says in headers which page it was (`check_origin`), and lets a page set only a few types of content without
asking first (`check_json`). A page whose own host name is pointed at this server counts as this server's; without a key
nothing but that name gives it away (`check_host`). Programs that are not browsers send none of this and are not meant.
"""

import ipaddress
import re
import socket
from collections.abc import Collection

from starlette.requests import Request

from fusion_jax.serve.error import ApiError

# Nobody can register a public name below these.
_PRIVATE = (".localhost", ".local", ".internal", ".home.arpa")
_FORM = re.compile(r"(?:([\w.-]+)|\[([\w:.%]+)\])(?::\d{0,5})?", re.ASCII)
_HOST = "The server does not answer to this host name: set FUSION_API_KEY, or start it with --host_names."


def check_host(request: Request, names: Collection[str]) -> None:
    """ApiError 421 for a host name that a stranger can own, unless it is this machine's or among `names`."""
    given = request.headers.get("host")
    if given is None:  # browsers always send it
        return
    form = _FORM.fullmatch(given.lower())
    name, address = form.groups() if form else ("", "")
    known = {socket.gethostname().lower(), *(name.lower() for name in names)}
    private = name and ("." not in name or name.endswith(_PRIVATE))
    if not (private or name in known or _is_address(name or address)):
        raise ApiError(421, _HOST, "unknown_host")


def check_origin(request: Request) -> None:
    """ApiError 403 where the page of another site has made a browser send this."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None:
        same = site in ("same-origin", "none")
    else:
        same = origin is None or origin.partition("://")[2] == request.headers.get("host")
    if not same:
        raise ApiError(403, "Another site may not use this server.", "foreign_origin")


def check_json(request: Request) -> None:
    """ApiError 415 where the content is of another type, one that browsers send without asking for instance."""
    if media_type(request) != "application/json":
        raise ApiError(415, "The content must be of the type application/json.", "unsupported_type")


def media_type(request: Request) -> str:
    """What kind of content the request says that it has, without parameters; "" where it says nothing."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def from_browser(request: Request) -> bool:
    """Whether a page in a browser has sent this."""
    return "origin" in request.headers or "sec-fetch-site" in request.headers


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
