"""Measures how fast answers are generated: the prefill of image prompts, and cached greedy decoding."""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fusion_jax.benchmarking.common import RUN_REPEATS, build_model, equal_batch, times
from fusion_jax.inference import decoding
from fusion_jax.inference.sampling import Sampling
from fusion_jax.models import fusion, weights

RUN_QUESTION, RUN_DECODE = 64, 64  # tokens, for a run's configuration


def measure_prefill(config: ConfigDict, rows: int) -> dict:
    """Times every crop's encoding, the decoder with its exchange layers and the first token's logits.

    Args:
      rows: prompts in a batch for a run's configuration; a benchmark configuration uses one.
    """
    question, answer, repeats = _sizes(config)
    model = build_model(config)
    params = random_params(model)
    return time_prefill(model, params, rows if "stages" in config else 1, question, answer, repeats)


def time_prefill(model: fusion.Fusion, params, rows: int, question: int, answer: int, repeats: int) -> dict:
    """Times `rows` prompts with `question` tokens and an image each; the cache has room for `answer` tokens more."""
    batch = jax.tree.map(jnp.asarray, equal_batch(model.config, rows, question, 0))
    limit = np.full(rows, answer, np.int32)
    run = functools.partial(decoding.prefill, model, params, batch, batch.tokens.shape[1] + answer, limit)
    start = time.perf_counter()
    jax.block_until_ready(run())
    compile_seconds = time.perf_counter() - start
    return {
        "rows": rows,
        "length": batch.tokens.shape[1],
        "seconds": statistics.median(times(run, repeats)),
        "compile_seconds": compile_seconds,
    }


def measure_decode(config: ConfigDict, rows: int) -> dict:
    """Times cached greedy decoding: the time of `decode_tokens` tokens less that of a single one.

    Args:
      rows: prompts in a batch for a run's configuration; a benchmark configuration uses its `decode_rows`.
    """
    question, answer, repeats = _sizes(config)
    model = build_model(config)
    params = random_params(model)
    rows = rows if "stages" in config else config.get("decode_rows", 1)
    return time_decode(model, params, rows, question, answer, repeats)


def time_decode(model: fusion.Fusion, params, rows: int, question: int, answer: int, repeats: int) -> dict:
    """Times `answer` tokens after each of `rows` prompts like those of `time_prefill`, less the time of one token."""
    batch = jax.tree.map(jnp.asarray, equal_batch(model.config, rows, question, 0))
    prefilled = decoding.first_state(model, params, batch, [Sampling(max_tokens=answer + 1)] * rows)
    medians = []
    for steps in (answer, 1):

        def run(steps=steps):
            ready = jax.block_until_ready(jax.tree.map(jnp.copy, prefilled))
            start = time.perf_counter()
            jax.block_until_ready(decoding.decode(model, params, ready, steps, (), False))
            return time.perf_counter() - start

        run()
        medians.append(statistics.median(run() for _ in range(repeats)))
    seconds = medians[0] - medians[1]
    return {"rows": rows, "tokens_per_second": rows * (answer - 1) / seconds, "seconds": seconds}


def random_params(model: fusion.Fusion) -> dict:
    """Draws weights as a loaded model has them (`models/weights.py`)."""

    def draw():
        return weights.unstack(weights.as_read(fusion.init(model.config, jax.random.key(0)), model.dtype))

    return jax.jit(draw)()


def _sizes(config: ConfigDict) -> tuple[int, int, int]:
    """(question tokens, tokens to generate, repeats)."""
    if "stages" in config:
        return RUN_QUESTION, RUN_DECODE, RUN_REPEATS
    return config.question_tokens, config.decode_tokens, config.repeats
