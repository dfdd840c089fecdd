"""Fetching what strangers name: the deadline for everything, the limits, and the guard of this network."""

import itertools
import socket
import threading
import time

import pytest
from helpers.raw_server import answer, says, serving

from fusion_jax.errors import UserError
from fusion_jax.web.client import Web, WebError, proxy_for, read_json, retry_after
from fusion_jax.web.fetch import FetchError, fetch, is_public


def get(port: int, path: str = "/", **options) -> bytes:
    private = options.pop("private", [("127.0.0.1", port)])
    return fetch(f"http://127.0.0.1:{port}{path}", private=private, **{"max_bytes": 1000, "seconds": 5.0} | options)


def reason(url: str, **options) -> str:
    with pytest.raises(FetchError) as error:
        fetch(url, **{"max_bytes": 1000, "seconds": 5.0} | options)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    return error.value.reason


def test_what_lies_there_comes_back_and_nothing_is_asked_to_be_compressed():
    with serving(says(answer(b"picture"))) as (port, heads):
        assert get(port, "/a%20b?c=ä") == b"picture"
    assert heads[0].startswith(b"GET /a%20b?c=%C3%A4 HTTP/1.1\r\n")
    assert b"accept-encoding: identity" in heads[0].lower()
    assert f"host: 127.0.0.1:{port}".encode() in heads[0].lower()


def test_this_network_is_asked_only_where_the_caller_says_so():
    with serving(says(answer(b"secret"))) as (port, heads):
        for url in (f"http://127.0.0.1:{port}/", f"http://localhost:{port}/", f"http://127.0.0.1.:{port}/"):
            assert reason(url, ports=[port]) == "forbidden"
            assert reason(url, ports=[port], private=[("127.0.0.1", port + 1), ("10.0.0.1", port)]) == "forbidden"
        assert reason(f"http://127.0.0.1:{port}/") == "bad_url"  # a port that is not allowed
        assert not heads


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1"),
        *("100.100.100.200", "192.0.0.1", "192.0.0.9", "192.0.0.10", "192.0.0.192", "192.0.2.1", "192.88.99.1"),
        *("198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "168.63.129.16"),
        *("::", "::1", "::127.0.0.1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:0:127.0.0.1"),
        *(
            "::ffff:0:8.8.8.8",
            "64:ff9b::127.0.0.1",
            "64:ff9b::8.8.8.8",
            "64:ff9b:1::10.0.0.1",
            "100::1",
            "2001::1",
            "2001:2::1",
        ),
        *("2001:20::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::", "3fff::1", "4000::1", "5f00::1"),
        *("fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%1", "2606:4700::1%1", "fec0::1", "feff::1"),
        *("ff02::1", "2606:4700::5efe:10.0.0.1", "2606:4700::200:5efe:8.8.8.8", "nonsense"),
    ],
)
def test_addresses_that_are_not_of_the_internet(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "192.0.1.1", "100.63.255.255", "172.32.0.1", "2606:4700::1111"])
def test_addresses_of_the_internet(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        *("", "x", "//h/", "file:///etc/passwd", "ftp://h/", "data:image/png;base64,AA", "javascript:1", "http:h"),
        *("http://", "http:///x", "http://:80/", "http://[", "http://[]/", "http://[::1", "http://[::1%25lo]/"),
        *("http://[::1%lo]/", "http://[v1.a]/", "http://a]/", "http://[::1]x/", "http://a@b/", "http://@b/"),
        *("http://a:b@c/", "http://h:0/", "http://h:65536/", "http://h:80abc/", "http://h:-1/", "http://h:+80/"),
        *("http://h:8 0/", "http://h:80:80/", "http://h:٨٠/", "http://127.1/", "http://2130706433/", "http://0x7f.1/"),
        *("http://0177.0.0.1/", "http://0x7f000001/", "http://127.0.0.0x1/", "http://1.2.3/", "http://1.2.3.4.5/"),
        *("http://127.0.0.%31/", "http://a..b/", "http://.a/", "http://a../", "http://a b/"),
        *(
            "http://a/\r\nX: y",
            "http://a\t.b/",
            "http://a\n/",
            " http://a/",
            "http://a/ ",
            "http://a/\0",
            "http://a/\x7f",
        ),
        *("http://a\\@b/", "http://a/\\b", "http://a/\ud800", "http://\ud800/", "http://a/" + "b" * 9000, "http://*/"),
        *(f"http://{'a' * 64}/", f"http://{'ab.' * 100}c/", "http://\u00ad/", "http://a\u3002\u3002b/", "http://a,b/"),
    ],
)
def test_malformed_addresses(url):
    assert reason(url) == "bad_url"


