"""The page on a real server over an engine without a model, a browser's requests, and a listener."""

import contextlib
import importlib
import io
import json
import socket
import threading
import time

import numpy as np
import pytest
import uvicorn
from PIL import Image

from fusion_jax.data.layout import Measured
from fusion_jax.inference.prompts import Buckets
from fusion_jax.models.config import FusionConfig
from fusion_jax.server import api, protocol
from fusion_jax.server.options import Options

pytest.importorskip("gradio", reason="the page's tests need gradio: launch/test.sh makes an environment with it")
httpx = importlib.import_module("httpx")
page = importlib.import_module("fusion_jax.server.page")

JOIN, DATA, UPLOAD, CANCEL = (f"/gradio_api/{name}" for name in ("queue/join", "queue/data", "upload", "cancel"))


class Prompts:
    """Tokens are characters, as many as `buckets` say."""

    buckets, config = Buckets((2000,), (1000,), (40,)), FusionConfig()

    def __init__(self):
        self.tokenizer = self

    def encode(self, text):
        return [*text]

    def measure(self, record):
        questions = [turn["value"] for turn in record.turns if turn["from"] == "human"]
        length = sum(len(turn["value"]) for turn in record.turns)
        return Measured(0, length, 0, len(questions)), len("".join(questions)) if record.images else 0


class Engine:
    """Answers every prompt with `text`, once `go` is set."""

    rows, queue_limit, problem, silent = 2, 8, "", 0.0

    def __init__(self):
        self.text, self.records, self.go, self.prompts = "An answer.", [], threading.Event(), Prompts()
        self.go.set()

    def prepare(self, record):
        self.records.append(record)
        return record

    def answer(self, record, how, timeout):
        yield self.text[:2]
        assert self.go.wait(20)
        yield self.text[2:]

    def close(self):
        pass


class Pictures:
    def draw(self, image, question, word):
        return np.full((30, 70, 3), 200, np.uint8)


def png(size=(8, 6), colour="red"):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


@contextlib.contextmanager
def served(key="", names=(), streams=256, **limits):
    """(address, engine) of a server with the page."""
    engine = Engine()
    options = Options("fusion", protocol.Limits(64, **limits), key, names, timeout=20, streams=streams)
    app = page.mount(api.make_app(engine, options, None), engine, options, Pictures())
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{place.getsockname()[1]}", engine
        finally:
            engine.go.set()
            server.should_exit = True
            thread.join()


class Browser:
    """One visitor: its cookies, and the hash of its open page."""

    def __init__(self, address, session="abc123", visit=True, **more):
        self.http, self.session = httpx.Client(base_url=address, timeout=20, **more), session
        self.config = None
        if visit:
            self.visit()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.close()

    def visit(self):
        """Opens the page. `kinds` are those of each function's inputs, by its number."""
        answer = self.http.get("/")
        start = "window.gradio_config = "
        if start in answer.text:
            self.config = json.JSONDecoder().raw_decode(answer.text, answer.text.index(start) + len(start))[0]
            kinds = {component["id"]: component["type"] for component in self.config["components"]}
            self.kinds = {
                d["id"]: [kinds[i] for i in d["inputs"]] for d in self.config["dependencies"] if d["backend_fn"]
            }
        return answer

    def number(self, *kinds):
        """The first function with such inputs."""
        return next(number for number, inputs in self.kinds.items() if inputs == list(kinds))

    def upload(self, data=None, name="a.png", **more):
        return self.http.post(UPLOAD, files=[("files", (name, png() if data is None else data, "image/png"))], **more)

    def image(self, data=None):
        """An upload as the page names it in events."""
        return file(self.upload(data).json()[0])

    def join(self, number, values, **more):
        return self.http.post(JOIN, json={"fn_index": number, "data": values, "session_hash": self.session} | more)

    def events(self, session=None):
        """All messages of the session until its stream ends."""
        messages = []
        with self.http.stream("GET", DATA, params={"session_hash": session or self.session}) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    messages.append(json.loads(line[6:]))
        return messages

    def run(self, number, values):
        """The last values of an event, or its error."""
        joined = self.join(number, values)
        assert joined.status_code == 200, joined.text
        ends = [m for m in self.events() if m["msg"] == "process_completed"]
        return ends[-1]["output"].get("data") or ends[-1]["output"]["error"]

    def ask(self, question, image=None):
        return self.run(self.number("textbox", "image", "slider", "slider"), [question, image, 0, 16])

    def look(self, word, image):
        """The picture of a word as the page shows it."""
        return self.run(self.number("textbox", "image"), [word, image])[0]["value"]


def file(path, **more):
    return {"path": path, "meta": {"_type": "gradio.FileData"}} | more


@contextlib.contextmanager
def listener():
    """(address, list of the connections to it), to check that nothing connects."""
    hits = []
    with socket.create_server(("127.0.0.1", 0)) as place:

        def hear():
            with contextlib.suppress(OSError):
                while True:
                    caller, _ = place.accept()
                    hits.append(caller.getpeername())
                    caller.close()

        thread = threading.Thread(target=hear, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{place.getsockname()[1]}", hits
        place.shutdown(socket.SHUT_RDWR)
