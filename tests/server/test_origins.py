"""What other sites make a browser send to the API; programs that are not browsers go on as before."""

import http.client
import json

import pytest
from helpers.echo_server import serving

KEY = "a-key-for-the-test"
BODY = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}).encode()
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("echo"), host_names=("Demo.Example",)) as one:
        yield one


def ask(server, headers, path="/v1/chat/completions", method="POST"):
    """Status, code of the error and headers of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.request(method, path, BODY if method == "POST" else None, headers)
        answer = connection.getresponse()
        text = answer.read()
        error = json.loads(text).get("error", {}) if answer.headers["content-type"] == "application/json" else {}
        return answer.status, error.get("code"), {name.lower() for name in answer.headers}
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        # Programs: no type need be said, nor is a wrong one of importance.
        ({}, 200, None),
        (JSON, 200, None),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 200, None),
        ({"Host": "localhost:8000"}, 200, None),
        ({"Host": "[::1]:8000"}, 200, None),
        ({"Host": "192.168.1.7"}, 200, None),
        ({"Host": "workstation:8000"}, 200, None),
        ({"Host": "model.default.svc.cluster.local:8000"}, 200, None),
        ({"Host": "demo.example"}, 200, None),
        ({"Host": "DEMO.Example.:443"}, 200, None),
        ({"Host": "LocalHost.:8000"}, 200, None),
        ({"Host": "[0:0::1]:443"}, 200, None),
        ({"Host": "[fe80::1%25eth0]:8000"}, 200, None),
        # Names that a stranger can point at this server.
        ({"Host": "evil.example"}, 421, "unknown_host"),
        ({"Host": "EVIL.example:8000"}, 421, "unknown_host"),
        ({"Host": "127.0.0.1.evil.example"}, 421, "unknown_host"),
        ({"Host": "localhost.evil.example"}, 421, "unknown_host"),
        ({"Host": "x.demo.example"}, 421, "unknown_host"),
        ({"Host": "evillocal.example"}, 421, "unknown_host"),
        ({"Host": "evil.example@localhost"}, 421, "unknown_host"),
        ({"Host": "evil.example:80@localhost"}, 421, "unknown_host"),
        ({"Host": "[::1].evil.example"}, 421, "unknown_host"),
        ({"Host": "[::1]evil.example:80"}, 421, "unknown_host"),
        ({"Host": "[localhost]"}, 421, "unknown_host"),
        ({"Host": "localhost:evil.example"}, 421, "unknown_host"),
        ({"Host": "localhost/evil.example"}, 421, "unknown_host"),
        ({"Host": "localhost, evil.example"}, 421, "unknown_host"),
        ({"Host": "localhost:"}, 200, None),
        ({"Host": "["}, 421, "unknown_host"),
        ({"Host": "demo.example.."}, 421, "unknown_host"),
        ({"Host": "."}, 421, "unknown_host"),
        ({"Host": "evil.example."}, 421, "unknown_host"),
        ({"Host": ""}, 421, "unknown_host"),
        ({"Host": "evil.example", "Origin": "http://evil.example"} | JSON, 421, "unknown_host"),
        ({"Host": "evil.example", "Sec-Fetch-Site": "same-origin"} | JSON, 421, "unknown_host"),
        # Pages of other sites.
        ({"Origin": "http://evil.example"}, 403, "foreign_origin"),
        ({"Origin": "http://evil.example", "Content-Type": "text/plain"}, 403, "foreign_origin"),
        ({"Origin": "null"} | JSON, 403, "foreign_origin"),
        ({"Origin": "http://localhost:1"} | JSON, 403, "foreign_origin"),
        ({"Sec-Fetch-Site": "cross-site"} | JSON, 403, "foreign_origin"),
        ({"Sec-Fetch-Site": "same-site"} | JSON, 403, "foreign_origin"),
        ({"Host": "demo.example", "Origin": "https://demo.example:8443"} | JSON, 403, "foreign_origin"),
        ({"Host": "demo.example:443", "Origin": "http://demo.example"} | JSON, 403, "foreign_origin"),
        ({"Host": "demo.example:80", "Origin": "https://demo.example"} | JSON, 403, "foreign_origin"),
        # Pages of this server's own name, behind a proxy that writes the port, or leaves it out.
        ({"Host": "demo.example:443", "Origin": "https://demo.example"} | JSON, 200, None),
        ({"Host": "demo.example", "Origin": "https://demo.example:443"} | JSON, 200, None),
        ({"Host": "DEMO.example:80", "Origin": "http://demo.example"} | JSON, 200, None),
        ({"Host": "demo.example.", "Origin": "https://demo.example"} | JSON, 200, None),
        ({"Host": "[::1]:80", "Origin": "http://[0:0::1]"} | JSON, 200, None),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8000"} | JSON, 200, None),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://proxy.example"} | JSON, 200, None),
        ({"Sec-Fetch-Site": "none", "Content-Type": "application/json; charset=utf-8"}, 200, None),
        ({"Sec-Fetch-Site": "same-origin", "Content-Type": "text/plain"}, 415, "unsupported_type"),
        ({"Host": "a:8", "Origin": "http://a:8"}, 415, "unsupported_type"),
    ],
)
def test_other_sites_cannot_use_the_api(server, headers, status, code):
    found, reply, names = ask(server, headers)
    assert (found, reply) == (status, code)
    assert not [name for name in names if name.startswith("access-control")]
    if status in (403, 421):
        assert ask(server, headers, "/v1/models", "GET")[:2] == (status, code)
    assert not server.engine.reserved


def test_health_and_metrics_answer_under_every_name(server):
    for headers in ({"Host": "node-7.example.com:8000"}, {"Origin": "http://evil.example"}):
        for path in ("/health", "/metrics"):
            status, _, names = ask(server, headers, path, "GET")
            assert status == 200 and not [name for name in names if name.startswith("access-control")]


def test_a_browser_is_not_allowed_to_ask(server):
    asks = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    status, _, names = ask(server, asks, method="OPTIONS")
    assert status == 403 and not [name for name in names if name.startswith("access-control")]


def test_a_key_opens_every_name_and_no_other_site(tmp_path):
    shown = {"Authorization": f"Bearer {KEY}"}
    with serving(tmp_path, api_key=KEY) as server:
        assert ask(server, shown | {"Host": "any.example"})[0] == 200
        assert ask(server, {"Host": "any.example"})[:2] == (401, "invalid_api_key")
        assert ask(server, shown | {"Origin": "http://evil.example"} | JSON)[:2] == (403, "foreign_origin")
        assert ask(server, shown | {"Sec-Fetch-Site": "same-origin"})[:2] == (415, "unsupported_type")
