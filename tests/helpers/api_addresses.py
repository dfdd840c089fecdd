"""Addresses of the API and what each of them answers, to be checked over real HTTP with and without the page."""

import contextlib
import http.client
import json
from urllib.parse import unquote

CHAT = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}).encode()

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
def exchange(port, method, path, headers=(), body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        body = CHAT if body is None and method == "POST" else body
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        yield answer, answer.read()
    finally:
        connection.close()


def check_answer(port, method, path, status, code, allow):
    with exchange(port, method, path) as (answer, text):
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
