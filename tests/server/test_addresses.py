"""Addresses, methods and origins over real HTTP. `test_page_security` asks the same with the page."""

import json

import pytest
from helpers.api_addresses import ANSWERS, check_answer, exchange
from helpers.echo_server import serving

from fusion_jax.errors import UserError
from fusion_jax.server.origins import read_host_names, read_origins

KEY = "a-key-for-the-test"
APP = "https://app.example.org"
JSON = {"Content-Type": "application/json"}


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
    with exchange(port, "OPTIONS", path, headers) as (answer, _):
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
    status_code, names = preflight(server.port, APP, path, method)
    allowed = names["access-control-allow-methods"].split(", ")
    assert status_code == 204 and (method in allowed or status == 405)
    assert names["access-control-allow-headers"] == "authorization, content-type"
    with exchange(server.port, method, path, {"Origin": APP} | headers) as (answer, _):
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
    status_code, names = preflight(server.port, origin)
    with exchange(server.port, "POST", "/v1/chat/completions", JSON | {"Origin": origin}) as (answer, text):
        assert (status_code, answer.status, json.loads(text)["error"]["code"]) == (403, 403, "foreign_origin")
    for one in (names, answer.headers):
        assert "access-control-allow-origin" not in one and one["vary"] == "Origin"
    with exchange(server.port, "GET", "/v1/models", {"Sec-Fetch-Site": "cross-site"}) as (answer, _):
        assert answer.status == 403  # without an origin nobody is named


def test_all_sites_may_where_a_star_says_so(tmp_path):
    with serving(tmp_path, api_key=KEY, origins=read_origins(["*"])) as server:
        for origin in ("https://any.example", "null"):
            status_code, names = preflight(server.port, origin)
            assert status_code == 204 and names["access-control-allow-origin"] == "*"
            assert "access-control-allow-credentials" not in names
            with exchange(server.port, "POST", "/v1/chat/completions", JSON | {"Origin": origin}) as (answer, _):
                assert answer.status == 401 and answer.headers["access-control-allow-origin"] == "*"


def test_a_failure_of_the_server_can_be_read_as_well(server, monkeypatch):
    monkeypatch.setattr(type(server.engine), "silent", property(lambda _: 1 / 0))
    with exchange(server.port, "GET", "/health", {"Origin": APP}) as (answer, text):
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
