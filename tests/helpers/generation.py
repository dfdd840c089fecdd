"""Prompts with random images, a tokenizer for them and a tiny model that answers them."""

import functools
import io
import time

import jax.numpy as jnp
import numpy as np
from helpers import tiny_run
from helpers.fixtures import params
from PIL import Image

from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data.sources import Record
from fusion_jax.data.tokenizer import Tokenizer, load_tokenizer
from fusion_jax.inference import generate
from fusion_jax.models.fusion import Fusion
from fusion_jax.synth.tokenizer import train_tokenizer

QUESTIONS = ("What is in the picture?", "Which colour?", "How many circles can you see here?", "Describe it.")


def make_tokenizer(folder) -> Tokenizer:
    """A tokenizer of 600 tokens trained on QUESTIONS, saved in `folder`."""
    return load_tokenizer(train_tokenizer([*QUESTIONS, "A red circle and a blue star."], folder, 600))


def picture(seed, size=24):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def record(i, images=1, rounds=1):
    turns = []
    for r in range(rounds):
        turns.append({"from": "human", "value": QUESTIONS[(i + r) % 4]})
        turns.append({"from": "gpt", "value": "A red circle."})
    turns[0]["value"] = "<image>\n" * images + turns[0]["value"]
    pictures = tuple(picture(10 * i + k) for k in range(images))
    return Record(str(i), None, turns[:-1], f"prompt {i}", pictures)


MIXED = [record(0), record(1, images=0), record(2, images=2), record(3, rounds=2), record(4, images=0, rounds=2)]


def config():
    return RunConfig(model=tiny_run.MODEL, stages=(StageConfig(name="s", data=""),), tokenizer="", dtype="float32")


@functools.cache
def weights():
    return params(tiny_run.MODEL)


def answerer(tokenizer, **arguments):
    model = Fusion(tiny_run.MODEL, arguments.pop("dtype", jnp.float32))
    return generate.Answerer(model, weights(), config(), tokenizer, **arguments)


def wait_for_programs(engine):
    """Waits until an engine has compiled what its prompts have asked for."""
    for _ in range(3000):
        if not engine.batch.prefills.pending:
            return
        time.sleep(0.1)
    raise AssertionError("programs are still being compiled")
