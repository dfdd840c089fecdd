"""Images from http(s) addresses, never from this network: an address may be anything that a stranger writes."""

import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import urlsplit

from fusion_jax.serve.protocol import ApiError

TIMEOUT = 10.0  # seconds for all of it


def fetch(address: str, max_bytes: int) -> bytes:
    """What lies behind an address. Redirects are not followed: they could lead anywhere.

    Raises:
      ApiError: the address is private, or nothing usable came back.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise _refused(f"is no address ({error})") from error
    if not host or parts.username is not None:
        raise _refused("must name a host, and no user")
    place = public_address(host, port)
    end = time.monotonic() + TIMEOUT
    try:
        # To the very address that was checked: asking for the name again could give another one.
        plain = socket.create_connection((place, port), timeout=TIMEOUT)
        with (
            plain
            if parts.scheme == "http"
            else ssl.create_default_context().wrap_socket(plain, server_hostname=host) as connected
        ):
            connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
            connection.sock = connected
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "fusion_jax"})
            response = connection.getresponse()
            if response.status != 200:
                raise _refused(f"answered with status {response.status}")
            data = b""
            while piece := response.read1(1 << 16):
                data += piece
                if len(data) > max_bytes:
                    raise ApiError(400, f"image_url has over {max_bytes} bytes.", "image_too_large", "messages")
                if time.monotonic() > end:
                    raise _refused("took too long")
            return data
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _refused(f"could not be read ({type(error).__name__})") from error


def public_address(host: str, port: int) -> str:
    """The first address of a host, all of which must be public. ApiError otherwise."""
    try:
        found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise _refused("names no known host") from error
    for place in found:
        ip = ipaddress.ip_address(place.partition("%")[0])
        inner = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
        if not ip.is_global or ip.is_multicast or (inner is not None and not inner.is_global):
            raise _refused("is not on the public network")
    return found[0]


def _refused(why: str) -> ApiError:
    return ApiError(400, f"image_url {why}.", "invalid_image_url", "messages")
