"""What strangers may send to the page, over real HTTP: files, addresses, other visitors' sessions, uploads, logins."""

import io
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest
from page_site import CANCEL, DATA, JOIN, UPLOAD, Browser, Engine, file, httpx, listener, page, png, served
from PIL import Image
from starlette.testclient import TestClient

from fusion_jax.errors import BadRecord, UserError
from fusion_jax.serve import api, gate, protocol, uploads, visitors
from fusion_jax.serve.engine import Closing, Full
from fusion_jax.serve.pictures import Busy

CANARY = "a-secret-that-stays-here"
KEY = "a-key-for-the-test"


@pytest.fixture(scope="module")
def site():
    with served() as site:
        yield site


@pytest.fixture
def visitor(site):
    site[1].go.set()
    with Browser(site[0]) as one:
        yield one


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text(CANARY)
    path.chmod(0o600)
    return str(path)


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
    root = page.gradio_alone.FOLDER
    assert not [path for path in root.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


@pytest.mark.parametrize("form", ["file={}", "file/{}", "file=.{}", "proxy={}", "file=/{}", "file=%2e%2e{}"])
def test_no_address_of_files_serves_one(visitor, secret, form):
    for path in (secret, "/proc/self/environ", "/etc/passwd"):
        answer = visitor.http.get("/gradio_api/" + form.format(path))
        assert answer.status_code == 404 and answer.json() == {"detail": "Not found."}


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


RUN = """run/predict api/predict run/reply call/reply call/v2/reply component_server process_recording vibe-edit
    stream/x run-history/connect profiling/clear queue/data file=x queue/join/x"""


@pytest.mark.parametrize("path", RUN.split())
def test_only_what_the_page_needs_is_run(visitor, path):
    body = {"data": ["Hello", None, 0, 16], "fn_index": 0, "session_hash": "abc", "fn_name": "x", "component_id": 1}
    assert visitor.http.post(f"/gradio_api/{path}", json=body).status_code == 404
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert visitor.http.request(method, JOIN, json=body).status_code == 404


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"data": ["x"]}, 400),
        ({"data": ["x", None, 0, 16, 1]}, 400),
        ({"data": {"0": "x"}}, 400),
        ({"data": [1, None, 0, 16]}, 400),
        ({"data": ["x", None, "0", 16]}, 400),
        ({"data": ["x", None, True, 16]}, 400),
        ({"data": ["x", None, 1e300, 16]}, 400),
        ({"data": ["x", "a.png", 0, 16]}, 400),
        ({"data": ["x" * (gate.LONGEST_TEXT + 1), None, 0, 16]}, 413),
        ({"data": ["x" * gate.EVENT_BYTES, None, 0, 16]}, 413),
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
    assert answer.status_code == status and list(answer.json()) == ["detail"]


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
    assert "Upload an image first" in visitor.run(visitor.number("textbox", "image"), ["Anew", None])


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
    assert "temperature" in visitor.run(number, ["Hello", None, -1, 16])
    assert "Write a question" in visitor.run(number, [None, None, 0, 16])


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
    ],
)
def test_the_page_says_why(refusal, text):
    with pytest.raises(page.gr.Error) as caught, page._errors():
        raise refusal
    assert text in caught.value.message


# ---- Uploads.


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        b"<html><script>alert(1)</script></html>",
        b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\x89PNG\r\n\x1a\n",
    ],
)
def test_only_images_are_kept(visitor, data):
    for name in ("a.png", "a.html", "a.svg"):
        answer = visitor.upload(data, name)
        assert answer.status_code == 415 and answer.text.startswith("This is no image")
    assert visitor.http.get("/gradio_api/file=a.html").status_code == 404