@pytest.mark.parametrize("host", ["①②⑦.⓪.⓪.①", "LOCALHOST", "localhost.", "[::1]", "[::ffff:127.0.0.1]", "[::7f00:1]"])
def test_other_spellings_of_this_machine(host):
    assert reason(f"http://{host}/") in ("forbidden", "no_host")
    assert reason(f"HTTPS://{host}/#x") in ("forbidden", "no_host")


def test_one_private_address_among_public_ones_is_enough(monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (place, 80)) for place in ("8.8.8.8", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert reason("http://example.com/") == "forbidden"


def test_the_address_that_was_looked_at_is_the_one_connected_to(monkeypatch):
    """A name that is public when it is looked up, and would be loopback the next time, leads nowhere near it."""
    asked, real = [], socket.getaddrinfo

    def lookup(host, port, *args, **kwargs):
        if host != "example.com":
            return real(host, port, *args, **kwargs)
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8" if len(asked) == 1 else "127.0.0.1", port))]

    reached = []

    def connect(address, *_, **__):
        reached.append(address[0])
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(socket, "create_connection", connect)
    assert reason("http://example.com/") == "no_connection"
    assert reached == ["8.8.8.8"] and asked == ["example.com"]


def test_all_addresses_of_a_host_are_tried(monkeypatch):
    with serving(says(answer(b"here"))) as (port, _):
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (place, port)) for place in ("127.0.0.2", "127.0.0.1")]
        real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", lambda h, *a, **k: found if h == "two.example" else real(h, *a, **k))
        place = ("two.example", port)
        assert fetch(f"http://two.example:{port}/", max_bytes=9, seconds=5, private=[place]) == b"here"


SLOW = {
    "nothing": says(b"", every=20),
    "head": says(*(bytes([c]) for c in b"HTTP/1.1 200 OK\r\n" + b"x" * 400), every=0.05),
    "head fields": says(b"HTTP/1.1 200 OK\r\n", *(b"X-%d: y\r\n" % i for i in range(400)), every=0.05),
    "informational": says(*[b"HTTP/1.1 100 Continue\r\n\r\n"] * 400, every=0.05),
    "body": says(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n", *[b"x"] * 400, every=0.05),
    "chunks": says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *[b"1\r\nx\r\n"] * 400, every=0.05),
    "redirects": says(answer(b"", "302 Found", "Location: /"), every=0.3),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_host_that_drips_is_left_at_the_deadline(name):
    with serving(SLOW[name]) as (port, _):
        begun = time.monotonic()
        with pytest.raises(FetchError) as error:
            get(port, seconds=0.5, redirects=10**9)  # more than any machine follows in that time
        assert error.value.reason == "timeout" and 0.4 < time.monotonic() - begun < 1.0


def test_a_slow_handshake_and_a_slow_name_are_left_at_the_deadline(monkeypatch):
    listener = socket.create_server(("127.0.0.1", 0))  # connects, and says nothing
    port = listener.getsockname()[1]
    begun = time.monotonic()
    options = {"max_bytes": 9, "seconds": 0.5}
    assert reason(f"https://127.0.0.1:{port}/", private=[("127.0.0.1", port)], **options) == "timeout"
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(20) and [])
    assert reason("http://example.com/", **options) == "timeout"
    assert time.monotonic() - begun < 2.0
    release.set()
    listener.close()


