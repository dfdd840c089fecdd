"""The server with everything but a device: real HTTP, tokenizer, images, queue and threads; the answer is always the
same sentence. In a thread by `serving`, or as a process that `fusion_jax.serve` makes of itself:

    python echo_server.py FLAGS OF fusion_jax.serve      (environment ECHO_PACE: seconds a chunk, ECHO_BREAKS: chunks)
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from helpers import tiny_run

from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.inference import generate
from fusion_jax.models.fusion import Fusion
from fusion_jax.server.connections import Patience, make_server
from fusion_jax.server.engine import MOST_LIKELY, Engine
from fusion_jax.synth.tokenizer import train_tokenizer

SAID = "A red circle. "
BUCKETS = generate.Buckets(lengths=(160,), questions=(64,), rounds=(4,), images=(0, 1, 2))


class EchoEngine(Engine):
    """Says SAID without end, and the first token that may come where not all may. pace: seconds a chunk. breaks: the
    device fails after so many; None: never. joined: the last prompts."""

    pace, breaks = 0.002, None

    def _empty(self):
        self._said = np.array(self.prompts.tokenizer.encode(SAID) * self.chunk)[: self.chunk]
        self.joined = deque(maxlen=100)

    def _warm_up(self) -> None:
        self._state = np.zeros(1)

    def _join(self, row, example, how) -> None:
        self.prompts.batch([example])
        self.joined.append(example)

    def _step(self, draw: bool) -> np.ndarray:
        time.sleep(self.pace)
        if self.breaks is not None and self.statistics.chunks >= self.breaks:
            raise RuntimeError("the device\nis on fire")
        return np.tile(self._said, (self.rows, 1))

    def _step_reporting(self, allowed):
        tokens = self._step(True)
        if allowed is not None:  # the first that may come
            tokens = np.unpackbits(allowed.view(np.uint8), axis=1, bitorder="little").argmax(1)[:, None]
        none = np.zeros((*tokens.shape, MOST_LIKELY))
        return tokens, generate.Likely(none[..., 0], none.astype(int), none)

    def _leave(self, rows) -> None:
        pass


class _Errors(logging.Handler):
    def __init__(self, level: int):
        super().__init__(level)
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.errors.append(f"{record.getMessage()} {record.exc_info[1] if record.exc_info else ''}"[:300])


@dataclass
class Served:
    """errors: what uvicorn and asyncio have logged, such as exceptions that no caller hears of."""

    port: int
    engine: EchoEngine
    app: object
    errors: list[str]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def serving(folder: Path, patience=None, rows=4, queue=12, model="fusion", limits=None, **options):
    """A server in a thread of this process, on a port of its own."""
    from fusion_jax.server import api, protocol

    tokenizer = load_tokenizer(train_tokenizer(["What is in the picture?", SAID], folder / "tokenizer", 400))
    config = RunConfig(model=tiny_run.MODEL, stages=(StageConfig(name="s", data=""),), tokenizer="", dtype="float32")
    prompts = generate.Prompts(config, tokenizer, BUCKETS)
    engine = EchoEngine(Fusion(tiny_run.MODEL, jnp.float32), None, prompts, rows, max_tokens=64, queue_limit=queue)
    engine.start()
    limits = {"images": 2, "text_bytes": prompts.text_bytes, **(limits or {})}
    app = api.make_app(engine, api.Options(model, protocol.Limits(64, **limits), **options))
    server = make_server(app, "127.0.0.1", 0, patience or Patience(), 5)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    heard, logs = _Errors(logging.ERROR), [logging.getLogger(name) for name in ("uvicorn.error", "asyncio")]
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        for log in logs:
            log.addHandler(heard)
        yield Served(server.servers[0].sockets[0].getsockname()[1], engine, app, heard.errors)
    finally:
        for log in logs:
            log.removeHandler(heard)
        server.should_exit = True
        thread.join(30)


if __name__ == "__main__":
    from fusion_jax import serve as command
    from fusion_jax.command_line.cli import run_main
    from fusion_jax.server import engine

    EchoEngine.pace = float(os.environ.get("ECHO_PACE", EchoEngine.pace))
    EchoEngine.breaks = int(os.environ["ECHO_BREAKS"]) if "ECHO_BREAKS" in os.environ else None
    engine.Engine = EchoEngine
    sys.argv[0] = "fusion_jax.serve"
    run_main(command.main)
