"""Addresses, methods and origins over real HTTP. `test_page_security` asks the same with the page."""

import contextlib
import http.client
import json
from urllib.parse import unquote

import pytest
from helpers.echo_server import serving

from fusion_jax.errors import UserError
from fusion_jax.server.origins import read_host_names, read_origins

KEY = "a-key-for-the-test"
APP = "https://app.example.org"
CHAT = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}).encode()
JSON = {"Content-Type": "application/json"}

# Method, address, status, code of the error, methods that are allowed.
ANSWERS = [
    ("GET", "/health", 200, None, None),
    ("HEAD", "/health", 200, None, None),
    ("HEAD", "/health/", 200, None, None),
    ("GET", "//health", 200, None, None),
    ("POST", "/health", 405, "method_not_allowed", "GET, HEAD"),
    ("OPTIONS", "/health", 405, "method_not_allowed", "GET, HEAD"),
    ("DELETE", "/metrics", 405, "method_not_allowed", "GET, HEAD"),
    ("HEAD", "/metrics/", 200, None, None),
    ("GET", "/v1/models/", 200, None, None),
    ("HEAD", "/v1/models", 200, None, None),
    ("GET", "/v1/models/org/fusion", 200, None, None),
    ("GET", "/v1/models/org%2Ffusion/", 200, None, None),
    ("GET", "/v1/models/fusion", 404, "model_not_found", None),
    ("PUT", "/v1/models", 405, "method_not_allowed", "GET, HEAD"),
    ("POST", "/v1/chat/completions/", 200, None, None),
    ("POST", "/v1//chat/completions", 200, None, None),
    ("POST", "//v1/chat/completions//", 200, None, None),
    ("GET", "/v1/chat/completions", 405, "method_not_allowed", "POST"),
    ("HEAD", "/v1/chat/completions", 405, None, "POST"),
    ("OPTIONS", "/v1/chat/completions", 405, "method_not_allowed", "POST"),
    ("PATCH", "/v1/chat/completions/", 405, "method_not_allowed", "POST"),
    ("POST", "/v1/completions", 404, "not_found", None),
    ("POST", "/v1/completions/", 404, "not_found", None),
    ("POST", "/v1/embeddings", 404, "not_found", None),
    ("GET", "/v1", 404, "not_found", None),
    ("GET", "/v1/", 404, "not_found", None),
    ("POST", "/chat/completions", 404, "not_found", None),
    ("GET", "/nothing", 404, "not_found", None),
    ("GET", "/healthy", 404, "not_found", None),
    ("GET", "/docs/", 404, "not_found", None),
    ("DELETE", "/nothing/at/all/", 404, "not_found", None),
    ("HEAD", "/nothing", 404, None, None),
    ("GET", "/gradio_api/info", 404, "not_found", None),
    ("GET", "/assets/none.js", 404, "not_found", None),
    ("GET", "/%C3%96l%20bild", 404, "not_found", None),
]


@contextlib.contextmanager
def asked(port, method, path, headers=(), body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        body = CHAT if body is None and method == "POST" else body
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        yield answer, answer.read()
    finally:
        connection.close()


def check_answer(port, method, path, status, code, allow):
    with asked(port, method, path) as (answer, text):
        assert (answer.status, answer.headers["allow"]) == (status, allow), text
        assert "location" not in answer.headers
        if method == "HEAD":
            assert not text and (int(answer.headers["content-length"]) > 0)
        elif status != 200:
            error = json.loads(text)["error"]
            assert error["code"] == code and set(error) == {"message", "type", "param", "code"}
            if path.startswith("/assets") or code == "model_not_found":
                return
            assert f"{method} {unquote(path)[:5]}" in error["message"]
            assert code != "not_found" or "POST /v1/chat/completions" in error["message"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("echo"), model="org/fusion", origins=read_origins([APP])) as one:
        yield one


@pytest.mark.parametrize(("method", "path", "status", "code", "allow"), ANSWERS)
def test_every_address_answers_in_the_form_of_the_api(server, method, path, status, code, allow):
    check_answer(server.port, method, path, status, code, allow)


# ---- Other sites.


def preflight(port, origin, path="/v1/chat/completions", method="POST", names="authorization, content-type"):
    headers = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": names}
    with asked(port, "OPTIONS", path, headers) as (answer, _):
        return answer.status, answer.headers


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/v1/chat/completions", JSON, 200),
        ("POST", "/v1/chat/completions/", JSON, 200),
        ("POST", "/v1/chat/completions", JSON | {"Sec-Fetch-Site": "cross-site"}, 200),
        ("POST", "/v1/chat/completions", {"Content-Type": "text/plain"}, 415),
        ("GET", "/v1/chat/completions", {}, 405),
        ("GET", "/v1/models", {}, 200),
        ("GET", "/v1/models/none", {}, 404),
        ("POST", "/v1/completions", JSON, 404),
        ("POST", "/chat/completions", JSON, 404),
        ("GET", "/health", {}, 200),
        ("GET", "/v1/models", {"Host": "evil.example"}, 421),
    ],
)
def test_a_site_that_is_named_may_read_all_answers(server, method, path, headers, status):
    told, names = preflight(server.port, APP, path, method)
    allowed = names["access-control-allow-methods"].split(", ")
    assert told == 204 and (method in allowed or status == 405)
    assert names["access-control-allow-headers"] == "authorization, content-type"
    with asked(server.port, method, path, {"Origin": APP} | headers) as (answer, _):
        assert answer.status == status
    for one in (names, answer.headers):
        assert one["access-control-allow-origin"] == APP and one["access-control-allow-credentials"] == "true"
        assert "Origin" in one["vary"].split(", ")


