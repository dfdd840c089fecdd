"""Endpoints that say what no endpoint should: each such reply costs its sample, and nothing else."""

import argparse
import base64
import contextlib
import dataclasses
import functools
import io
import json
import re
import shutil
import threading
import time

import pytest
from helpers import model_server
from helpers.cpu_time import takes_less_than
from helpers.raw_server import answer, says, serving
from helpers.synth_run import make_config, run
from PIL import Image

from fusion_jax.errors import UserError
from fusion_jax.synth.backends.base import BackendError, Retryable, Unusable
from fusion_jax.synth.backends.config import ImageConfig, ModelConfig
from fusion_jax.synth.backends.endpoint import ChatEndpoint, ImageEndpoint
from fusion_jax.synth.kinds import KINDS
from fusion_jax.synth.kinds.common import JUDGE, STATEMENT, VERIFY
from fusion_jax.synth.replies import MAX_TEXT, Invalid

DEEP = b"[" * 100_000 + b"]" * 100_000
FAIRLY_DEEP = b"[" * 500 + b"]" * 500


def chat(content, **more) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}]} | more).encode()


def picture(size=(64, 64), form="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, form)
    return buffer.getvalue()


def drawn(data: bytes) -> bytes:
    return json.dumps({"data": [{"b64_json": base64.b64encode(data).decode()}]}).encode()


def located(url) -> bytes:
    return json.dumps({"data": [{"url": url}]}).encode()


GZIP = ("200 OK", "Content-Encoding: gzip")
ODD_CHATS = {
    "deep": answer(DEEP),
    "deep content": answer(b'{"choices": [{"message": {"content": ' + FAIRLY_DEEP + b"}}]}"),
    "deep beside": answer(b'{"choices": [{"message": {"content": "{}"}}], "x": ' + FAIRLY_DEEP + b"}"),
    "deep in the answer": answer(chat('{"drawable": ' + FAIRLY_DEEP.decode() + "}")),
    "very deep in the answer": answer(chat(DEEP.decode())),
    "open brackets": answer(chat('[{"a":' * 30_000)),
    "deep error": answer(b'{"error": ' + DEEP + b"}", "400 X"),
    "fairly deep error": answer(b'{"error": {"message": ' + FAIRLY_DEEP + b', "code": ' + FAIRLY_DEEP + b"}}", "400 X"),
    "error of numbers": answer(b'{"error": 5}', "500 X"),
    "numbers as parts": answer(chat([1, None, {"type": "text", "text": 7}, {"type": "text", "text": ["x"]}, [2]])),
    "an image as a part": answer(chat([{"type": "image", "text": {"a": 1}}, {"type": "reasoning", "text": "hm"}])),
    "usage": answer(chat("{}", usage={"prompt_tokens": True, "completion_tokens": -(10**30)})),
    "huge number": answer(
        b'{"choices": [{"message": {"content": "{}"}}], "usage": {"prompt_tokens": ' + b"9" * 5000 + b"}}"
    ),
    "choices": answer(b'{"choices": {"0": {"message": {"content": "x"}}}}'),
    "finish": answer(json.dumps({"choices": [{"message": {"content": "x"}, "finish_reason": {"a": []}}]}).encode()),
    "refusal": answer(json.dumps({"choices": [{"message": {"refusal": {"a": ["\ud800"]}}}]}).encode()),
    "surrogate": answer(chat('{"drawable": "\\ud800", "description": "\ud800"}')),
    "nan": answer(chat('{"drawable": NaN, "caption": Infinity, "description": -Infinity}')),
    "not UTF-8": answer(b'{"choices": "\xff\xfe"}'),
    "retry nan": answer(b"{}", "503 X", "Retry-After: nan"),
    "retry never": answer(b"{}", "503 X", "Retry-After: Fri, 31 Dec 99999 23:59:59 GMT"),
    "retry before": answer(b"{}", "503 X", "Retry-After: -inf"),
    "retry odd": answer(b"{}", "503 X", "Retry-After: \xff\xe9"),
    "redirect": answer(b"", "302 X", "Location: http://127.0.0.1:1/"),
    "status": answer(b"{}", "999 X"),
    "compressed": answer(b"\x1f\x8b" + b"x" * 50, *GZIP),
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nxx\r\n",
    "no HTTP": b"\0\xff" * 500,
    "long": answer(b'{"a": "' + b"x" * (1 << 23) + b'"}'),
    "many values": answer(b"[" + b"[]," * 600_000 + b"[]]"),
}
ODD_IMAGES = {
    "letters": answer(json.dumps({"data": [{"b64_json": "é" * 100}]}).encode()),
    "nothing": answer(b'{"data": [{}]}'),
    "a list": answer(b'{"data": {"0": 1}}'),
    "no base64": answer(b'{"data": [{"b64_json": "$$$"}]}'),
    "no image": answer(drawn(b"<svg></svg>")),
    "cut image": answer(drawn(picture()[:60])),
    "address": answer(located("http://[")),
    "address of this machine": answer(located("http://127.0.0.1:1/x.png")),
    "file": answer(located("file:///etc/passwd")),
    "data": answer(located("data:image/png;base64,AAAA")),
    "surrogate": answer(located("http://a/\ud800")),
    "number": answer(located(5)),
    "deep": answer(b'{"data": ' + DEEP + b"}"),
    "metadata": answer(located("http://169.254.169.254/latest/meta-data/")),
}


def client(kind, port, **more):
    config = {
        "backend": "endpoint",
        "model": "m",
        "base_url": f"http://127.0.0.1:{port}/v1",
        "retries": 0,
        "timeout": 5.0,
    }
    make, what = (ModelConfig, "llm") if kind is ChatEndpoint else (ImageConfig, "images")
    return kind(make(**config | more), what, {})


@pytest.mark.parametrize("name", ODD_CHATS)
def test_an_odd_reply_is_read_or_refused(name):
    with serving(says(ODD_CHATS[name])) as (port, _), contextlib.suppress(BackendError, Invalid):
        begun = time.monotonic()
        reply = client(ChatEndpoint, port).chat([{"role": "user", "content": "x"}], JUDGE.schema, 1, "judge", {})
        assert 0 <= reply.prompt_tokens < 1 << 41 and 0 <= reply.completion_tokens < 1 << 41
        assert type(reply.prompt_tokens) is int
        JUDGE.read(reply.text, reply.parsed, {"caption": "x"})
    assert time.monotonic() - begun < 3


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_an_odd_image_costs_its_sample(name):
    with serving(says(ODD_IMAGES[name])) as (port, _), pytest.raises(BackendError):
        client(ImageEndpoint, port).draw("x", (64, 64), 1, {})


class OddServer(model_server.Handler):
    """Odd for what is about the first walls, and right for the others."""

    odd = (*ODD_CHATS.values(), *ODD_IMAGES.values())

    def answer(self, body):
        number = int(re.search(rb"[Ww]all (\d+)", body)[1]) if b"all " in body and b"image_url" not in body else 10**6
        about_images = number >= len(ODD_CHATS)
        if number < len(self.odd) and about_images == ("images" in self.path):
            self.close_connection = True
            self.wfile.write(self.odd[number])
        else:
            super().answer(body)


@pytest.fixture
def odd_server():
    asks = [(ask.instructions, kind.name) for kind in KINDS.values() for ask in (kind.describe, kind.ask) if ask]
    options = {
        "key": "",
        "faults": 0.0,
        "content": 1,
        "rate": 0.0,
        "latency": 0.0,
        "hang": 0.0,
        "wrong": 0.0,
        "plain": 0,
    }
    args = argparse.Namespace(**options, kinds=sorted(asks, key=lambda one: -len(one[0])))
    handler = type("Handler", (OddServer,), {"state": model_server.State(args)})
    server = model_server.Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_odd_replies_cost_their_samples_alone_in_this_run_and_the_next(tmp_path, monkeypatch, odd_server):
    monkeypatch.setattr("fusion_jax.synth.backends.http._DEAD_AFTER", 1000)
    count, odd = len(OddServer.odd) + 6, len(OddServer.odd)
    config = make_config(tmp_path, odd_server, count, kinds=("conv_short",), traffic={"retries": 0, "concurrency": 4})
    first = run(config | {"attempts": 2}, tmp_path / "out")
    assert first["records"] == {"stage1_5": 6}
    assert sum(first["dropped"].values()) == odd
    lost = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text("utf-8").splitlines()]
    assert sorted(int(one["id"][:8]) for one in lost) == list(range(odd))
    assert {one["reason"] for one in lost} >= {"malformed", "broken_reply", "bad_image", "server_error", "refused"}
    # What was kept in the journal can be read, and what failed can be tried again.
    again = run(config | {"attempts": 2}, tmp_path / "out", retry_failed=True)
    assert (again["records"], again["dropped"]) == (first["records"], first["dropped"])


