"""What strangers may send to the page, over real HTTP: files, addresses, other visitors' sessions, uploads, logins."""

import time

import jax
import pytest
from helpers.api_addresses import ANSWERS, check_answer
from helpers.page_site import JOIN, file, httpx, listener, page, png

from fusion_jax.errors import UserError
from fusion_jax.server import gradio_proxy
from fusion_jax.server.page_text import problem_text
from fusion_jax.server.pictures import Busy
from fusion_jax.server.requests import Closing, Full

CANARY = "a-secret-that-stays-here"


def disguises(path):
    """Values by which Gradio has been brought to read a path or an address."""
    plain = file(path)
    message = {"role": "user", "content": [{"type": "file", "file": plain}]}
    return [
        plain,
        file(path, url=path, orig_name="a.svg", is_stream=False),
        file("a.png", url=path),
        {"path": path},
        {"url": path, "meta": {"_type": "gradio.FileData"}},
        {"path": None, "url": f"/gradio_api/file={path}", "meta": {"_type": "gradio.FileData"}},
        {"value": plain, "__type__": "update"},
        {"image": plain},
        [plain],
        [message],
        [{"role": "user", "content": plain}],
        [[plain, None]],
        {"background": plain, "layers": [plain], "composite": plain},
    ]


def test_no_event_hands_out_a_file_of_the_server(site, visitor, secret):
    tried = 0
    # The history once was an input, and the way in.
    history = [{"role": "user", "content": [{"type": "file", "file": file(secret)}]}]
    assert visitor.join(0, ["Hello", None, history, 0, 16]).status_code == 400
    for path in (secret, f"file://{secret}", f"../../../../../..{secret}", "/proc/self/environ"):
        for value in disguises(path):
            for number, kinds in visitor.kinds.items():
                for place in range(len(kinds)):
                    values = ["Hello"] * len(kinds)
                    values[place] = value
                    answer = visitor.join(number, values)
                    assert answer.status_code in (400, 403) and CANARY not in answer.text, (number, values)
                    tried += 1
    assert tried > 200
    root = page.gradio_environment.FOLDER
    assert not [path for path in root.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


@pytest.mark.parametrize("form", ["file={}", "file/{}", "file=.{}", "proxy={}", "file=/{}", "file=%2e%2e{}"])
def test_no_address_of_files_serves_one(visitor, secret, form):
    for path in (secret, "/proc/self/environ", "/etc/passwd"):
        answer = visitor.http.get("/gradio_api/" + form.format(path))
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"


def test_the_server_fetches_no_address(visitor):
    with listener() as (address, hits):
        for target in (f"{address}/a.png", address.replace("http", "https") + "/a.png"):
            for value in disguises(target):
                for number, kinds in visitor.kinds.items():
                    for place in range(len(kinds)):
                        values = ["Hello"] * len(kinds)
                        values[place] = value
                        assert visitor.join(number, values).status_code in (400, 403)
            for form in ("file={}", "proxy={}", "file/{}"):
                assert visitor.http.get("/gradio_api/" + form.format(target)).status_code == 404
        for name in ("Referer", "X-Forwarded-Host", "X-Gradio-Server", "X-Direct-Url", "X-Gradio-History-Bucket"):
            visitor.http.get("/", headers={name: address})
            visitor.join(visitor.number("radio"), ["x"], event_data={"path": address})
        time.sleep(0.1)
        assert not hits


SERVED = """/config /gradio_api/info /gradio_api/openapi.json /gradio_api/token /gradio_api/user /gradio_api/app_id
    /gradio_api/dev/reload /gradio_api/deep_link?session_hash=x /gradio_api/heartbeat/x /gradio_api/queue/status
    /gradio_api/startup-events /gradio_api/runs /gradio_api/run-history/buckets /gradio_api/stream/a/b/1/playlist-file
    /gradio_api/custom_component/a/client/b/c /gradio_api/mcp/sse /gradio_api/call/reply/x /gradio_api/vibe-code
    /gradio_api/upload_progress?upload_id=x /gradio_api/profiling/traces /monitoring /monitoring/summary /logout /docs
    /svelte/svelte.js /pwa_icon /robots.txt /openapi.json /login_check /theme.css/x /assets/../../routes.py
    /assets/%2e%2e/%2e%2e/index.html /static/..%2f..%2findex.html /assets//etc/passwd /v1/nothing
    /static /assets/ /static/fonts /static/%00 /static/bokeh/3.8.1 /assets/..js /assets/a/.b.js"""


@pytest.mark.parametrize("path", [*SERVED.split(), "/static/" + "x" * 5000, "/assets" + "/x" * 90])
def test_only_what_the_page_needs_is_served(visitor, path):
    assert visitor.http.get(path).status_code == 404


@pytest.mark.parametrize(
    "row", [row for row in ANSWERS if row[3] != "model_not_found" and (row[2] != 200 or "health" in row[1])]
)
def test_every_address_answers_as_it_does_without_the_page(site, row):
    check_answer(httpx.URL(site[0]).port, *row)


def test_the_pages_own_addresses_take_their_methods(site, visitor):
    for method, path, allowed in (
        ("POST", "/", "GET, HEAD"),
        ("GET", JOIN, "POST"),
        ("PUT", "/theme.css", "GET, HEAD"),
    ):
        answer = visitor.http.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
        assert answer.json()["error"]["code"] == "method_not_allowed"
    for path in ("/", "/theme.css"):
        assert visitor.http.head(path).status_code == 200


RUN = """run/predict api/predict run/reply call/reply call/v2/reply component_server process_recording vibe-edit
    stream/x run-history/connect profiling/clear queue/data file=x queue/join/x"""


@pytest.mark.parametrize("path", RUN.split())
def test_only_what_the_page_needs_is_run(visitor, path):
    body = {"data": ["Hello", None, 0, 16], "fn_index": 0, "session_hash": "abc", "fn_name": "x", "component_id": 1}
    status = 405 if path in ("queue/data", "file=x") else 404
    assert visitor.http.post(f"/gradio_api/{path}", json=body).status_code == status
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        answer = visitor.http.request(method, JOIN, json=body)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"data": ["x"]}, 400),
        ({"data": ["x", None, 0, 16, 1]}, 400),
        ({"data": {"0": "x"}}, 400),
        ({"data": [1, None, 0, 16]}, 400),
        ({"data": ["x", None, "0", 16]}, 400),
        ({"data": ["x", None, True, 16]}, 400),
        ({"data": ["x", None, None, 16]}, 400),
        ({"data": ["x", None, 0, None]}, 400),
        ({"data": ["x", None, 1e300, 16]}, 400),
        ({"data": ["x", "a.png", 0, 16]}, 400),
        ({"data": ["x" * (gradio_proxy.LONGEST_TEXT + 1), None, 0, 16]}, 413),
        ({"data": ["x" * gradio_proxy.EVENT_BYTES, None, 0, 16]}, 413),
        ({"fn_index": 99}, 400),
        ({"fn_index": "0"}, 400),
        ({"fn_index": True}, 400),
        ({"fn_index": None, "api_name": "reply"}, 400),
        ({"session_hash": None}, 400),
        ({"session_hash": "a-b"}, 400),
        ({"session_hash": "a" * 41}, 400),
        ({"session_hash": ["a"]}, 400),
        ({"trigger_id": [1]}, 400),
    ],
)
def test_an_event_is_exactly_what_the_page_sends(visitor, change, status):
    body = {"fn_index": 0, "data": ["x", None, 0, 16], "session_hash": "abc", "trigger_id": None}
    answer = visitor.http.post(JOIN, json=body | change)
    assert answer.status_code == status and list(answer.json()) == ["detail", "error"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"fn_index": 0, "session_hash": "abc", "data": ["x", null, NaN, 16]}',
        b'{"fn_index": 0, "session_hash": "abc", "data": ["x", null, Infinity, 16]}',
        b'{"fn_index": ' + b"1" * 10_000 + b"}",
    ],
)
def test_a_body_that_is_no_event_is_refused(visitor, body):
    assert visitor.http.post(JOIN, content=body, headers={"Content-Type": "application/json"}).status_code == 400


