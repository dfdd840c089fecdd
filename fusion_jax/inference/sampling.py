"""Chooses the next token of each row: greedily, or drawn by the row's own settings.

The settings are repetition penalty, temperature, top-k and top-p, applied in this order. They are arrays on
the device, one value a row, so that one compiled program serves requests that differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax.errors import check

_COLDEST = 1e-6  # a lower temperature counts as 0: logits divided by it overflow float32, and the draw is the argmax


@dataclass(frozen=True)
class Sampling:
    """The sampling settings of one request.

    Attributes:
      max_tokens: longest answer in tokens, the stop token included.
      temperature: 0 takes the most likely token.
      top_k: draw from this many of the most likely tokens, 0 for all. top_p: draw from the most likely tokens that
        together hold this share of the probability, 1 for all.
      repetition_penalty: logits of tokens of the prompt or the answer are divided by it where positive and multiplied
        by it where negative; 1 changes nothing.
      seed: the same seed, prompt and settings lead to the same answer, regardless of the rest of the batch.
      stop: texts that end the answer and are not part of it.
    """

    max_tokens: int = 32
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        check(self.max_tokens >= 1, f"max_tokens={self.max_tokens} must be at least 1.")
        check(0 <= self.temperature <= 100, f"temperature={self.temperature:g} must lie in 0..100.")
        check(0 <= self.top_k < 2**31, f"top_k={self.top_k} must lie in 0..{2**31 - 1}.")
        check(0 < self.top_p <= 1, f"top_p={self.top_p:g} must lie above 0 and not above 1.")
        check(
            0.01 <= self.repetition_penalty <= 100,
            f"repetition_penalty={self.repetition_penalty:g} must lie in 0.01..100.",
        )
        check(all(self.stop), "stop: a stop text is empty.")

    @property
    def greedy(self) -> bool:
        """Whether the settings amount to the plain argmax."""
        return self.temperature == 0 and self.repetition_penalty == 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Settings:
    """Samplings as arrays (B,), one value a row: float32, except for top_k in int32 and seeds in uint32."""

    temperature: jax.Array | np.ndarray
    top_k: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    penalty: jax.Array | np.ndarray
    seeds: jax.Array | np.ndarray


def settings(samplings: Sequence[Sampling]) -> Settings:
    """The settings as arrays on the host, one row a sampling."""
    return Settings(
        np.array([s.temperature if s.temperature >= _COLDEST else 0.0 for s in samplings], np.float32),
        np.array([s.top_k for s in samplings], np.int32),
        np.array([s.top_p for s in samplings], np.float32),
        np.array([s.repetition_penalty for s in samplings], np.float32),
        np.array([s.seed % 2**32 for s in samplings], np.uint32),
    )


def choose(logits: jax.Array, rows: Settings, seen: jax.Array, length: jax.Array) -> jax.Array:
    """The next token of each row.

    Args:
      logits: (B, V) float32. seen: (B, V) bool, tokens that the penalty applies to.
      length: (B,) int32, tokens of the answer so far. With the row's seed it makes the draw's key, so that a draw does
        not depend on the other rows.

    Returns:
      (B,) int32.
    """
    penalty = rows.penalty[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    likeliest = jnp.argmax(logits, -1).astype(jnp.int32)
    scaled = _keep(logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None], rows.top_k, rows.top_p)
    keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(rows.seeds, length)
    drawn = jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
    return jnp.where(rows.temperature > 0, drawn, likeliest)


def _keep(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Sets logits outside top-k, and then outside top-p, to -inf. Logits equal to the last one kept are kept, too."""
    vocabulary = logits.shape[-1]
    falling = jnp.sort(logits, axis=-1, descending=True)
    count = jnp.where(top_k > 0, jnp.minimum(top_k, vocabulary), vocabulary)[:, None]
    falling = jnp.where(jnp.arange(vocabulary)[None] < count, falling, -jnp.inf)
    shares = jax.nn.softmax(falling, axis=-1)
    # A token is kept while the more likely ones before it hold less than top_p. The first always is, even where top_p
    # is so small that it is 0 in float32.
    inside = (jnp.cumsum(shares, axis=-1) - shares < top_p[:, None]) & (falling > -jnp.inf)
    inside = inside.at[:, 0].set(True)
    # Where top-p is off, rounding must not drop the last tokens.
    inside = jnp.where(top_p[:, None] >= 1, falling > -jnp.inf, inside)
    lowest = jnp.min(jnp.where(inside, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)