def test_an_image_at_an_address_is_fetched_within_the_limits(monkeypatch):
    monkeypatch.setattr("fusion_jax.synth.backends.http.MAX_IMAGE", 5000)

    def talk(target, connection, head):
        port = connection.getsockname()[1]
        path = head.split()[1].decode()
        said = {
            "/v1/images/generations": answer(located(f"http://127.0.0.1:{port}/{target}")),
            "/fine": answer(picture()),
            "/there": answer(b"", "302 X", "Location: /fine"),
            "/round": answer(b"", "302 X", "Location: /round"),
            "/other": answer(b"", "302 X", f"Location: http://127.0.0.1:{port + 1 if port < 65535 else 1}/"),
            "/large": b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 6000,
            "/missing": answer(b"", "404 X"),
        }
        connection.sendall(said[path])

    expected = {
        "fine": None,
        "there": None,
        "round": Unusable,
        "other": Unusable,
        "large": Unusable,
        "missing": Retryable,
    }
    for target, error in expected.items():
        with serving(functools.partial(talk, target)) as (port, heads):
            if error is None:
                assert client(ImageEndpoint, port).draw("x", (64, 64), 1, {}).size == (64, 64)
            else:
                with pytest.raises(error):
                    client(ImageEndpoint, port).draw("x", (64, 64), 1, {})
            assert b"authorization" not in heads[-1].lower()


