"""Odd replies of endpoints and of hosts that pictures are fetched from, over real HTTP: each costs its request alone.

A server on the loopback interface says what the attempt wants: proper replies of a language model, a vision model, an
image generator, a judge or a file host, of which JSON, HTTP or both are changed at random.
"""

import base64
import contextlib
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from helpers.raw_server import answer, serving
from PIL import Image

from fusion_jax.errors import UserError
from fusion_jax.evals.judge import Judge
from fusion_jax.synth.backends.base import BackendError
from fusion_jax.synth.backends.config import ImageConfig, ModelConfig
from fusion_jax.synth.backends.endpoint import ChatEndpoint, ImageEndpoint
from fusion_jax.synth.kinds import KINDS
from fusion_jax.synth.kinds.common import JUDGE, STATEMENT, VERIFY
from fusion_jax.synth.replies import Invalid
from fusion_jax.web.fetch import FetchError, fetch, is_public

QUICK = 300

_SECONDS = 1.0  # that a request may take
_SLOW = 6.0  # seconds that an attempt may take on a busy machine
_ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    2.5,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    "\0",
    "é",
    [],
    {},
]
_ODD += [[[]], [None], {"a": 1}, {"": {}}, "9" * 5000, "[" * 3000, '{"a":' * 3000, "<think>" * 500, "Q: a\nA: b\n" * 50]
_ODD += [
    "http://[",
    "http://127.0.0.1:1/",
    "data:image/png;base64,AAAA",
    "file:///etc/passwd",
    "yes",
    "0.5",
    "```json\n{}",
    "```" + "a" * 60_000,
    "[0," * 900 + "0," * 60_000,
]
_STATUS = ("200 OK", "201 X", "204 X", "206 X", "300 X", "301 X", "304 X", "307 X", "400 X", "408 X", "413 X", "418 X")
_STATUS += ("422 X", "429 X", "500 X", "503 X", "599 X", "999 X", "199 X", "600 X", "099 X", "20 X", "2000 X", "abc X")
_HEADERS = ("Retry-After: nan", "Retry-After: inf", "Retry-After: -5", "Retry-After: Fri, 31 Dec 99999 23:59:59 GMT")
_HEADERS += (
    "Retry-After: 0",
    "Retry-After: " + "9" * 400,
    "Location: http://127.0.0.1:1/",
    "Location: http://[",
    "Location: /",
)
_HEADERS += (
    "Content-Encoding: gzip",
    "Content-Encoding: identity",
    "Content-Type: \xff",
    "X: " + "y" * 3000,
    "Set-Cookie: a",
)
_HEADERS += (
    "Transfer-Encoding: chunked",
    "Content-Length: 5",
    "Connection: upgrade",
    "no colon",
    ": x",
    "Upgrade: h2c",
)
_HOSTS = [
    "127.0.0.1",
    "localhost",
    "[::1]",
    "0.0.0.0",
    "127.1",
    "2130706433",
    "0x7f.1",
    "017700000001",
    "[::ffff:7f00:1]",
]
_HOSTS += [
    "169.254.169.254",
    "10.0.0.1",
    "192.0.0.9",
    "[64:ff9b::7f00:1]",
    "[fec0::1]",
    "[::127.0.0.1]",
    "[fe80::1%lo]",
]
_HOSTS += [
    "①②⑦.0.0.1",
    "a@127.0.0.1",
    "127.0.0.1.",
    "localhost..",
    "[2002:7f00:1::]",
    "[::ffff:0:127.0.0.1]",
    "",
    "[",
    "\\",
]

Random = np.random.Generator


def pick(random: Random, values: Any) -> Any:
    return values[int(random.integers(len(values)))]


def odd(random: Random) -> Any:
    """A value that nobody expects; now and then a deep or a wide one."""
    if random.random() < 0.1:
        value = pick(random, _ODD)
        for _ in range(int(random.integers(1, 2000))):
            value = [value] if random.random() < 0.5 else {"a": value}
        return value
    if random.random() < 0.1:
        return [pick(random, _ODD) for _ in range(int(random.integers(2000)))]
    return pick(random, _ODD)


def changed(random: Random, value: Any, share: float = 0.15) -> Any:
    """JSON with some of its values replaced, left out, doubled or moved."""
    if random.random() < share:
        return odd(random)
    if isinstance(value, dict):
        found = {key: changed(random, inner, share) for key, inner in value.items() if random.random() > share / 3}
        return found | ({pick(random, list(value) or ["x"]) + "x": odd(random)} if random.random() < share else {})
    if isinstance(value, list):
        found = [changed(random, inner, share) for inner in value if random.random() > share / 3]
        return found * int(random.integers(1, 4)) if random.random() < share / 2 else found
    return value


def dumps(random: Random, value: Any) -> bytes:
    try:
        said = json.dumps(value, ensure_ascii=bool(random.random() < 0.5)).encode(errors="surrogatepass")
    except RecursionError:  # too deep for Python to write, and easily written by others
        depth = int(random.integers(1000, 50_000))
        said = b'{"choices":' + b"[" * depth + b"]" * depth + b"}"
    return said


