"""An OpenAI-compatible server for tests, over real HTTP, that fails as real ones do: `python -m helpers.model_server`.

It answers for the tile world (tile_world.py). What fails, and how, follows from the request and how often it came, so a
run can be repeated. GET /stats tells what it has seen.

    429 500 hang cut    by request and number of the try: another try may succeed
    malformed refusal   by request alone: only another request (another seed) can succeed
"""

import argparse
import base64
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from helpers import tile_world
from PIL import Image

MODELS = ["tile-writer", "tile-viewer", "tile-painter"]
_TRANSPORT = ("429", "500", "hang", "cut")
_CONTENT = ("malformed", "refusal")


class State:
    def __init__(self, args):
        self.args = args
        self.lock = threading.Lock()
        self.seen: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = 0
        self.tokens, self.filled = 1.0, time.monotonic()
        self.first = self.last = None

    def admit(self) -> bool:
        """A token bucket: `rate` requests a second, a few saved up."""
        if not self.args.rate:
            return True
        now = time.monotonic()
        most = max(1.0, self.args.rate * 0.1)
        self.tokens = min(most, self.tokens + (now - self.filled) * self.args.rate)
        self.filled = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State

    def log_message(self, *_):
        pass

    def setup(self):
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, status, value, headers=()):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        head += "".join(f"{name}: {text}\r\n" for name, text in headers)
        self.wfile.write(head.encode() + b"\r\n" + body)

    def fail(self, status, message, code="", headers=()):
        self.send(status, {"error": {"message": message, "code": code}}, headers)

    def do_GET(self):
        state = self.state
        if self.path == "/stats":
            with state.lock:
                again = {key: n for key, n in state.answered.items() if n > 1}
                self.send(
                    200,
                    {
                        "events": state.events,
                        "most_in_flight": state.most_in_flight,
                        "answered": sum(state.answered.values()),
                        "answered_again": sum(n - 1 for n in again.values()),
                        "seconds": (state.last or 0) - (state.first or 0),
                    },
                )
        elif self.authorised():
            self.send(200, {"object": "list", "data": [{"id": name} for name in MODELS]})

    def authorised(self):
        wanted = self.state.args.key
        given = self.headers.get("Authorization", "")
        if wanted and given != f"Bearer {wanted}":
            # As some servers do: the message repeats the key.
            self.fail(401, f"Incorrect API key provided: {given.removeprefix('Bearer ')}", "invalid_api_key")
            return False
        return True

    def do_POST(self):
        state = self.state
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with state.lock:
            state.in_flight += 1
            state.most_in_flight = max(state.most_in_flight, state.in_flight)
        try:
            if self.authorised():
                self.answer(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with state.lock:
                state.in_flight -= 1

    def answer(self, body):
        state, args = self.state, self.state.args
        key = hashlib.sha256(body).hexdigest()
        with state.lock:
            state.events["requests"] += 1
            if not state.admit():
                state.events["over the limit"] += 1
                over = True
            else:
                over = False
                now = time.monotonic()
                state.first, state.last = state.first or now, now
                state.seen[key] += 1
                tries = state.seen[key]
                state.events["admitted"] += 1
        if over:
            return self.fail(429, "slow down", headers=[("Retry-After", "0.05")])
        fault = self.fault(key, tries)
        with state.lock:
            state.events[fault or "fine"] += 1
        if fault == "hang":
            time.sleep(args.hang)
            self.close_connection = True
            return None
        time.sleep(args.latency)
        if fault == "429":
            return self.fail(429, "too many requests", headers=[("Retry-After", "0.05")])
        if fault == "500":
            return self.fail(500, "something broke")
        if fault == "cut":
            self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"choices": [')
            self.close_connection = True
            return None
        asked = json.loads(body)
        if asked.get("model") not in MODELS:
            return self.fail(404, f"The model {asked.get('model')} does not exist", "model_not_found")
        if args.plain and "response_format" in asked:
            return self.fail(400, "response_format is not supported by this model")
        self.send(200, self.images(asked) if "images" in self.path else self.chat(asked, fault))
        with state.lock:
            state.answered[key] += 1
        return None

    def fault(self, key, tries):
        args = self.state.args
        share = args.content * args.faults * len(_CONTENT) / (len(_TRANSPORT) + len(_CONTENT))
        drawn = tile_world.number(key, "content")
        if drawn % 10_000 < 10_000 * share and "images" not in self.path:
            return _CONTENT[drawn // 10_000 % len(_CONTENT)]
        drawn = tile_world.number(key, "transport", tries)
        if drawn % 10_000 < 10_000 * (args.faults - share):
            return _TRANSPORT[drawn // 10_000 % len(_TRANSPORT)]
        return None

    def chat(self, asked, fault):
        content = asked["messages"][-1]["content"]
        usage = {"prompt_tokens": 100, "completion_tokens": 20}

        def said(text, **more):
            message = {"role": "assistant", "content": text} | more
            return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}

        if fault == "refusal":
            return said(None, refusal="I cannot help with that.")
        if fault == "malformed":
            return said('{"pairs": [{"question": "What')
        if isinstance(content, list):
            images = [part["image_url"]["url"].split(",", 1)[1] for part in content if part["type"] == "image_url"]
            shown = [Image.open(io.BytesIO(base64.b64decode(one))) for one in images]
            data = json.loads(content[-1]["text"])
            return said(json.dumps({"correct": tile_world.verify(shown, data["question"], data["answer"])}))
        data = json.loads(content)
        purpose = self.purpose(asked)
        kind = self.kind(asked["messages"][0]["content"])
        return said(json.dumps(tile_world.reply(purpose, data | {"kind": kind}, self.state.args.wrong)))

    def purpose(self, asked):
        """By the prompt alone, as a model would know what it is asked for."""
        system = asked["messages"][0]["content"]
        for word, purpose in (("can drive an image", "judge"), ("into one plain statement", "statement")):
            if word in system:
                return purpose
        return "qa" if system.startswith("You write") else "describe"

    def kind(self, system):
        for words, kind in self.state.args.kinds:
            if system.startswith(words):
                return kind
        return "other"

    def images(self, asked):
        width, height = map(int, asked["size"].split("x"))
        buffer = io.BytesIO()
        tile_world.draw(asked["prompt"], (width, height)).save(buffer, "PNG")
        return {"data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request, client_address):
        pass


@contextmanager
def running(**options):
    """The server in a process of its own; yields its address up to and with /v1."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "helpers.model_server", "--port", "0", *words]
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.kill()
        process.wait()


def stats(address):
    with urllib.request.urlopen(address.removesuffix("/v1") + "/stats") as answer:
        return json.load(answer)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--key", default="")
    parser.add_argument("--faults", type=float, default=0.0, help="share of the requests that fail")
    parser.add_argument("--content", type=int, default=1, help="0: what is answered at all is answered well")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second; 429 above")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds")
    parser.add_argument("--hang", type=float, default=5.0, help="seconds that a hanging request hangs")
    parser.add_argument("--wrong", type=float, default=0.0, help="share of the answers that are wrong")
    parser.add_argument("--plain", type=int, default=0, help="1: no structured output")
    args = parser.parse_args()

    from fusion_jax.synth.kinds import KINDS

    asks = [(ask.instructions, kind.name) for kind in KINDS.values() for ask in (kind.describe, kind.ask) if ask]
    args.kinds = sorted(asks, key=lambda one: -len(one[0]))
    Handler.state = State(args)
    server = Server(("127.0.0.1", args.port), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