def test_another_private_host_is_asked_for_images_only_where_the_config_names_it():
    with contextlib.ExitStack() as stack:
        other, seen = stack.enter_context(serving(says(answer(picture()))))
        port, _ = stack.enter_context(serving(says(answer(located(f"http://127.0.0.1:{other}/x")))))
        with pytest.raises(Unusable):
            client(ImageEndpoint, port).draw("x", (64, 64), 1, {})
        assert not seen
        client(ImageEndpoint, port, image_hosts=(f"127.0.0.1:{other}",)).draw("x", (64, 64), 1, {})
    for place in ("host", "host:0", "host:99999", ":80", "http://h:80", "host:8é"):
        with pytest.raises(UserError, match="HOST:PORT"):
            ImageConfig(image_hosts=(place,))


@pytest.mark.parametrize(
    "head",
    [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 100 C\r\n\r\nHTTP", b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"],
)
def test_the_timeout_holds_for_the_whole_request(head):
    with serving(says(head, *[b"x"] * 400, every=0.05)) as (port, _):
        begun = time.monotonic()
        with pytest.raises(Retryable) as error:
            client(ChatEndpoint, port, timeout=0.5).chat([], None, 1, "judge", {})
        assert error.value.reason in ("timeout", "cut_connection") and time.monotonic() - begun < 1.0
        with pytest.raises(Retryable):
            client(ImageEndpoint, port, timeout=0.5).client.fetch(f"http://127.0.0.1:{port}/x.png")
        assert time.monotonic() - begun < 2.0


def test_a_redirect_of_the_endpoint_is_not_followed_and_named_before_the_run():
    with serving(says(answer(chat("{}")))) as (other, seen):
        with serving(says(answer(b"", "307 X", f"Location: http://127.0.0.1:{other}/v1"))) as (port, _):
            with pytest.raises(UserError, match=r"redirects to another address; give that one as llm\.base_url"):
                client(ChatEndpoint, port).check()
            with pytest.raises(Unusable, match="HTTP 307"):
                client(ChatEndpoint, port).chat([], None, 1, "judge", {})
        assert not seen


@pytest.mark.parametrize("key", ["sk-1\n", "sk 1", "sk-é"])
def test_a_key_that_cannot_be_sent_is_named_and_not_shown(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="The key in OPENAI_API_KEY holds") as error:
        client(ChatEndpoint, 1)
    assert "sk" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["http://[", "http://h:abc", "http://h:0/v1", "http:///v1", "http://h /v1", "http://é/v1"]
)
def test_addresses_of_endpoints_that_cannot_be_used(url):
    with pytest.raises(UserError, match=r"llm\.base_url must be"):
        ChatEndpoint(ModelConfig(backend="endpoint", model="m", base_url=url), "llm", {})


