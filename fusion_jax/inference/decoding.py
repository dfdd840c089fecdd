"""Defines the compiled programs of generation: prefill with exchange, then cached decoding in a loop."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax.batch import Batch
from fusion_jax.devices import compiler
from fusion_jax.inference import sampling
from fusion_jax.models import llm
from fusion_jax.models.fusion import Fusion

CHUNK = 8  # tokens decoded between two checks of the answers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """The carry of the decoding loop: B rows, which may be at different points of their answers.

    Attributes:
      logits: (B, V) float32 for the next token. positions: (B,) int32, its position.
      cache: all rows write their next token into the same slot. Answers follow the prompts in a ring of slots, so a row
        can take a new prompt at any time; no answer may be longer than the ring.
      ring: int32 scalar, the first slot of the ring.
      done: (B,) bool, whether the row's answer is complete. length: (B,) int32, tokens in the answer so far.
      limit: (B,) int32, most tokens that the answer may have.
      seen: (B, V) bool, tokens that occur in the prompt or the answer. settings: how each row's tokens are chosen.
    """

    logits: jax.Array
    positions: jax.Array
    cache: llm.Cache
    ring: jax.Array
    done: jax.Array
    length: jax.Array
    limit: jax.Array
    seen: jax.Array
    settings: sampling.Settings


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Encoding:
    """What later rounds of a conversation read of its images.

    Attributes:
      context: (B, C, D), keys and values of the exchange. latents: (B, 1, L, D), the first values of the last round's
        latents, which are those of any later round that shows no new image.
    """

    context: jax.Array
    latents: jax.Array


@functools.partial(compiler.ForPlatform, static_argnames=("model", "capacity", "keep"))
def prefill(model: Fusion, params, batch: Batch, capacity: int, limit, keep: bool = False):
    """Runs the prompts and fills a cache with room for `capacity` tokens a row.

    Prompts may be padded on the right, as `data.layout` does, or on the left: each row's next token comes from its own
    last real one. The logits of an empty row are finite but meaningless.

    Args:
      limit: (B,) int32, the longest answer of each row. With LongRoPE, prompt and limit together decide the factors.
      keep: also return what `prefixes.extend` needs.

    Returns:
      float32 logits (B, V) of the next token, its position (B,), and the cache; with `keep` also the `Encoding`, or
      None where no round has latents.
    """
    place = batch.tokens.shape[1] - 1 - jnp.argmax(batch.segment_ids[:, ::-1] > 0, axis=1)
    positions = jnp.take_along_axis(batch.positions, place[:, None], axis=1)[:, 0] + 1
    reach = positions + jnp.maximum(limit, 1) - 1  # the answer's last token is never read
    cache = llm.empty_cache(model.config.llm, reach, capacity, model.dtype)
    hidden, encoded, cache = model.apply({"params": params}, batch, cache)
    last = jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]
    results = model.apply({"params": params}, last, method="logits"), positions, cache
    if not keep:
        return results
    if encoded is None or encoded.latents is None:
        return *results, None
    latest = jnp.maximum(jnp.sum(batch.latent_start >= 0, axis=1) - 1, 0)
    latents = jnp.take_along_axis(encoded.latents, latest[:, None, None, None], axis=1)
    return *results, Encoding(encoded.context, latents)


@jax.jit
def begin(logits, positions, cache: llm.Cache, batch: Batch, limit, settings: sampling.Settings) -> State:
    """The state after a prefill of `batch`. limit: (B,) int32; a row with limit 0 is done from the start."""
    rows = jnp.arange(len(logits))[:, None]
    words = (batch.segment_ids > 0) & (batch.visual_index < 0)
    seen = (
        jnp.zeros(logits.shape, bool).at[rows, jnp.where(words, batch.tokens, logits.shape[1])].set(True, mode="drop")
    )
    none = jnp.zeros_like(limit)
    return State(logits, positions, cache, jnp.int32(batch.tokens.shape[1]), limit <= 0, none, limit, seen, settings)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logprobs:
    """Natural log probabilities of tokens under the model itself, before any setting or mask; float32.

    Attributes:
      chosen: (B, steps), those of the answer's tokens. ids: (B, steps, K) int32, the most likely tokens in descending
        order. values: (B, steps, K), those of `ids`.
    """

    chosen: jax.Array
    ids: jax.Array
    values: jax.Array


@functools.partial(
    compiler.ForPlatform,
    static_argnames=("model", "steps", "stop_ids", "draw", "keep_logits", "top_logprobs"),
    donate_argnames=("state",),
)
def decode(
    model: Fusion,
    params,
    state: State,
    steps: int,
    stop_ids: tuple[int, ...],
    draw: bool,
    keep_logits: bool = False,
    top_logprobs: int = 0,
    allowed=None,
):
    """Decodes up to `steps` tokens a row; stops early once every row is done.

    Args:
      draw: whether rows follow their settings; if not, all rows are greedy, and nothing else is computed.
      top_logprobs: K, how many of the most likely tokens to report at each step, 0 for no report. It cannot
        be combined with `keep_logits`.
      allowed: (B, ceil(V / 32)) int32, one bit a token, the lowest bit first: whether a row may choose it. The mask
        holds for all steps and must allow each row at least one token. None allows all.

    Returns:
      tokens (B, steps) int32, filled with the first stop id after a row's end; the float32 logits (B, steps, V) that
      they were chosen from, or `Logprobs`, or None; the state after them. The old state's buffers are donated.
    """
    rows, vocabulary = state.logits.shape
    fill = stop_ids[0] if stop_ids else 0
    tokens = jnp.full((rows, steps), fill, jnp.int32)
    kept = jnp.zeros((rows, steps, vocabulary), jnp.float32) if keep_logits else None
    if top_logprobs:
        none = jnp.zeros((rows, steps, top_logprobs), jnp.float32)
        kept = Logprobs(none[..., 0], none.astype(jnp.int32), none)
    if allowed is not None:
        words = jnp.arange(vocabulary)
        allowed = (allowed[:, words // 32] >> (words % 32)) & 1 > 0
    capacity = state.cache.segments.shape[1]

    def unfinished(carry):
        step, _, _, now = carry
        return (step < steps) & ~jnp.all(now.done)

    def forward(now: State, token):
        logits, cache = model.apply({"params": params}, token, now.positions, now.cache, method="decode")
        following = jnp.where(cache.length >= capacity, now.ring, cache.length)
        return logits, dataclasses.replace(cache, length=following)

    def body(carry):
        step, tokens, kept, now = carry
        logits = now.logits if allowed is None else jnp.where(allowed, now.logits, -jnp.inf)
        chosen = jnp.argmax(logits, -1).astype(jnp.int32)
        seen = now.seen
        if draw:
            chosen = sampling.choose(logits, now.settings, seen, now.length)
            seen = seen.at[jnp.arange(rows), chosen].set(True)
        token = jnp.where(now.done, fill, chosen)
        tokens = tokens.at[:, step].set(token)
        if keep_logits:
            kept = kept.at[:, step].set(now.logits)
        if top_logprobs:
            shares = jax.nn.log_softmax(now.logits, axis=-1)
            values, ids = jax.lax.top_k(shares, top_logprobs)
            own = jnp.take_along_axis(shares, token[:, None], axis=-1)[:, 0]
            new = Logprobs(own, ids, values)
            kept = jax.tree.map(lambda old, one: old.at[:, step].set(one.astype(old.dtype)), kept, new)
        length = now.length + ~now.done
        done = now.done | (length >= now.limit)
        for stop in stop_ids:
            done = done | (token == stop)
        # This runs even where no row continues: a condition here would copy the whole cache at every step.
        logits, cache = forward(now, token)
        # A row that is done keeps its position, which would otherwise grow without end.
        positions = now.positions + ~done
        return (
            step + 1,
            tokens,
            kept,
            State(logits, positions, cache, now.ring, done, length, now.limit, seen, now.settings),
        )

    _, tokens, kept, state = jax.lax.while_loop(unfinished, body, (jnp.int32(0), tokens, kept, state))
    return tokens, kept, state


def first_state(model: Fusion, params, batch: Batch, samplings: Sequence[sampling.Sampling]) -> State:
    """Prefills the batch; the cache has room for the longest answer, `Sampling.max_tokens` of each row.

    Rows beyond those of `samplings` are done from the start.
    """
    empty = len(batch.tokens) - len(samplings)
    limit = np.array([one.max_tokens for one in samplings] + [0] * empty, np.int32)
    logits, positions, cache = prefill(model, params, batch, batch.tokens.shape[1] + int(limit.max()), limit)
    settings = sampling.settings([*samplings, *[sampling.Sampling()] * empty])
    return begin(logits, positions, cache, batch, limit, settings)
