"""A real server process of a tiny checkpoint, its metrics, and an image that is too large for it."""

import contextlib
import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from helpers.generation import config, make_tokenizer, weights
from PIL import Image

from fusion_jax.config import StageConfig
from fusion_jax.training import checkpoint, optim, state
from fusion_jax.training.about import describe_run
from fusion_jax.training.checkpoint_folders import FOLDER

ROOT = Path(__file__).parents[2]
KEY = "a-key-for-the-test"


def make_checkpoint(folder):
    """A checkpoint of random weights in the folder."""
    tokenizer = make_tokenizer(folder / "tokenizer")
    stage = StageConfig(name="s", data="")
    tx = optim.optimizer(stage, weights())
    saved = checkpoint.Checkpoints(folder / "s" / FOLDER, describe_run(config(), tokenizer))
    saved.finish(1, state.create(weights(), tx), {}, 10.0)


@contextlib.contextmanager
def running(folder):
    """(address, process) of a server of the checkpoint in the folder, with the page."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--checkpoint", folder, "--port", port, "--rows", 4, "--queue", 40, "--max_tokens", 48]
    arguments += ["--lengths", "80,160", "--question_lengths", 64, "--rounds", 2, "--images", 1]
    log = (folder / "log.txt").open("w")
    temporary = folder / "für eine Zeit"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "fusion_jax.serve", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "FUSION_API_KEY": KEY, "TMPDIR": str(temporary)},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "log.txt").read_text()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield address, process
    finally:
        process.kill()
        process.wait()


def metrics(server):
    text = urllib.request.urlopen(f"{server[0]}/metrics", timeout=20).read().decode()
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


def bomb():
    """A small file of 50 million pixels."""
    file = io.BytesIO()
    Image.new("1", (10_000, 5_000)).save(file, "PNG")
    return file.getvalue()
