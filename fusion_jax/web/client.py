"""HTTP requests with one deadline and a limit on size; nothing is redirected or decompressed.

Timeouts of sockets and of HTTP libraries start again with every byte that arrives, so a server that sends one now and
then is never timed out. Here every wait gets what is left of the deadline: for the name, the connection (over all its
addresses), TLS, the head and the body.
"""

import contextlib
import email.utils
import functools
import ipaddress
import math
import queue
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpcore2

from fusion_jax.errors import check
from fusion_jax.files import parse_json

_LOOKUPS = threading.BoundedSemaphore(32)  # names looked up at once: a lookup cannot be stopped, only abandoned
MAX_DEPTH = 64  # of JSON
MAX_VALUES = 500_000  # of JSON: "[],[],[]," takes thirty times its size in memory
_KEEP = 5.0  # seconds for which an idle connection is kept
_PIECE = 1 << 14  # bytes written at a time
_clock = threading.local()  # `end`: when the request of this thread must be over, monotonic time


class WebError(Exception):
    """A request failed without an answer.

    Attributes:
      reason: timeout, no_host, forbidden (by `allowed`), no_connection, cut, too_large, encoded, or invalid (of the
        request itself).
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Answer:
    """An HTTP answer. `headers` are by lower-case name; where a name comes twice, the first counts."""

    status: int
    headers: dict[str, str]
    body: bytes


class Web:
    """A pool of connections that are used again, by any number of threads."""

    def __init__(self, connections: int = 1, allowed: Callable[[str], bool] | None = None, proxy: str = ""):
        """
        Args:
          connections: how many at most.
          allowed: IP address -> whether a connection to it is allowed; must hold for all addresses of a host. None
            allows all.
          proxy: http://HOST:PORT that requests go through.
        """
        self._network = _Network(allowed)
        options: dict[str, Any] = {
            "ssl_context": _tls(),
            "max_connections": connections,
            "max_keepalive_connections": connections,
            "keepalive_expiry": _KEEP,
            "network_backend": self._network,
        }
        self._pool = httpcore2.ConnectionPool(**options)
        if proxy:
            parts = urllib.parse.urlsplit(proxy)
            names = (parts.username, parts.password)
            auth = tuple(urllib.parse.unquote(name or "").encode() for name in names) if parts.username else None
            place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
            self._pool = httpcore2.HTTPProxy(place, proxy_auth=auth, **options)

    def send(
        self, method: str, url: str, headers: dict[str, str], body: bytes | None, seconds: float, max_bytes: int
    ) -> Answer:
        """Sends one request and returns its answer, whatever its status.

        Raises:
          WebError: no answer came in time and within `max_bytes`.
        """
        _clock.end = time.monotonic() + seconds
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = parts.hostname or "", parts.port
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            place = httpcore2.URL(scheme=parts.scheme.encode(), host=host.encode(), port=port, target=target.encode())
            sent = {"Host": parts.netloc.rpartition("@")[2], "Accept-Encoding": "identity"} | headers
            sent_bytes = [(name.encode("ascii"), value.encode("ascii")) for name, value in sent.items()]
        except ValueError as error:
            raise WebError("invalid", f"the request cannot be sent ({error})") from error
        limits = {"timeout": {"pool": seconds}}
        try:
            with self._pool.stream(method, place, headers=sent_bytes, content=body, extensions=limits) as response:
                return self._read(response, max_bytes)
        except httpcore2.TimeoutException as error:
            raise WebError("timeout", f"no whole answer within {seconds:g} s") from error
        except (httpcore2.LocalProtocolError, ValueError) as error:
            raise WebError("invalid", f"the request cannot be sent ({error})") from error
        except (httpcore2.ConnectError, httpcore2.ProxyError) as error:
            raise WebError("no_connection", str(error) or "no connection") from error
        except (httpcore2.NetworkError, httpcore2.ProtocolError, OSError) as error:
            raise WebError("cut", str(error) or "the connection was cut") from error

    def close(self) -> None:
        self._pool.close()

    def cut(self) -> None:
        """Cuts all connections now, also those that other threads wait on: their requests raise WebError."""
        for stream in list(self._network.streams):
            with contextlib.suppress(OSError):
                stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    def _read(self, response: httpcore2.Response, max_bytes: int) -> Answer:
        headers: dict[str, str] = {}
        for name, value in response.headers:
            headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
        codings = [value for name, value in response.headers if name.lower() == b"content-encoding"]
        if any(value.strip().lower() not in (b"identity", b"") for value in codings):
            raise WebError("encoded", "the answer is compressed, which the request excludes")
        body = bytearray()
        for piece in response.iter_stream():
            body += piece
            if len(body) > max_bytes:
                raise WebError("too_large", f"over {max_bytes} bytes")
            _left()
        return Answer(response.status, headers, bytes(body))


def is_endpoint(url: str) -> bool:
    """Whether the address is http(s)://HOST[:PORT][/PATH] in plain ASCII, without user or query."""
    try:
        parts = urllib.parse.urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # such as a port that is not a number
        return False
    extra = "@" in parts.netloc or parts.query or parts.fragment
    return whole and not extra and all("!" <= c <= "~" and c != "\\" for c in url)