@pytest.mark.parametrize(
    "origin",
    [
        *("http://app.example.org", "https://app.example.org:8443", "https://x.app.example.org", "null", ""),
        *("https://app.example.org.evil.example", "https://evil.example/https://app.example.org", "app.example.org"),
    ],
)
def test_other_sites_may_not_and_hear_it_at_once(server, origin):
    told, names = preflight(server.port, origin)
    with asked(server.port, "POST", "/v1/chat/completions", JSON | {"Origin": origin}) as (answer, text):
        assert (told, answer.status, json.loads(text)["error"]["code"]) == (403, 403, "foreign_origin")
    for one in (names, answer.headers):
        assert "access-control-allow-origin" not in one and one["vary"] == "Origin"
    with asked(server.port, "GET", "/v1/models", {"Sec-Fetch-Site": "cross-site"}) as (answer, _):
        assert answer.status == 403  # without an origin nobody is named


def test_all_sites_may_where_a_star_says_so(tmp_path):
    with serving(tmp_path, api_key=KEY, origins=read_origins(["*"])) as server:
        for origin in ("https://any.example", "null"):
            told, names = preflight(server.port, origin)
            assert told == 204 and names["access-control-allow-origin"] == "*"
            assert "access-control-allow-credentials" not in names
            with asked(server.port, "POST", "/v1/chat/completions", JSON | {"Origin": origin}) as (answer, _):
                assert answer.status == 401 and answer.headers["access-control-allow-origin"] == "*"


def test_a_failure_of_the_server_can_be_read_as_well(server, monkeypatch):
    monkeypatch.setattr(type(server.engine), "silent", property(lambda _: 1 / 0))
    with asked(server.port, "GET", "/health", {"Origin": APP}) as (answer, text):
        assert answer.status == 500 and json.loads(text)["error"]["code"] == "internal_error"
        assert answer.headers["access-control-allow-origin"] == APP
    server.errors.clear()


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["https://App.Example.org/", "HTTP://a.example:80"], ("https://app.example.org", "http://a.example")),
        (["https://a.example:443", "http://[::0001]:8080"], ("https://a.example", "http://[::1]:8080")),
        (
            ["https://bücher.example", "http://localhost:3000"],
            ("https://xn--bcher-kva.example", "http://localhost:3000"),
        ),
        (["chrome-extension://abcdefgh", "app://obsidian.md"], ("chrome-extension://abcdefgh", "app://obsidian.md")),
        (["*"], ("*",)),
        ([], ()),
    ],
)
def test_origins_are_read_as_browsers_send_them(given, read):
    assert read_origins(given) == read


@pytest.mark.parametrize(
    "text", ["app.example.org", "https://", "https://a/b", "null", "https://*.a", "//a", "a b://c"]
)
def test_what_is_no_origin_is_said(text):
    with pytest.raises(UserError, match="--cors_origins"):
        read_origins([text])
    with pytest.raises(UserError, match="give it alone"):
        read_origins(["*", "https://a.example"])


def test_host_names_are_read_as_browsers_send_them():
    assert read_host_names(["Demo.Example.", "bücher.example", "[::1]"]) == (
        "demo.example",
        "xn--bcher-kva.example",
        "::1",
    )
    for text in ("https://demo.example", "demo.example:443", "a b", "", "demo.example/x"):
        with pytest.raises(UserError, match="--host_names"):
            read_host_names([text])