@pytest.mark.parametrize("name", ["../../a.html", "/etc/passwd", "a\x00b.png", "x" * 5000, "..", "a.html", "é.svg", ""])
def test_a_name_of_a_file_says_nothing(visitor, name):
    data = png()
    answer = visitor.http.post(
        UPLOAD,
        content=(
            b'--b\r\nContent-Disposition: form-data; name="files"; filename="'
            + name.encode()
            + b'"\r\nContent-Type: text/html\r\n\r\n'
            + data
            + b"\r\n--b--\r\n"
        ),
        headers={"Content-Type": "multipart/form-data; boundary=b"},
    )
    if answer.status_code != 200:  # not even a form
        assert answer.status_code == 400
        return
    (kept,) = answer.json()
    assert len(kept) == 36 and kept.endswith(".png") and int(kept[:32], 16)
    shown = visitor.http.get(f"/gradio_api/file={kept}")
    assert shown.content == data and shown.headers["content-type"] == "image/png"
    assert shown.headers["x-content-type-options"] == "nosniff"
    assert shown.headers["content-security-policy"] == "default-src 'none'; sandbox"


def test_pages_in_the_shape_of_images_are_shown_as_images(visitor):
    made = io.BytesIO()
    Image.new("P", (1, 1)).save(made, "GIF")
    (kept,) = visitor.upload(made.getvalue() + b"<script>alert(1)</script>", "a.html").json()
    shown = visitor.http.get(f"/gradio_api/file={kept}")
    assert shown.headers["content-type"] == "image/gif" and shown.headers["x-content-type-options"] == "nosniff"


def test_an_upload_is_its_browsers_alone(site, visitor):
    image = visitor.image()
    with Browser(site[0]) as other:
        assert other.http.get(f"/gradio_api/file={image['path']}").status_code == 404
        answer = other.join(0, ["Mine?", image, 0, 16])
        assert answer.status_code == 403 and "not among your uploads" in answer.json()["detail"]
    assert visitor.ask("Mine?", image)[0]


def test_an_upload_is_one_file_of_a_form(visitor):
    two = [("files", ("a.png", png(), "image/png"))] * 2
    assert visitor.http.post(UPLOAD, files=two).status_code == 400
    assert visitor.http.post(UPLOAD, files=[("other", ("a.png", png(), "image/png"))]).status_code == 400
    assert visitor.http.post(UPLOAD, data={"files": "text"}).status_code == 400
    assert visitor.http.post(UPLOAD, json={"files": [file("/etc/passwd")]}).status_code == 400
    assert visitor.http.post(UPLOAD, content=b"--b", headers={"Content-Type": "multipart/form-data"}).status_code == 400


def test_uploads_are_bounded_in_all():
    noise = png((64, 64), None) + bytes(50_000)
    with served(image_bytes=60_000, upload_bytes=200_000) as (address, _), Browser(address) as one:
        large = one.upload(png() + bytes(60_000))
        assert large.status_code == 413 and "60000 bytes" in large.text
        assert one.upload(png() + bytes(10_000_000)).status_code == 413
        with ThreadPoolExecutor(8) as pool:
            found = sorted(answer.status_code for answer in pool.map(lambda _: one.upload(noise), range(8)))
        assert found == [200] * 3 + [507] * 5
        assert one.upload(noise).text == "The server has no room for another image; try again later."


def test_uploads_make_room_with_time(tmp_path, monkeypatch):
    store, data = uploads.Uploads(tmp_path, 3 * len(png()), files=3), png()
    names = [store.add("a", data) for _ in range(3)]
    with pytest.raises(uploads.NoRoom):
        store.add("b", data)
    now = time.monotonic()
    monkeypatch.setattr(uploads.time, "monotonic", lambda: now + uploads.SPARED + 1)
    newest = store.add("b", data)
    with pytest.raises(BadRecord):
        store.path(names[0], "a")
    assert store.read(names[1], "a")[0] == store.read(str(store.folder / newest), "b")[0] == data
    monkeypatch.setattr(uploads.time, "monotonic", lambda: now + uploads.KEPT + 1)
    store.sweep()
    assert [path.name for path in store.folder.iterdir()] == [newest]
    assert store.folder.stat().st_mode & 0o777 == 0o700
    store.close()
    assert not store.folder.exists()


def test_only_the_file_that_was_written_is_read(tmp_path, secret):
    store = uploads.Uploads(tmp_path, 1 << 20)
    for planted in (os.symlink, os.link):
        name = store.add("a", png())
        (store.folder / name).unlink()
        planted(secret, store.folder / name)
        with pytest.raises(BadRecord):
            store.read(name, "a")
    name = store.add("a", png())
    (store.folder / name).unlink()
    os.mkfifo(store.folder / name)
    for given in (name, secret, f"../{Path(secret).name}", str(store.folder), "", "."):
        with pytest.raises(BadRecord):
            store.read(given, "a")


