"""Events, uploads and addresses that strangers send to the web page, composed of what has opened such pages before.

What may never come back are a file of the server and a variable of its environment; and it may call nobody.
"""

import copy
import json
import os
import re
import sys

import pytest

pytest.importorskip("gradio", reason="the page's area needs gradio: launch/test.sh makes an environment with it")

from helpers import page_site
from helpers.page_site import CANCEL, DATA, JOIN, UPLOAD

QUICK = 400
CANARY, VARIABLE = "canary-of-a-file-4711", "canary-of-the-environment-4712"


def attempts(random, folder):
    secret = folder / "secret.txt"
    secret.write_text(CANARY)
    os.environ["FUSION_TEST_CANARY"] = VARIABLE
    with (
        page_site.listener() as (trap, hits),
        page_site.served() as (address, _),
        page_site.Browser(address) as one,
        page_site.Browser(address, session="abc123") as other,
    ):
        one.http.timeout = 5
        theirs = other.image()
        calls = _Calls({address.rpartition(":")[2]})
        try:
            while True:
                yield _attempt(random, one, str(secret), trap, theirs, lambda: bool(hits) or calls.take())
        finally:
            calls.over = True
            del os.environ["FUSION_TEST_CANARY"]


class _Calls:
    """Connections that this process opens to anywhere but its own server."""

    def __init__(self, ports):
        self.ports, self.made, self.over = ports, [], False
        sys.addaudithook(self.heard)

    def heard(self, event, arguments):
        if not self.over and event in ("socket.connect", "socket.getaddrinfo"):
            place = arguments[1] if event == "socket.connect" else arguments[:2]
            if isinstance(place, tuple) and str(place[1]) not in self.ports:
                self.made.append((event, place))

    def take(self):
        made, self.made = self.made, []
        return made


def _attempt(random, one, secret, trap, theirs, called):
    what, send = random.choice([_event, _event, _event, _address, _upload, _body])(random, one, secret, trap, theirs)

    def attempt():
        answer = send()
        text = answer.content.decode("latin-1")
        if answer.status_code == 200 and answer.request.url.path == JOIN:
            # What the function made of it, and whatever that names.
            text += json.dumps(one.events(json.loads(answer.request.content)["session_hash"]))
            for path in re.findall(r'"path": "([^"]+)"', text)[:3]:
                text += one.http.get(f"/gradio_api/file={path}").text
        assert CANARY not in text and VARIABLE not in text, "a secret came back"
        assert answer.status_code < 500, f"status {answer.status_code}"
        assert not called(), "the server called somebody"
        return "accepted" if answer.status_code < 400 else "refused"

    return what, attempt


def _path(random, secret, trap, theirs):
    if random.random() < 0.4:
        return secret
    slashes = "/" * random.integers(1, 4)
    return random.choice(
        [
            secret,
            secret.replace("/", slashes),
            f"file://{secret}",
            "../" * int(random.integers(1, 12)) + secret.lstrip("/"),
            "/proc/self/environ",
            f"/proc/{os.getpid()}/environ",
            "/proc/self/fd/0",
            f"{trap}/a.png",
            f"{trap.replace('http', 'HTTP')}/a",
            f"//{trap.partition('//')[2]}/",
            f"http://u:p@{trap.partition('//')[2]}/a.svg",
            theirs["path"],
            f"{page_site.page.gradio_environment.FOLDER}/{theirs['path']}",
            f"/gradio_api/file={secret}",
            secret + "\x00.png",
            "data:image/png;base64,AAAA",
            "",
            "x" * 5000,
        ]
    )


def _value(random, path, depth=0):
    """Something that holds a path, in one of the shapes that Gradio follows, within others of them."""
    meta = {"_type": str(random.choice(["gradio.FileData", "gradio.FileData", "x"]))}
    shapes = [
        {"path": path, "meta": meta},
        {"path": path, "url": path, "orig_name": "a.svg", "is_stream": bool(random.integers(2)), "meta": meta},
        {"path": None, "url": path, "meta": meta},
        {"url": path},
        path,
        [path],
        {"role": "user", "content": [{"type": "file", "file": {"path": path, "meta": meta}}]},
        [{"role": "user", "content": [{"type": "file", "file": {"path": path, "meta": meta}}]}],
        [{"role": "user", "content": [{"type": "file", "file": {"path": path, "meta": meta}}]}],
        {"video": {"path": path, "meta": meta}, "subtitles": None},
    ]
    shape = shapes[random.integers(len(shapes))]
    if depth < 4 and random.random() < 0.4:
        inner = _value(random, path, depth + 1)
        around = [[inner], {"value": inner, "__type__": "update"}, {"files": [inner], "text": "x"}, [[inner, None]]]
        return around[random.integers(len(around))]
    return shape