def scrambled(random: Random, data: bytes) -> bytes:
    """Bytes with some of them changed, cut or doubled."""
    if not data or random.random() < 0.6:
        return data
    how, at = int(random.integers(5)), int(random.integers(len(data)))
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + random.bytes(int(random.integers(1, 9))) + data[at:]
    if how == 2:
        return data[:at] + data[at // 2 :]
    if how == 3:
        found = bytearray(data)
        for place in random.integers(len(data), size=int(random.integers(1, 9))):
            found[place] = int(random.integers(256))
        return bytes(found)
    return data[:at] + pick(random, (b"[", b"{", b'"', b"\xff", b"\0", b"\\u", b"9" * 4400)) * 30 + data[at:]


def http(random: Random, body: bytes) -> tuple[list[bytes], float]:
    """What is sent, in pieces, and the seconds between them."""
    status = "200 OK" if random.random() < 0.6 else pick(random, _STATUS)
    headers = [pick(random, _HEADERS) for _ in range(int(random.integers(3)))] if random.random() < 0.3 else []
    said = answer(body, status, *headers)
    if random.random() < 0.1:
        size = int(random.integers(1, 40))
        chunks = [body[i : i + size] for i in range(0, min(len(body), 2000), size)]
        said = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        said += b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    if random.random() < 0.05:
        said = b"HTTP/1.1 100 Continue\r\n\r\n" * int(random.integers(1, 200)) + said
    said = scrambled(random, said) if random.random() < 0.3 else said
    if random.random() < 0.03:  # dripped, for longer than anybody waits
        return [said[i : i + 1] for i in range(60)], 0.05
    return [said], 0.0


def picture(random: Random) -> bytes:
    forms = (
        "PNG",
        "JPEG",
        "GIF",
        "BMP",
        "WEBP",
        "TIFF",
        "DDS",
        "PPM",
        "ICO",
        "TGA",
        "PCX",
        "SGI",
        "MPO",
        "BLP",
        "ICNS",
    )
    mode = pick(random, ("RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I"))
    size = tuple(int(side) for side in random.integers(1, 80, 2))
    buffer = io.BytesIO()
    try:
        Image.new(mode, size).save(buffer, pick(random, forms))
    except (OSError, ValueError):  # a format that does not know the mode
        buffer = io.BytesIO()
        Image.new("RGB", size).save(buffer, "PNG")
    if random.random() < 0.1:  # a header that promises more than anybody has
        side = int(random.integers(1 << 16, 1 << 31))
        head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 1000)))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks
        )
    return scrambled(random, buffer.getvalue())


def answers(random: Random, ask) -> str:
    """What a model may say to a request: the form that it is shown, changed, in one of many wrappings."""
    shaped = json.loads(ask.form.replace(", ...]", "]"))
    said = dumps(random, changed(random, shaped)).decode(errors="replace")
    said = scrambled(random, said.encode()).decode(errors="replace")
    wrapping = (
        "{}",
        "```json\n{}\n```",
        "<think>[{{</think>{}",
        "Sure! Here is: {}",
        "{} {}",
        "Q: {}\nA: x",
        "left: {}\nright: {}",
    )
    return str(pick(random, wrapping)).format(*[said] * 2) if random.random() < 0.5 else said


class Talk:
    """The server's side: what is said next to the endpoint's requests, and to those for files."""

    def __init__(self):
        self.pieces: list[bytes] = []
        self.file: list[bytes] = []
        self.every = 0.0

    def __call__(self, connection: socket.socket, head: bytes) -> None:
        for piece in self.file if b" /file" in head else self.pieces:
            connection.sendall(piece)
            if self.every:
                threading.Event().wait(self.every)