def is_key(key: str) -> bool:
    """Whether the key may be part of a header: a line break at its end, from a file, would make the request invalid."""
    return all("!" <= c <= "~" for c in key)


def proxy_for(url: str) -> str:
    """The proxy that the environment names for this address (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY), or "".

    Raises:
      UserError: the proxy cannot be used.
    """
    parts, named = urllib.parse.urlsplit(url), urllib.request.getproxies()
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return ""
    proxy = named.get(parts.scheme) or named.get("all") or ""
    if not proxy:
        return ""
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    name, _, place = proxy.rpartition("@")
    check(
        is_endpoint(f"{name.partition('://')[0]}://{place}" if name else proxy),
        f"The environment's proxy for {parts.scheme} must be http://HOST:PORT or https://HOST:PORT.",
    )
    return proxy


def read_json(data: bytes | str) -> Any:
    """Parses JSON from an untrusted sender.

    Raises:
      ValueError: it is not JSON, has over MAX_VALUES values, or over MAX_DEPTH levels: later code may recurse into it.
    """
    marks = (b",", b"[", b"{") if isinstance(data, bytes) else (",", "[", "{")
    if sum(data.count(mark) for mark in marks) > MAX_VALUES:
        raise ValueError(f"over {MAX_VALUES} values")
    value = parse_json(data)
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raises ValueError for a value of more than MAX_DEPTH levels."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for one in level if isinstance(one, dict | list) for inner in _inside(one)]
        if not level:
            return
    raise ValueError("nested too deeply")


def _inside(one: dict | list) -> Any:
    return one.values() if isinstance(one, dict) else one


def retry_after(headers: dict[str, str], most: float) -> float | None:
    """The seconds in the header Retry-After, a number or a date, limited to 0 to `most`; None where it is unusable."""
    value = headers.get("retry-after", "")[:64]
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError, IndexError, AttributeError):
            return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), most)


@functools.cache
def _tls() -> ssl.SSLContext:
    return httpcore2.default_ssl_context()


def _left() -> float:
    """The seconds that are left to this thread's request, above 0. Raises ReadTimeout where there are none."""
    left = _clock.end - time.monotonic()
    if left <= 0:
        raise httpcore2.ReadTimeout("too late")
    return left


class _Network(httpcore2.NetworkBackend):
    """Opens connections whose every wait ends at the deadline of the thread that waits."""

    def __init__(self, allowed: Callable[[str], bool] | None):
        self._allowed, self._sockets = allowed, httpcore2.SyncBackend()
        self.streams: weakref.WeakSet[_Stream] = weakref.WeakSet()

    def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        del timeout, local_address, socket_options
        places = _lookup(host, port)
        if self._allowed is not None and not all(self._allowed(place[4][0]) for place in places):
            raise WebError("forbidden", "the host is not on the public network")
        problem: Exception = httpcore2.ConnectError("no address")
        for number, place in enumerate(places):
            try:
                # To the address that was checked: looking the name up again could give another one.
                part = _left() / (len(places) - number)
                return _Stream(self._sockets.connect_tcp(place[4][0], port, part), self.streams)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                problem = error
        _left()
        raise httpcore2.ConnectError(str(problem)) from problem


class _Stream(httpcore2.NetworkStream):
    """A stream that replaces every timeout by the time that is left."""

    def __init__(self, inner: httpcore2.NetworkStream, streams: "weakref.WeakSet[_Stream]"):
        self._inner, self._streams = inner, streams
        streams.add(self)

    def read(self, max_bytes, timeout=None):
        return self._inner.read(max_bytes, _left())

    def write(self, buffer, timeout=None):
        # In pieces: the timeout of a large one would start again with every part that is sent.
        for start in range(0, len(buffer), _PIECE):
            self._inner.write(buffer[start : start + _PIECE], _left())

    def close(self):
        self._inner.close()

    def start_tls(self, ssl_context, server_hostname=None, timeout=None):
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, _left()), self._streams)

    def get_extra_info(self, info):
        return self._inner.get_extra_info(info)


def _lookup(host: str, port: int) -> list[tuple]:
    """`socket.getaddrinfo`, which has no timeout; a name is looked up in a thread of its own."""
    with contextlib.suppress(ValueError, OSError):
        ipaddress.ip_address(host.partition("%")[0])
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not _LOOKUPS.acquire(timeout=_left()):
        raise httpcore2.ConnectTimeout("too many names are being looked up")
    answers: queue.SimpleQueue[list[tuple] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            answers.put(error)
        finally:
            _LOOKUPS.release()

    thread = threading.Thread(target=ask, daemon=True)
    try:
        thread.start()
    except BaseException:
        _LOOKUPS.release()
        raise
    try:
        answer = answers.get(timeout=_left())
    except queue.Empty:
        raise httpcore2.ConnectTimeout("the name took too long") from None
    if isinstance(answer, Exception) or not answer:
        raise WebError("no_host", f"no such host ({answer or 'no address'})")
    return answer