def test_lookups_that_hang_are_not_piled_up(monkeypatch):
    release, begun = threading.Event(), itertools.count()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: next(begun) >= 0 and release.wait(20) and [])
    threads = [
        threading.Thread(target=reason, args=("http://example.com/",), kwargs={"seconds": 0.3}) for _ in range(50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)
    assert next(begun) <= 32
    release.set()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (answer(b"x" * 1001), "too_large"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 5000, "too_large"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 1001, "too_large"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nxx", "cut"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "cut"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nxx", "cut"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nxxxxx", "cut"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "cut"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", "cut"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000, "cut"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50_000, "cut"),
        (b"", "cut"),
        (b"\0" * 500, "cut"),
        (b"SSH-2.0-x\r\n\r\n", "cut"),
        (answer(b"x", "200 OK", "Content-Encoding: gzip"), "encoded"),
        (answer(b"x", "200 OK", "content-encoding: identity, br"), "encoded"),
        (answer(b"x", "200 OK", "Content-Encoding: identity", "Content-Encoding: gzip"), "encoded"),
        (answer(b"x", "204 No Content"), "status"),
        (answer(b"x", "404 Not Found"), "status"),
        (answer(b"x", "999 X"), "status"),
        (answer(b"x", "302 Found", "Location: http://example.com/"), "status"),
        (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n", "cut"),
    ],
)
def test_answers_that_cannot_be_used(said, expected):
    with serving(says(said)) as (port, _), pytest.raises(FetchError) as error:
        get(port)
    assert error.value.reason == expected


def test_redirects_are_looked_at_like_the_first_address():
    other = says(answer(b"secret"))
    with serving(other) as (inner, seen):
        targets = {
            f"http://127.0.0.1:{inner}/": "bad_url",
            f"//127.0.0.1:{inner}/": "bad_url",
            "http://127.0.0.1/": "forbidden",
            "http://169.254.169.254/latest/": "forbidden",
            "http://[::1]/": "forbidden",
            "file:///etc/passwd": "bad_url",
            "http://user@127.0.0.1/": "bad_url",
            "http://[": "redirect",
            "/a\tb": "redirect",
            "": "redirect",
        }
        for target, expected in targets.items():
            with serving(says(answer(b"", "302 Found", f"Location: {target}"))) as (port, _):
                with pytest.raises(FetchError) as error:
                    get(port, redirects=3)
                assert error.value.reason == expected, target
        assert not seen


def test_redirects_are_counted_and_followed_on_the_same_host():
    def talk(connection, head):
        step = int(head.split()[1].strip(b"/") or b"0")
        connection.sendall(answer(b"", "307 Go", f"Location: {step + 1}") if step < 3 else answer(b"there"))

    with serving(talk) as (port, heads):
        assert get(port, redirects=3) == b"there"
        assert len(heads) == 4
        with pytest.raises(FetchError, match="more than 2 redirects"):
            get(port, redirects=2)


def test_spaces_and_other_letters_are_sent_as_browsers_send_them(monkeypatch):
    with serving(says(answer(b"picture"))) as (port, heads):
        assert get(port, "/mein Öl bild.png?a=b c#d") == b"picture"
    assert heads[0].startswith(b"GET /mein%20%C3%96l%20bild.png?a=b%20c HTTP/1.1\r\n")

    def talk(connection, head):  # hosts write UTF-8 and spaces in what they redirect to
        moved = answer(b"", "302 Found", "Location: /mein Öl.png".encode().decode("latin-1"))
        connection.sendall(answer(b"there") if b"/mein%20%C3%96l.png " in head else moved)

    with serving(talk) as (port, _):
        assert get(port, redirects=1) == b"there"
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host) or [])
    for url in ("http://bücher.example/", "http://BÜCHER。example./", "https://straße.de/", "http://日本.jp/"):
        assert reason(url) == "no_host"
    hosts = ["xn--bcher-kva.example", "xn--bcher-kva.example", "xn--strae-oqa.de", "xn--wgv71a.jp"]
    assert [host.decode() if isinstance(host, bytes) else host for host in asked] == hosts


