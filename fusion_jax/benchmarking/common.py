"""Provides what the benchmarks share: the configured model, batches of equal conversations, timing."""

import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fusion_jax.batch import Batch
from fusion_jax.config import DTYPES, from_dict
from fusion_jax.data import tiles
from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import lay_out
from fusion_jax.data.typical import conversation, random_pixels, with_random_contents
from fusion_jax.errors import check_choice
from fusion_jax.models import fusion
from fusion_jax.models.config import FusionConfig
from fusion_jax.models.limits import within

RUN_REPEATS = 5  # for a run's configuration, which has no such key
_COUNTS = ("batch_size", "accumulation", "question_tokens", "answer_tokens", "decode_tokens", "decode_rows", "repeats")
_COUNTS += ("steps_between",)
_TEMPLATE = 11  # text tokens of a prompt beside its question


def check_counts(config: ConfigDict) -> None:
    """Raises UserError where a benchmark configuration has a number that is not a valid count."""
    for name in _COUNTS:
        within(f"config.{name}", config.get(name, 1), 1, 1 << 20)


def build_model(config: ConfigDict) -> fusion.Fusion:
    """The model of a run's or a benchmark's configuration."""
    check_choice("config.dtype=", config.dtype, DTYPES)
    return fusion.Fusion(from_dict(FusionConfig, config.model, "config.model"), jnp.dtype(config.dtype), config.remat)


def equal_batch(model: FusionConfig, rows: int, question: int, answer: int, seed: int = 0) -> Batch:
    """Makes one-round image conversations of exactly these numbers of tokens, one a row; `answer` 0 makes prompts."""
    rng, latents = np.random.default_rng(seed), max(model.drawn_latent_counts, default=0)
    prompt = _TEMPLATE + question + 2 * (latents > 0)
    one = conversation([prompt], [answer] if answer else [], question, tiles.WHOLE, latents > 0)
    length = prompt + answer + model.tokens_per_image + latents
    spec = layout_spec(model, length, question, 1)
    pixels = random_pixels(model, spec.quadrants, rng)
    return lay_out([with_random_contents(one, model, rng, pixels) for _ in range(rows)], spec, latents)


def times(run: Callable, repeats: int) -> list[float]:
    """Measures the wall-clock seconds of each of `repeats` calls, until their results are ready."""
    seconds = []
    for i in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
        print(f"run {i + 1}/{repeats}: {seconds[-1]:.4f} s", file=sys.stderr)
    return seconds