# ---- Who asks.


def test_another_browser_neither_hears_nor_cancels(site, visitor):
    engine = site[1]
    engine.go.clear()
    event = visitor.join(0, ["Mine alone?", None, 0, 16]).json()["event_id"]
    for _ in range(200):
        if engine.records and engine.records[-1].turns[-1]["value"] == "Mine alone?":
            break
        time.sleep(0.01)
    with Browser(site[0], session=visitor.session) as other:
        other.http.post(CANCEL, json={"session_hash": visitor.session, "fn_index": 0, "event_id": "0" * 32})
        heard = other.http.get(DATA, params={"session_hash": visitor.session}).text
        assert "Mine" not in heard and "answer" not in heard.lower()
        owner = httpx.get(site[0] + DATA, params={"session_hash": visitor.session})
        assert owner.status_code == 403  # nor without a cookie
    engine.go.set()
    assert [m for m in visitor.events() if m["msg"] == "process_completed"][-1]["success"]
    assert visitor.ask("Still there?")[0][-1]["content"][0]["text"] == "An answer."
    assert len(site[1].records[-1].turns) == 3 and len(event) == 32


def test_an_answer_can_be_stopped(site, visitor):
    engine = site[1]
    engine.go.clear()
    event = visitor.join(0, ["Stop?", None, 0, 16]).json()["event_id"]
    body = {"session_hash": visitor.session, "fn_index": 0, "event_id": event}
    assert visitor.http.post(CANCEL, json=body).status_code == 200
    assert visitor.http.post(CANCEL, json=body | {"event_id": "../x"}).status_code == 400
    engine.go.set()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Host": "evil.example"}, 421),
        ({"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Host": ""}, 421),
        ({"Cookie": "a=b"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://proxy.example"}, 200),
        ({"Host": "localhost"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "workstation:8000", "Origin": "http://workstation:8000"}, 200),
    ],
)
def test_another_site_cannot_use_the_page(site, visitor, headers, status):
    cookies = "; ".join(f"{name}={value}" for name, value in visitor.http.cookies.items())
    body = json.dumps({"fn_index": visitor.number("radio"), "data": ["x"], "session_hash": "other"})
    sent = {"Cookie": cookies, "Content-Type": "application/json"} | headers
    answer = httpx.post(site[0] + JOIN, content=body, headers=sent)
    assert answer.status_code == status, answer.text
    assert not [name for name in answer.headers if name.startswith("access-control")]
    if status == 421:
        assert httpx.get(site[0], headers=headers).status_code == 421


def test_a_name_can_be_allowed():
    with served(names=["Demo.Example"]) as (address, _):
        assert httpx.get(address, headers={"Host": "demo.example:80"}).status_code == 200
        assert httpx.get(address, headers={"Host": "x.demo.example"}).status_code == 421


def test_cookies_are_the_servers_alone(site):
    answer = httpx.get(site[0])
    assert answer.headers["set-cookie"].endswith("; Path=/; HttpOnly; SameSite=Lax")
    other = httpx.get(site[0], headers={"Cookie": answer.headers["set-cookie"].split("=")[0] + "=forged"})
    assert "set-cookie" in other.headers


