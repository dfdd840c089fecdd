"""Measures the server over HTTP, at several numbers of clients, beside the same prompts answered as a batch job.

The server is `python -m fusion_jax.serve` in a process of its own. Its clients send chat completions and read them as
streams. The batch job is `inference.generate.Answerer`; it starts when the server has ended, so each has the device to
itself.
"""

import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import math
import multiprocessing
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from PIL import Image

from fusion_jax.config import RunConfig
from fusion_jax.data.sources import Record
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import UserError
from fusion_jax.inference.generate import Answerer
from fusion_jax.models import fusion
from fusion_jax.training.about import describe_run
from fusion_jax.training.checkpoint_folders import FOLDER
from fusion_jax.training.loading import load_model

CLIENTS = (1, 4, 16)
QUESTIONS = ("What is in the picture?", "Which colour is it?", "How many things can you see?", "Describe it briefly.")
SIDE = 384  # pixels of a picture
_TIMEOUT = 600.0  # seconds for one request


@dataclass(frozen=True)
class Level:
    """What was measured at one number of clients; seconds of wall-clock time.

    Attributes:
      clients: None for the batch job. tokens: those of all answers together.
      first: of each request, the time to its first piece of text; empty for the batch job.
    """

    clients: int | None
    requests: int
    seconds: float
    tokens: int
    first: tuple[float, ...] = ()

    def figures(self) -> dict:
        """Returns the figures of the level, for JSON."""
        figures = {
            "clients": self.clients,
            "requests_per_second": self.requests / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
        }
        if self.first:
            figures |= {"first_token_median": statistics.median(self.first), "first_token_p95": percentile(self.first)}
        return figures


def percentile(values: Sequence[float], share: float = 0.95) -> float:
    """Returns the smallest value that at least this share of the values does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def measure(
    checkpoint: Path, rows: int, requests: int, max_tokens: int, weights: str = "full", flags: str = ""
) -> dict:
    """Measures a checkpoint. Returns the figures of all levels; the table goes to standard output.

    Args:
      rows: prompts that the server, and the batch job, answer at once. requests: of each level.
      max_tokens: longest answer. weights: see `serve --weights`. flags: further flags of the server.

    Raises:
      UserError: the server does not start, or refuses a request.
    """
    prompts = [prompt(i) for i in range(requests)]
    words = ["--checkpoint", checkpoint, "--rows", rows, "--max_tokens", max_tokens, "--weights", weights]
    words += ["--queue", max(CLIENTS), "--request_timeout", _TIMEOUT, "--page=false", *shlex.split(flags)]
    levels = []
    with running(words) as (port, start_seconds):
        for clients in CLIENTS:  # the first answers ask for programs of their shapes
            ask(port, prompts, clients, 1)
        wait_for_programs(port)
        for clients in CLIENTS:
            level, counts = ask(port, prompts, clients, max_tokens)
            levels.append(level)
            if clients == 1:
                tokens = sum(counts)
    levels.append(answer_in_batches(checkpoint, prompts, rows, max_tokens, weights, tokens))
    print(table(levels, rows))
    figures = [level.figures() for level in levels]
    return {
        "rows": rows,
        "requests": requests,
        "weights": weights,
        "start_seconds": start_seconds,
        "server": figures[:-1],
        "answerer": figures[-1],
    }


def prompt(i: int) -> Record:
    """Makes the question of request `i`; of four questions three have a picture of their own."""
    question = QUESTIONS[i % len(QUESTIONS)]
    if i % 4 == 3:
        return Record(f"{i}", None, [{"from": "human", "value": question}], f"request {i}", literal=True)
    rng = np.random.default_rng(i)
    small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "PNG")
    turns = [{"from": "human", "value": "<image>\n" + question}]
    return Record(f"{i}", None, turns, f"request {i}", (file.getvalue(),))


def body(one: Record, max_tokens: int) -> bytes:
    """Writes a prompt as a request for a streamed chat completion."""
    url = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in one.images]
    content = [{"type": "image_url", "image_url": {"url": u}} for u in url]
    content.append({"type": "text", "text": one.turns[0]["value"].removeprefix("<image>\n")})
    return json.dumps(
        {
            "model": "fusion",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


@contextlib.contextmanager
def running(words: Sequence) -> Iterator[tuple[int, float]]:
    """Runs the server with these flags; yields its port, and the seconds until it was ready.

    Raises:
      UserError: it has ended before it was ready; the text is the last line of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "fusion_jax.serve", "--port", port, *words]
    environment = {name: value for name, value in os.environ.items() if name != "FUSION_API_KEY"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            start = said = time.monotonic()
            while not _healthy(port):
                if process.poll() is not None:
                    log.seek(0)
                    last = ([line for line in log.read().splitlines() if line.strip()] or ["it wrote nothing"])[-1]
                    raise UserError(f"The server has ended with code {process.returncode}: {last}")
                if time.monotonic() - said > 10:
                    said = time.monotonic()
                    _say(f"the server compiles its programs, {said - start:.0f} s so far")
                time.sleep(0.1)
            yield port, time.monotonic() - start
        finally:
            process.terminate()
            process.wait()


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def wait_for_programs(port: int) -> None:
    """Waits until the server has compiled the smaller prefills that prompts have asked for."""
    start = said = time.monotonic()
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        pending = [float(line.split()[1]) for line in lines if line.startswith("fusion_programs_pending ")]
        if not any(pending):
            return
        if time.monotonic() - said > 10:
            said = time.monotonic()
            _say(f"the server compiles {pending[0]:.0f} smaller programs, {said - start:.0f} s so far")
        time.sleep(0.2)


def ask(port: int, prompts: Sequence[Record], clients: int, max_tokens: int) -> tuple[Level, list[int]]:
    """Sends all prompts from so many clients, each of which waits for its answer before it sends another.

    Returns:
      what was measured, and the number of tokens of each prompt's answer.
    """
    bodies = [body(one, max_tokens) for one in prompts]
    first, tokens = [0.0] * len(bodies), [0] * len(bodies)
    left, lock = iter(range(len(bodies))), threading.Lock()
    done = 0

    def client() -> None:
        nonlocal done
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT)
        with contextlib.closing(connection):
            while True:
                with lock:
                    i = next(left, None)
                if i is None:
                    return
                first[i], tokens[i] = request(connection, bodies[i], prompts[i].where)
                with lock:
                    done += 1
                    _say(f"{clients} clients: {done} of {len(bodies)} requests answered")

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        for one in [pool.submit(client) for _ in range(clients)]:
            one.result()
    return Level(clients, len(bodies), time.perf_counter() - start, sum(tokens), tuple(first)), tokens


