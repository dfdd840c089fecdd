"""Who may use the page: browsers apart from each other, other sites, host names, the key; what ends with the server."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.page_site import CANCEL, DATA, JOIN, UPLOAD, Browser, Engine, httpx, page, served
from starlette.testclient import TestClient

from fusion_jax.server import api, conversations, protocol, visitors
from fusion_jax.server.options import Options

KEY = "a-key-for-the-test"


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
        messages = other.http.get(DATA, params={"session_hash": visitor.session}).text
        assert "Mine" not in messages and "answer" not in messages.lower()
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
    assert visitor.http.get(DATA, params={"session_hash": "unknown"}).status_code == 404
    assert "Traceback" not in capfd.readouterr().err


def test_the_environment_opens_nothing(tmp_path):
    variables = {
        "GRADIO_ALLOWED_PATHS": "/",
        "GRADIO_SHARE": "True",
        "GRADIO_VIBE_MODE": "1",
        "GRADIO_MCP_SERVER": "True",
    }
    script = (
        "from fusion_jax.server import gradio_environment; import os, stat;"
        "print(oct(stat.S_IMODE(os.stat(gradio_environment.FOLDER).st_mode)), gradio_environment.FOLDER);"
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


def test_gradio_is_imported_without_the_environment():
    script = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'gradio': print('GRADIO_SHARE' in os.environ)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import fusion_jax.server.page"
    )
    environment = os.environ | {"GRADIO_SHARE": "True"}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False"]


def test_uploads_go_with_the_server():
    before = set(page.gradio_environment.FOLDER.iterdir())
    with served() as (address, _), Browser(address) as one:
        one.upload()
        (uploads_folder,) = set(page.gradio_environment.FOLDER.iterdir()) - before
        assert len(list(uploads_folder.iterdir())) == 1
    assert not uploads_folder.exists()


def test_without_the_page_nothing_of_it_is_there():
    app = api.make_app(Engine(), Options("fusion", protocol.Limits(64)), None)  # what --page=false serves
    with TestClient(app) as client:
        for path in ("/", JOIN, UPLOAD, "/theme.css", "/login", "/gradio_api/file=x"):
            assert client.get(path).status_code == client.post(path).status_code == 404


def test_conversations_are_bounded():
    kept = conversations.Conversations(most=2)
    first = kept.get("a")
    first.append("x")
    kept.get("b")
    assert kept.get("a") is first
    kept.get("c")
    assert kept.get("a") is first and not kept.get("b")
    kept.clear("a")
    first.append("late")
    assert not kept.get("a")


def test_one_browser_does_not_crowd_out_others_conversations():
    kept = conversations.Conversations(most=100)
    mine = kept.get("me-1")
    for k in range(500):
        kept.get(f"him-{k}")
        kept.get(f"her-{k}")
        assert not kept.questions(f"nobody-{k}")  # looking is no conversation
    assert kept.get("me-1") is mine and len(kept._messages) == 100
    mine.append({"role": "user", "content": "What?"})
    assert kept.questions("me-1") == ["What?"]
    kept = conversations.Conversations()
    for k in range(500):
        kept.get(f"him-{k}")
    assert len(kept._messages) == conversations.PER_BROWSER and "him-499" in kept._messages


def test_a_login_arrives_at_once_or_not_at_all(monkeypatch):
    monkeypatch.setattr(visitors, "LOGIN_SECONDS", 0.4)
    with served(key=KEY) as (address, _), Browser(address) as one:
        begun = time.monotonic()
        with socket.create_connection((one.http.base_url.host, one.http.base_url.port), timeout=10) as slow:
            slow.sendall(b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n\r\np")
            assert slow.recv(1 << 16).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - begun < 3