def test_without_the_key_nothing_but_the_login_is_served(monkeypatch):
    monkeypatch.setattr(visitors, "WRONG_KEY_SECONDS", 0.3)
    with served(key=KEY) as (address, _), Browser(address) as one:
        page_of_login = one.http.get("/", headers={"Host": "any.example"})
        assert page_of_login.status_code == 200 and "gradio" not in page_of_login.text.lower()
        for answer in (
            one.upload(),
            one.http.post(JOIN, json={"fn_index": 0, "data": ["x", None, 0, 16], "session_hash": "abc"}),
            one.http.get(DATA, params={"session_hash": "abc"}),
            one.http.post(CANCEL, json={"session_hash": "abc", "fn_index": 0, "event_id": "0" * 32}),
            one.http.get("/gradio_api/file=x"),
            one.http.get("/theme.css"),
            one.http.get("/config"),
        ):
            assert answer.status_code == 401
        begun = time.monotonic()
        wrong = [{"password": ""}, {}, {"password": KEY[:-1]}, {"username": KEY}, {"password": "é" * 40}]
        for form in wrong:
            answer = one.http.post("/login", data=form)
            assert answer.status_code == 401 and "not the key" in answer.text and "set-cookie" not in answer.headers
        assert time.monotonic() - begun > 0.3 * len(wrong)
        with ThreadPoolExecutor(24) as pool:
            many = list(
                pool.map(lambda _: httpx.post(f"{address}/login", data={"password": "x"}).status_code, range(24))
            )
        assert set(many) == {401, 429}
        for origin in ("http://evil.example", "null"):
            answer = one.http.post("/login", data={"password": KEY}, headers={"Origin": origin})
            assert answer.status_code == 403
        assert one.http.post("/login", content=b"x" * (visitors.LOGIN_BYTES + 1)).status_code == 413

        answer = one.http.post("/login", data={"password": KEY})
        cookies = answer.headers.get_list("set-cookie")
        assert answer.status_code == 303 and len(cookies) == 2
        assert all(cookie.endswith("; Path=/; HttpOnly; SameSite=Lax") for cookie in cookies)
        assert KEY not in answer.text + str(answer.headers)
        assert one.visit().status_code == 200 and one.ask("Hello?", one.image())[0][-1]["role"] == "assistant"
        with Browser(address) as other:  # the mark of one browser is no other's
            other.http.cookies.update({n: v for n, v in one.http.cookies.items() if n.endswith("-key")})
            assert other.http.get("/theme.css").status_code == 401
        assert httpx.get(f"{address}/v1/models").status_code == 401


def test_a_stream_of_no_session_ends_quietly(visitor, capfd):
    assert visitor.http.get(DATA, params={"session_hash": "unknown"}).status_code == 200
    assert "Traceback" not in capfd.readouterr().err


def test_the_environment_opens_nothing(tmp_path):
    variables = {
        "GRADIO_ALLOWED_PATHS": "/",
        "GRADIO_SHARE": "True",
        "GRADIO_VIBE_MODE": "1",
        "GRADIO_MCP_SERVER": "True",
    }
    script = (
        "from fusion_jax.serve import gradio_alone; import os, stat;"
        "print(oct(stat.S_IMODE(os.stat(gradio_alone.FOLDER).st_mode)), gradio_alone.FOLDER);"
        "print(sorted(name for name in os.environ if name.startswith('GRADIO_')))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | variables | {"TMPDIR": str(tmp_path), "GRADIO_TEMP_DIR": str(tmp_path / "shared")},
        capture_output=True,
        text=True,
        check=True,
    )
    mode, folder = ran.stdout.split()[:2]
    assert mode == "0o700" and folder.startswith(str(tmp_path))
    left = ran.stdout.splitlines()[1]
    assert "GRADIO_TEMP_DIR" in left and not any(name in left for name in variables)
    assert not list(tmp_path.iterdir())  # gone with the process


def test_uploads_go_with_the_server():
    before = set(page.gradio_alone.FOLDER.iterdir())
    with served() as (address, _), Browser(address) as one:
        one.upload()
        (made,) = set(page.gradio_alone.FOLDER.iterdir()) - before
        assert len(list(made.iterdir())) == 1
    assert not made.exists()


def test_without_the_page_nothing_of_it_is_there():
    app = api.make_app(Engine(), api.Options("fusion", protocol.Limits(64)))  # what --page=false serves
    with TestClient(app) as client:
        for path in ("/", JOIN, UPLOAD, "/theme.css", "/login", "/gradio_api/file=x"):
            assert client.get(path).status_code == client.post(path).status_code == 404


def test_conversations_are_bounded():
    talks = page.Talks(most=2)
    first = talks.get("a")
    first.append("x")
    talks.get("b")
    assert talks.get("a") is first
    talks.get("c")
    assert talks.get("a") is first and not talks.get("b")
    talks.clear("a")
    first.append("late")
    assert not talks.get("a")
