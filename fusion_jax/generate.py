"""Generation: prefill with exchange, then cached decode in one compiled loop."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax.data.layout import Batch
from fusion_jax.models import llm
from fusion_jax.models.fusion import Fusion


@dataclass(frozen=True)
class Generated:
    """tokens: (B, steps) int32, filled with the first stop id behind a row's end. logits: (B, steps, V) or None."""

    tokens: np.ndarray
    logits: np.ndarray | None


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def prefill(model: Fusion, params, batch: Batch, capacity: int) -> tuple[jax.Array, jax.Array, llm.Cache]:
    """Runs the prompts and fills a cache with room for `capacity` tokens a row.

    Prompts are right-padded; each row's next token comes from its own last position.

    Returns:
      float32 logits (B, V) of the next token, its position (B,), and the cache.
    """
    rows = batch.tokens.shape[0]
    cache = llm.empty_cache(model.config.llm, rows, capacity, model.dtype)
    hidden, _, cache = model.apply({"params": params}, batch, cache)
    lengths = jnp.sum(batch.segment_ids > 0, axis=1)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.apply({"params": params}, last, method="logits"), lengths, cache


@functools.partial(jax.jit, static_argnames=("model", "steps", "stop_ids", "keep_logits"), donate_argnames=("cache",))
def decode(model: Fusion, params, logits, positions, cache, steps: int, stop_ids: tuple[int, ...], keep_logits: bool):
    """Greedy decode of up to `steps` tokens a row from the prefill's logits; stops early once every row has stopped.

    The cache is given back so that its donated buffers are updated in place.
    """
    rows, vocabulary = logits.shape
    fill = stop_ids[0] if stop_ids else 0
    tokens = jnp.full((rows, steps), fill, jnp.int32)
    kept = jnp.zeros((rows, steps, vocabulary), jnp.float32) if keep_logits else None

    def unfinished(state):
        step, _, _, _, _, done, _ = state
        return (step < steps) & ~jnp.all(done)

    def body(state):
        step, tokens, logits, positions, cache, done, kept = state
        token = jnp.where(done, fill, jnp.argmax(logits, -1).astype(jnp.int32))
        tokens = tokens.at[:, step].set(token)
        if keep_logits:
            kept = kept.at[:, step].set(logits)
        for stop in stop_ids:
            done = done | (token == stop)
        # The last token needs no successor.
        logits, cache = jax.lax.cond(
            step + 1 < steps,
            lambda: model.apply({"params": params}, token, positions, cache, method="decode"),
            lambda: (logits, cache),
        )
        return step + 1, tokens, logits, positions + 1, cache, done, kept

    state = (jnp.int32(0), tokens, logits, positions, cache, jnp.zeros(rows, bool), kept)
    _, tokens, _, _, cache, _, kept = jax.lax.while_loop(unfinished, body, state)
    return tokens, kept, cache


def greedy(
    model: Fusion, params, batch: Batch, steps: int, stop_ids: tuple[int, ...], keep_logits: bool = False
) -> Generated:
    """The most likely continuation of every prompt in the batch, at most `steps` tokens.

    Args:
      batch: prompts laid out by `data.layout` (labels None), one a row.
      stop_ids: tokens that end an answer; they are part of the result.
    """
    logits, positions, cache = prefill(model, params, batch, batch.tokens.shape[1] + steps)
    tokens, kept, _ = decode(model, params, logits, positions, cache, steps, stop_ids, keep_logits)
    return Generated(np.asarray(tokens), None if kept is None else np.asarray(kept))