def test_a_private_place_is_not_reached_by_a_redirect_from_elsewhere():
    """An image address of an endpoint's reply may lie on the endpoint's own host; no other address leads there."""
    with serving(says(answer(b"secret"))) as (inner, seen):
        location = f"Location: http://127.0.0.1:{inner}/"
        with serving(says(answer(b"", "302 Found", location))) as (outer, _):
            # The way out and back: first place private, then not, then private.
            with pytest.raises(FetchError) as error:
                get(outer, redirects=3, private=[("127.0.0.1", outer)])
            assert error.value.reason == "bad_url" and not seen


def test_a_request_keeps_its_deadline_on_a_connection_that_was_used_before():
    def talk(connection, _):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        connection.recv(1000)
        for _ in range(100):
            connection.sendall(b"H")
            time.sleep(0.05)

    with serving(talk) as (port, heads):
        web = Web()
        assert web.send("GET", f"http://127.0.0.1:{port}/", {}, None, 5.0, 10).body == b"ok"
        begun = time.monotonic()
        with pytest.raises(WebError) as error:
            web.send("GET", f"http://127.0.0.1:{port}/", {}, None, 0.5, 10)
        assert error.value.reason in ("timeout", "cut") and time.monotonic() - begun < 1.0
        assert len(heads) == 1  # it was the same connection


def test_endpoints_are_asked_through_the_proxy_of_the_environment_and_strangers_are_not(monkeypatch):
    with serving(says(answer(b"{}"))) as (port, heads), serving(says(answer(b"direct"))) as (other, _):
        monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{port}")
        monkeypatch.setenv("no_proxy", "127.0.0.2")
        assert proxy_for("http://127.0.0.2/v1") == "" and proxy_for("https://a.example/v1") == ""
        url = "http://a.example/v1/models"
        assert Web(proxy=proxy_for(url)).send("GET", url, {}, None, 5.0, 100).body == b"{}"
        assert heads[0].startswith(b"GET http://a.example/v1/models HTTP/1.1")
        assert b"proxy-authorization: basic" in heads[0].lower()
        assert get(other) == b"direct" and len(heads) == 1
        for proxy in ("socks5://127.0.0.1:1", "http://[", "http://h:abc", "ftp://h"):
            monkeypatch.setenv("http_proxy", proxy)
            with pytest.raises(UserError, match="The environment's proxy for http"):
                proxy_for(url)


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("nan", None),
        ("-5", 0.0),
        ("inf", 60.0),
        ("1e999", 60.0),
        ("7.5", 7.5),
        ("", None),
        ("soon", None),
        ("9" * 5000, 60.0),
        ("Fri, 31 Dec 99999 23:59:59 GMT", None),
        ("Fri, 31 Dec 2100 23:59:59 GMT", 60.0),
        ("Mon, 01 Jan 2001 00:00:00 GMT", 0.0),
    ],
)
def test_how_long_to_wait(said, seconds):
    assert retry_after({"retry-after": said} if said else {}, 60.0) == seconds


@pytest.mark.parametrize(
    "said", ["[" * 10**6, "[" * 65 + "]" * 65, "9" * 5000, b"\xff", "[0" + ",0" * 600_000 + "]", "{", ""]
)
def test_json_that_is_too_deep_too_much_or_none(said):
    with pytest.raises(ValueError):
        read_json(said)


def test_json_within_the_limits():
    assert read_json(b'{"a": [1, {"b": "\\ud800"}]}') == {"a": [1, {"b": "\ud800"}]}
    assert read_json("[" * 64 + "]" * 64)
