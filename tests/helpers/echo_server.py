"""A server with everything but a device, whose answer is always the same sentence.

HTTP, tokenizer, images, queue and threads are real. It runs in a thread by `serving`, or as `fusion_jax.serve`:

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
from fusion_jax.inference.decoding import Logprobs
from fusion_jax.inference.prompts import Buckets, Prompts
from fusion_jax.models.fusion import Fusion
from fusion_jax.server.connections import Patience, make_server
from fusion_jax.server.engine import Engine
from fusion_jax.server.requests import MOST_LOGPROBS
from fusion_jax.server.running_batch import RunningBatch
from fusion_jax.synth.tokenizer import train_tokenizer

SAID = "A red circle. "
BUCKETS = Buckets(lengths=(160,), questions=(64,), rounds=(4,), images=(0, 1, 2))


class EchoBatch(RunningBatch):
    """Answers SAID without end, or the first allowed token where not all are allowed.

    Attributes:
      pace: seconds a chunk. breaks: chunks after which the device fails; None: never. joined: the last prompts.
    """

    pace, breaks = 0.002, None

    def warm_up(self) -> None:
        self._said = np.array(self.prompts.tokenizer.encode(SAID) * self.chunk)[: self.chunk]
        self.joined, self._chunks = deque(maxlen=100), 0

    def join(self, rows, examples, hows) -> None:
        self.prompts.batch(examples)
        self.joined.extend(examples)

    def step(self, draw: bool) -> np.ndarray:
        time.sleep(self.pace)
        self._chunks += 1
        if self.breaks is not None and self._chunks > self.breaks:
            raise RuntimeError("the device\nis on fire")
        return np.tile(self._said, (self.rows, 1))

    def step_reporting(self, allowed):
        tokens = self.step(True)
        if allowed is not None:  # the first allowed one
            tokens = np.unpackbits(allowed.view(np.uint8), axis=1, bitorder="little").argmax(1)[:, None]
        none = np.zeros((*tokens.shape, MOST_LOGPROBS))
        return tokens, Logprobs(none[..., 0], none.astype(int), none)

    def leave(self, rows) -> None:
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
    engine: Engine
    app: object
    errors: list[str]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def serving(folder: Path, patience=None, rows=4, queue=12, model="fusion", limits=None, **options):
    """A server in a thread of this process, on a port of its own."""
    from fusion_jax.server import api, protocol
    from fusion_jax.server.grammar import Grammars
    from fusion_jax.server.options import Options

    tokenizer = load_tokenizer(train_tokenizer(["What is in the picture?", SAID], folder / "tokenizer", 400))
    config = RunConfig(model=tiny_run.MODEL, stages=(StageConfig(name="s", data=""),), tokenizer="", dtype="float32")
    prompts = Prompts(config, tokenizer, BUCKETS)
    engine = Engine(EchoBatch(Fusion(tiny_run.MODEL, jnp.float32), None, prompts, rows, max_tokens=64), queue)
    engine.start()
    limits = {"images": 2, "text_bytes": prompts.text_bytes, **(limits or {})}
    grammars = Grammars(prompts, tiny_run.MODEL.llm.vocab_size)
    app = api.make_app(engine, Options(model, protocol.Limits(64, **limits), **options), grammars)
    server = make_server(app, "127.0.0.1", 0, patience or Patience(), 5)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    handler, logs = _Errors(logging.ERROR), [logging.getLogger(name) for name in ("uvicorn.error", "asyncio")]
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        for log in logs:
            log.addHandler(handler)
        yield Served(server.servers[0].sockets[0].getsockname()[1], engine, app, handler.errors)
    finally:
        for log in logs:
            log.removeHandler(handler)
        server.should_exit = True
        thread.join(30)


if __name__ == "__main__":
    from fusion_jax import serve as command
    from fusion_jax.command_line.cli import run_main
    from fusion_jax.server import running_batch

    EchoBatch.pace = float(os.environ.get("ECHO_PACE", EchoBatch.pace))
    EchoBatch.breaks = int(os.environ["ECHO_BREAKS"]) if "ECHO_BREAKS" in os.environ else None
    running_batch.RunningBatch = EchoBatch
    sys.argv[0] = "fusion_jax.serve"
    command.define_flags()
    run_main(command.main)