def _event(random, one, secret, trap, theirs):
    path = str(_path(random, secret, trap, theirs))
    number = int(random.choice([*one.kinds, *one.kinds, 1, 99, -1]))
    values = [_fitting(random, kind) for kind in one.kinds.get(number, ["textbox"])]
    for _ in range(int(random.integers(0, 3))):
        if values:
            values[random.integers(len(values))] = _value(random, path)
    body = {"fn_index": number, "data": values, "session_hash": one.session, "trigger_id": None}
    extras = {
        "event_data": _value(random, path),
        "event_id": path,
        "session_hash": path,
        "trigger_id": path,
        "batched": True,
        "simple_format": True,
        "oauth_token": path,
        "api_name": "reply",
        "request": {"headers": {"cookie": "x"}},
        "data": _value(random, path),
        "fn_index": str(number),
        "username": "admin",
    }
    for key in random.choice(list(extras), int(random.integers(0, 3)), replace=False):
        body[str(key)] = copy.deepcopy(extras[key])
    headers = {}
    if random.random() < 0.2:
        name = str(random.choice(["Origin", "Host", "X-Forwarded-Host", "X-Gradio-Server", "Referer", "Cookie"]))
        headers[name] = str(random.choice([trap, "evil.example", "null", "localhost", secret]))
    place = str(random.choice([JOIN, JOIN, JOIN, CANCEL, "/gradio_api/run/predict", "/gradio_api/call/reply"]))
    return f"event {json.dumps(body)[:300]} {headers}", lambda: one.http.post(place, json=body, headers=headers)


def _fitting(random, kind):
    return {
        "textbox": lambda: "Which colour is it?",
        "radio": lambda: "colour",
        "slider": lambda: int(random.integers(1, 9)),
        "image": lambda: None,
    }[kind]()


def _address(random, one, secret, trap, theirs):
    path = str(_path(random, secret, trap, theirs)).replace("\x00", "%00")
    form = str(
        random.choice(
            [
                "/gradio_api/file={}",
                "/gradio_api/file/{}",
                "/gradio_api/proxy={}",
                "/file={}",
                "/static/{}",
                "/assets/..{}",
                "/assets/%2e%2e/%2e%2e/{}",
                "/svelte/{}",
                "/gradio_api/custom_component/{}/client/a/b",
                "/?deep_link={}",
                "/config?deep_link={}&page={}",
                "/gradio_api/queue/data?session_hash={}",
                "/gradio_api/heartbeat/{}",
                "/gradio_api/stream/{}/1/1/playlist-file",
                "/gradio_api/upload_progress?upload_id={}",
                "/{}",
            ]
        )
    )
    address = one.http.base_url.join("/").copy_with(raw_path=form.replace("{}", path).encode())
    return f"address {str(address)[:300]}", lambda: one.http.get(address)


def _upload(random, one, secret, trap, theirs):
    data = bytearray(page_site.png())
    for _ in range(int(random.integers(0, 4))):
        data[random.integers(len(data))] = random.integers(256)
    data += random.choice([b"", b"<script>alert(1)</script>", bytes(1000)])
    kinds = [bytes(data), b"<svg onload='x'/>", b"<html>", b"%!PS\n", random.bytes(int(random.integers(0, 300)))]
    content = kinds[random.choice([0, 0, 0, 1, 2, 3, 4])]
    name = str(_path(random, secret, trap, theirs)).replace("\x00", "")
    field = str(random.choice(["files", "files", "files", "file", "path"]))

    def send():
        answer = one.http.post(UPLOAD, files=[(field, (name, content, "text/html"))])
        if answer.status_code == 200:
            (kept,) = answer.json()
            shown = one.http.get(f"/gradio_api/file={kept}")
            assert shown.content == content and "html" not in shown.headers["content-type"], "shown as a page"
            assert shown.headers["x-content-type-options"] == "nosniff"
        return answer

    return f"upload {name[:100]} {content[:60]}", send


def _body(random, one, secret, trap, theirs):
    """An event with bytes changed, doubled or left out."""
    data = bytearray(json.dumps({"fn_index": 0, "data": ["x", None, 0, 16], "session_hash": one.session}).encode())
    for _ in range(int(random.integers(1, 6))):
        at = random.integers(len(data))
        change = random.integers(4)
        if change == 0:
            data[at] = random.integers(256)
        elif change == 1:
            del data[at : at + int(random.integers(1, 9))]
        elif change == 2:
            data[at:at] = data[at : at + int(random.integers(1, 30))] * int(random.integers(1, 50))
        else:
            data[at:at] = random.choice(
                [b"NaN", b"[" * 2000, b'{"path":"/etc/passwd"}', b"1" * 5000, b"\\ud800", b"\x00"]
            )
        if not data:
            data = bytearray(b"{")
    place = str(random.choice([JOIN, CANCEL, DATA]))
    sent = bytes(data)
    headers = {"Content-Type": "application/json"}
    return f"body {sent[:200]}", lambda: one.http.post(place, content=sent, headers=headers)