def request(connection: http.client.HTTPConnection, sent: bytes, name: str) -> tuple[float, int]:
    """Sends one request and reads its stream. Returns seconds to the first text, and tokens of the answer.

    Raises:
      UserError: the server refuses it, or does not finish its answer.
    """
    start, first, tokens = time.perf_counter(), None, None
    try:
        connection.request("POST", "/v1/chat/completions", sent, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise UserError(f"The server refuses {name}: {_message(response.read())}")
        for line in response:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise UserError(f"The server does not finish {name}: {event['error'].get('message')}")
            if any(choice["delta"].get("content") for choice in event["choices"]) and first is None:
                first = time.perf_counter() - start
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"The connection of {name} broke ({type(error).__name__}: {error}).") from error
    if tokens is None:
        raise UserError(f"The server's answer to {name} ended without its number of tokens.")
    return time.perf_counter() - start if first is None else first, tokens


def _message(answer: bytes) -> str:
    try:
        return json.loads(answer)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return answer[:200].decode(errors="replace")


def answer_in_batches(
    checkpoint: Path, prompts: Sequence[Record], rows: int, max_tokens: int, weights: str, tokens: int
) -> Level:
    """Answers the prompts as `evaluate` does, a first time to compile. tokens: how many the same answers have."""
    loaded = load_model(checkpoint, kind=weights)
    answerer = Answerer(loaded.model, loaded.params, loaded.config, loaded.tokenizer, rows, max_tokens)
    for what in ("compile", "answer"):
        _say(f"the batch job: {what}")
        start = time.perf_counter()
        answerer.answer(prompts)
    return Level(None, len(prompts), time.perf_counter() - start, tokens)


def table(levels: Sequence[Level], rows: int) -> str:
    """Writes the levels as a Markdown table."""
    lines = ["| | requests/s | first text, s: median | 95% | tokens/s |", "|---|---|---|---|---|"]
    for level in levels:
        f = level.figures()
        name = f"Answerer, {rows} rows" if level.clients is None else f"server, {level.clients} clients"
        times = [f"{f[key]:.3f}" if key in f else "" for key in ("first_token_median", "first_token_p95")]
        lines.append(
            f"| {name} | {f['requests_per_second']:.2f} | {times[0]} | {times[1]} | {f['tokens_per_second']:.1f} |"
        )
    return "\n".join(lines)


@contextlib.contextmanager
def random_checkpoint(config: RunConfig) -> Iterator[Path]:
    """Yields a temporary checkpoint of a run's configuration with random weights, in the dtype of computation.

    A process of its own makes it, so that the server finds the device free.
    """
    load_tokenizer(config.tokenizer)  # raises here if it cannot be read
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            _say("saving random weights")
            pool.submit(_save_random, config, Path(folder)).result()
        yield Path(folder)


def _save_random(config: RunConfig, folder: Path) -> None:
    def draw():
        params = fusion.init(config.model, jax.random.key(0))
        return jax.tree.map(lambda x: x.astype(config.dtype), params)

    about = describe_run(config, load_tokenizer(config.tokenizer))
    step = folder / config.stages[-1].name / FOLDER / "1"
    ocp.save_checkpointables(step, {"params": jax.jit(draw)(), "about": about})


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