# What takes quadratic time or more to look for in a text that is careless about it.
LONG = ["[", "{", '{"a":', '[{"', "<think>", "<script>", "<!--", "<style x", "```", " **b", "__a", "Q: x\n", "q 1:\n"]
LONG += ["\n", "- ", "1. q ", "left:\n", "a ", "A) x ", '"."', "&#", "&lt;", "\u0301\u0327", "in the in!", "“a", "-a'"]


@pytest.mark.parametrize("piece", LONG)
def test_long_answers_are_read_in_a_moment(piece):
    text = (piece * MAX_TEXT)[: MAX_TEXT - 2]
    asks = [
        ask for name in ("caption_scene", "contrast_long", "text_qa") for ask in (KINDS[name].describe, KINDS[name].ask)
    ]
    for ask in filter(None, [*asks, JUDGE, VERIFY, STATEMENT]):
        for said in (text, json.dumps(dict.fromkeys(ask.schema["properties"], text)), "Q: x\nA: " + text):
            with takes_less_than(4), contextlib.suppress(Invalid):
                ask.read(said, None, {"caption": "x", "pairs": [{}]})


@pytest.mark.parametrize("said", ["9" * 5000, "&#" + "9" * 5000 + ";", "x" * (MAX_TEXT + 1), "[1]" * 30_000])
def test_answers_of_no_use(said):
    caption = json.dumps({"caption": f"{said[:600]} red kites", "objects": [{"name": "kites", "count": 2.0}]})
    for kind in KINDS.values():
        for text in (said, caption, f"Two {said} kites", f"{said[:600]} red kites"):
            with contextlib.suppress(Invalid):
                kind.describe.read(text, None, {"caption": "x"})


def test_a_count_is_a_whole_number():
    read = KINDS["caption_count"].describe.read
    said = '{"caption": "two red kites", "objects": [{"name": "kites", "count": %s}]}'
    assert type(read(said % "2.0", None, {})["objects"][0]["count"]) is int
    for count in ("2.5", "true", '"2"', "NaN", "1e999", "[2]", "9" * 4000):
        with pytest.raises(Invalid):
            read(said % count, None, {})


def test_a_check_that_fails_otherwise_costs_the_answer_alone(caplog):
    ask = dataclasses.replace(JUDGE, check=lambda value, data: [][0])
    with pytest.raises(Invalid, match="IndexError"):
        ask.read('{"drawable": true}', None, {})
    assert "could not be read" in caplog.text


def test_a_run_goes_on_over_a_damaged_journal_and_a_damaged_image(tmp_path):
    with model_server.running() as url:
        config = make_config(tmp_path, url, 6, kinds=("conv_short",))
        run(config, tmp_path / "out", stages=["pool", "filter", "judge", "describe", "refilter", "draw"])
        for file in (tmp_path / "out" / "journal").glob("*.jsonl"):
            file.write_bytes(
                file.read_bytes().replace(b'"tokens":[', b'"tokens":{').replace(b'"parsed":', b'"parsed":1,"x":')
            )
        damaged = sorted((tmp_path / "out" / "images").rglob("*.png"))[0]
        damaged.write_bytes(damaged.read_bytes()[:80])
        manifest = run(config, tmp_path / "out")
    assert manifest["records"] == {"stage1_5": 5}
    assert manifest["dropped"] == {"score: damaged_image": 1}


def test_a_damaged_block_is_named_and_deleting_it_costs_nothing(tmp_path):
    with model_server.running() as url:
        config = make_config(tmp_path, url, 6, kinds=("conv_short",))
        first = run(config, tmp_path / "out")
        work = tmp_path / "out" / "work"
        for file, damage in (("blocks/00000.jsonl", "{"), ("blocks/00000.jsonl", "[" * 10**5), ("pool.json", "[]")):
            whole = (work / file).read_text()
            (work / file).write_text(damage)
            with pytest.raises(UserError, match=f"{file} is damaged; delete"):
                run(config, tmp_path / "out")
            (work / file).write_text(whole)
        shutil.rmtree(work)
        before = model_server.stats(url)["answered"]
        assert run(config, tmp_path / "out")["records"] == first["records"]
        assert model_server.stats(url)["answered"] == before