def attempts(random: Random, folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Replies to each of the requests that this project makes."""
    talk = Talk()
    with serving(talk) as (port, _):
        base = f"http://127.0.0.1:{port}/v1"
        options = {"backend": "endpoint", "model": "m", "base_url": base, "retries": 0, "timeout": _SECONDS}
        models = (ModelConfig(**options), ImageConfig(**options, width=32, height=32))
        asks = [ask for kind in KINDS.values() for ask in (kind.describe, kind.ask) if ask] + [JUDGE, VERIFY, STATEMENT]
        while True:
            seed = int(random.integers(1 << 62))
            what = pick(random, ("chat", "chat", "chat", "image", "image", "judge", "fetch", "address"))
            yield f"{what} {seed}", lambda what=what, seed=seed: _attempt(what, seed, talk, port, models, asks)


def _attempt(what: str, seed: int, talk: Talk, port: int, models: tuple, asks: list) -> str:
    random, begun = np.random.default_rng(seed), time.monotonic()
    try:
        outcome = globals()[f"_{what}"](random, talk, port, models, asks)
    except (BackendError, FetchError, Invalid):
        outcome = "refused"
    except UserError as error:
        # What ends a run (a key that is refused, a payment that is due, a model that is missing) or an evaluation.
        said = ("refuses the key", "needs a key", "asks for payment", "does not serve", "does not answer")
        if not any(part in str(error) for part in said) or "\n" in str(error):
            raise
        outcome = "refused"
    if (took := time.monotonic() - begun) > _SLOW:
        raise AssertionError(f"took {took:.1f} s")
    return outcome


def _chat(random: Random, talk: Talk, port: int, models: tuple, asks: list) -> str:
    ask = pick(random, asks)
    message = {"role": "assistant", "content": answers(random, ask)}
    whole = {"choices": [{"message": message, "finish_reason": "stop", "index": 0}]}
    whole["usage"] = {"prompt_tokens": 5, "completion_tokens": 7}
    talk.pieces, talk.every = http(random, scrambled(random, dumps(random, changed(random, whole, 0.05))))
    reply = ChatEndpoint(models[0], "llm", {}).chat([{"role": "user", "content": "x"}], ask.schema, 1, "qa", {})
    made = ask.read(reply.text, reply.parsed, {"caption": "x", "pairs": [{}]})
    json.dumps([made, reply.text, reply.prompt_tokens], ensure_ascii=False).encode(errors="replace")
    return "accepted"


def _image(random: Random, talk: Talk, port: int, models: tuple, asks: list) -> str:
    first: dict[str, Any] = {"b64_json": base64.b64encode(picture(random)).decode()}
    if random.random() < 0.4:
        first = {"url": f"http://127.0.0.1:{port}/file" if random.random() < 0.7 else _address_of(random, port)}
    talk.pieces, talk.every = http(random, dumps(random, changed(random, {"data": [first]}, 0.08)))
    talk.file, _ = http(random, picture(random))
    drawn = ImageEndpoint(models[1], "images", {}).draw("x", (32, 32), 1, {})
    if (drawn.mode, drawn.size) != ("RGB", (32, 32)):
        raise AssertionError(f"an image of mode {drawn.mode} and size {drawn.size}")
    return "accepted"


def _judge(random: Random, talk: Talk, port: int, models: tuple, asks: list) -> str:
    whole = {"choices": [{"message": {"content": pick(random, ("1.0", "yes", "x"))}}]}
    talk.pieces, talk.every = http(random, scrambled(random, dumps(random, changed(random, whole, 0.15))))
    said = Judge(f"http://127.0.0.1:{port}/v1", "m", pause=0.0, attempts=1, timeout=_SECONDS).ask("?", 5)
    if not isinstance(said, str) or len(said) > 10_000:
        raise AssertionError("no short text")
    return "accepted"


def _fetch(random: Random, talk: Talk, port: int, models: tuple, asks: list) -> str:
    body = random.bytes(int(random.integers(2000)))
    talk.file, talk.every = http(random, body)
    private = [("127.0.0.1", port)]
    url, redirects = f"http://127.0.0.1:{port}/file", int(random.integers(3))
    found = fetch(url, max_bytes=1500, seconds=_SECONDS, redirects=redirects, private=private)
    if len(found) > 1500:
        raise AssertionError("too large")
    return "accepted"


def _address_of(random: Random, port: int) -> str:
    place = pick(random, _HOSTS) + pick(
        random, ("", "", ":80", f":{port}", ":0", ":99999", ":80abc", ":", ":443", ":٨٠")
    )
    return (
        pick(random, ("http", "HTTP", "https", "ftp", "", "http:", "\thttp"))
        + pick(random, ("://", "://", "://", ":/", ":", "//", ":\\\\", "://a@", "://a:b@"))
        + place
        + pick(random, ("", "/", "/x?y#z", "\r\nX: y", "/\\", " ", "/" + "a" * 9000, "?x", "#@b"))
    )


def _address(random: Random, talk: Talk, port: int, models: tuple, asks: list) -> str:
    """Addresses of this machine and its network in all spellings: nothing may come back."""
    if random.random() < 0.5:
        number = int.from_bytes(random.bytes(16)) >> int(random.integers(128))
        _check_public(number)
    talk.file = talk.pieces = [answer(b"secret")]
    talk.every = 0.0
    fetch(_address_of(random, port), max_bytes=1500, seconds=_SECONDS, ports=(80, 443, port))
    raise AssertionError("something of this network came back")


def _check_public(number: int) -> None:
    """No IPv6 address outside of 2000::/3, nor one that has an IPv4 address in a known place, is public."""
    import ipaddress

    for ip in (ipaddress.IPv6Address(number), ipaddress.IPv6Address(number | 1 << 125)):
        inner = ip.ipv4_mapped or ip.sixtofour or ip.teredo
        with contextlib.suppress(ValueError):
            if is_public(str(ip)) and (inner or int(ip) >> 125 != 1 or ip.is_private or ip.is_site_local):
                raise AssertionError(f"{ip} is called public")