def test_what_gradio_reads_is_what_was_checked(site, visitor):
    """A key given twice is read once, and nothing that was not checked goes on."""
    body = """{"fn_index": 99, "fn_index": 0, "session_hash": "x-y", "session_hash": "abc123", "batched": true,
    "data": [1], "data": ["Twice?", null, 0, 16], "event_data": {"path": "/etc/passwd"}, "event_id": "mine"}"""
    answer = visitor.http.post(JOIN, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200 and answer.json()["event_id"] != "mine"
    assert [m for m in visitor.events() if m["msg"] == "process_completed"][-1]["success"]
    assert site[1].records[-1].turns == [{"from": "human", "value": "Twice?"}]


# ---- The page as it is meant to be used.


def test_a_conversation_is_remembered_here(site, visitor):
    first = visitor.image(png())
    assert visitor.ask("What is it?", first)[0][-1]["content"] == [{"text": "An answer.", "type": "text"}]
    assert site[1].records[-1].images == (png(),)
    visitor.ask("And now?", first)
    turns = [("human", "What is it?"), ("gpt", "An answer."), ("human", "And now?")]
    assert [(t["from"], t["value"]) for t in site[1].records[-1].turns] == turns
    shown = visitor.look("now", first)
    assert httpx.get(site[0] + shown["url"].removeprefix(site[0])).status_code == 403  # nobody else's
    answer = visitor.http.get(shown["url"])
    assert answer.headers["content-type"] == "image/png" and answer.content.startswith(b"\x89PNG")
    # "New conversation" is the function that takes nothing and changes most.
    again = max((d for d in visitor.config["dependencies"] if not d["inputs"]), key=lambda d: len(d["outputs"]))
    visitor.run(again["id"], [])
    visitor.ask("Anew?")
    assert [t["value"] for t in site[1].records[-1].turns] == ["Anew?"] and not site[1].records[-1].images
    assert "Upload an image first." in visitor.run(visitor.number("textbox", "image"), ["Anew", None])[2]


def test_two_questions_at_once_leave_roles_that_take_turns(site, visitor):
    engine = site[1]
    engine.go.clear()
    number = visitor.number("textbox", "image", "slider", "slider")
    for question in ("First?", "Second?"):
        assert visitor.join(number, [question, None, 0, 16]).status_code == 200
        for _ in range(500):
            if engine.records and engine.records[-1].turns[-1]["value"] == question:
                break
            time.sleep(0.01)
    engine.go.set()
    assert len([m for m in visitor.events() if m["msg"] == "process_completed" and m["success"]]) == 2
    visitor.ask("Third?")
    who = [turn["from"] for turn in engine.records[-1].turns]
    assert who == ["human", "gpt"] * (len(who) // 2) + ["human"]


def test_settings_beyond_what_is_served_are_said(visitor):
    number = visitor.number("textbox", "image", "slider", "slider")
    assert "temperature" in visitor.run(number, ["Hello", None, -1, 16])[3]
    assert "Write a question first." in visitor.run(number, [None, None, 0, 16])[3]


def test_answers_are_shown_as_plain_text(visitor):
    chat = next(c for c in visitor.config["components"] if c["type"] == "chatbot")["props"]
    assert not chat["render_markdown"] and chat["sanitize_html"] and not chat["allow_tags"]
    assert chat["latex_delimiters"] == []
    policy = visitor.http.get("/").headers["content-security-policy"]
    # Whatever came through still could not call anywhere.
    assert {"default-src 'self'", "img-src 'self' data: blob:", "connect-src 'self'"} <= set(policy.split("; "))


@pytest.mark.parametrize(
    ("refusal", "text"),
    [
        (Busy(), "Another picture is being drawn"),
        (Full(), "Too many requests are waiting"),
        (Closing(), "shutting down"),
        (UserError("The word is not there."), "The word is not there."),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"), "no memory left"),
        (ZeroDivisionError(), "The server failed; its log says why."),
    ],
)
def test_the_page_says_why(refusal, text):
    assert text in problem_text(refusal)
