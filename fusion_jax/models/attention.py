"""Computes attention: `attention` chooses a kernel; tests compare all with `reference_attention`.

A query sees a key when both have the same segment id, the id is not 0 and, if `causal`, the key is not later (nor, with
a `window`, that many positions earlier or more). Two packed examples and padding in one row (x: sees):

    segment   1 1 1 2 2 0
          1   x . . . . .
          1   x x . . . .
          1   x x x . . .
          2   . . . x . .
          2   . . . x x .
          0   . . . . . .      (output 0)
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from fusion_jax.models import cpu_attention, cpu_decoding, cpu_kernels, partition

MASKED = -1e30  # finite, so that a row without any key does not give NaN


def _mask(q_segments, kv_segments, causal: bool, window: int):
    """Returns which keys each query sees, boolean (..., Q, S); None if nothing is masked."""
    mask = None
    if q_segments is not None:
        mask = (q_segments[..., :, None] == kv_segments[..., None, :]) & (kv_segments[..., None, :] > 0)
    if causal:
        q_length, k_length = q_segments.shape[-1], kv_segments.shape[-1]
        distance = jnp.arange(q_length)[:, None] - jnp.arange(k_length)[None, :]
        lower = (distance >= 0) & (distance < window) if window else distance >= 0
        mask = lower if mask is None else mask & lower
    return mask


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def score_product(equation: str, q: jax.Array, k: jax.Array) -> jax.Array:
    """Computes `jnp.einsum` of queries and keys with a float32 result.

    Its gradients are products in the dtype of `q` and `k`, as in the kernels: JAX's own would be float32 products,
    because the gradient of the scores is float32.
    """
    return _product_forward(equation, q, k)[0]


def _product_forward(equation, q, k):
    return jnp.einsum(equation, q, k, preferred_element_type=jnp.float32), (q, k)


def _product_backward(equation, residuals, d_scores):
    q, k = residuals
    return jax.vjp(functools.partial(jnp.einsum, equation), q, k)[1](d_scores.astype(q.dtype))


score_product.defvjp(_product_forward, _product_backward)


def reference_weights(
    q: Float[Array, "B Q H d"],
    k: Float[Array, "B S K d"],
    q_segments: Int[Array, "B Q"] | None = None,
    kv_segments: Int[Array, "B S"] | None = None,
    causal: bool = False,
    window: int = 0,
) -> Float[Array, "B K G Q S"]:
    """Returns the weight that every query gives every key, float32.

    The H heads are K groups of G, which share keys and values. A query's weights sum to 1, or to 0 without a key.
    """
    batch, q_length, heads, size = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, q_length, kv_heads, heads // kv_heads, size)
    weights = score_product("BQKGd,BSKd->BKGQS", q, k) / math.sqrt(size)
    mask = _mask(q_segments, kv_segments, causal, window)
    if mask is not None:
        mask = mask[:, None, None]
        weights = jnp.where(mask, weights, MASKED)
    weights = jax.nn.softmax(weights, axis=-1)
    return weights if mask is None else jnp.where(mask, weights, 0.0)


def reference_attention(
    q: Float[Array, "B Q H d"],
    k: Float[Array, "B S K d"],
    v: Float[Array, "B S K d"],
    q_segments: Int[Array, "B Q"] | None = None,
    kv_segments: Int[Array, "B S"] | None = None,
    causal: bool = False,
    window: int = 0,
) -> Float[Array, "B Q H d"]:
    """Computes attention with scale d^-0.5; each of K key/value heads serves H / K query heads. Softmax in float32.

    Returns zeros where a query sees no key.
    """
    weights = reference_weights(q, k, q_segments, kv_segments, causal, window)
    return jnp.einsum("BKGQS,BSKd->BQKGd", weights.astype(v.dtype), v).reshape(q.shape)


def cached_attention(
    q: Float[Array, "B 1 H d"],
    keys: Float[Array, "layers B K d C"],
    values: Float[Array, "layers B K C d"],
    layer: Int[Array, ""],
    kv_segments: Int[Array, "B C"],
) -> Float[Array, "B 1 H d"]:
    """Computes attention of one new token over a layer's C slots, which hold it; slots of segment 0 are not seen."""
    if cpu_decoding.attends(q, keys, values):
        return cpu_decoding.cached_attention(q, keys, values, layer, kv_segments)
    k, v = (jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) for x in (keys, values))
    batch, _, heads, size = q.shape
    q = q.reshape(batch, k.shape[1], heads // k.shape[1], size)
    scores = jnp.einsum("BKGd,BKdC->BKGC", q, k, preferred_element_type=jnp.float32) / math.sqrt(size)
    # Select, do not add a mask: with a sum here a whole step of eight rows took twice as long on a CPU.
    scores = jnp.where((kv_segments > 0)[:, None, None], scores, MASKED)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    out = jnp.einsum("BKGC,BKCd->BKGd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / weights.sum(-1, keepdims=True)).astype(v.dtype).reshape(batch, 1, heads, size)


def extending_attention(
    q: Float[Array, "B Q H d"],
    keys: Float[Array, "layers B K d C"],
    values: Float[Array, "layers B K C d"],
    layer: Int[Array, ""],
    seen: Bool[Array, "B Q C"],
) -> Float[Array, "B Q H d"]:
    """Computes attention of several new tokens over a layer's C slots, which hold them; `seen` are those of each."""
    k, v = (jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) for x in (keys, values))
    batch, length, heads, size = q.shape
    rows = (batch, k.shape[1], -1, size)
    # The queries of all heads that share keys are the rows of one product: on a CPU in a quarter of the time.
    q = q.reshape(batch, length, k.shape[1], -1, size).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("BKNd,BKdC->BKNC", q.reshape(rows), k, preferred_element_type=jnp.float32) / math.sqrt(size)
    scores = jnp.where(seen[:, None, None], scores.reshape(*q.shape[:-1], -1), MASKED)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total, weights = weights.sum(-1, keepdims=True), weights.astype(v.dtype).reshape(*rows[:3], k.shape[-1])
    out = jnp.einsum("BKNC,BKCd->BKNd", weights, v, preferred_element_type=jnp.float32).reshape(q.shape)
    return (out / total).astype(v.dtype).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


# The blocked kernel, for CPUs without a C compiler. XLA's plain attention writes the (B, H, Q, K) scores
# to memory several times; one head at a time stays in the cache, and the backward pass recomputes the scores from the
# saved log-sum-exp.


def _scores(q, k, q_segments, kv_segments, causal, window):
    scores = jnp.dot(q, k.T, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    mask = _mask(q_segments, kv_segments, causal, window)
    return scores if mask is None else jnp.where(mask, scores, MASKED)


def _head_forward(causal, window, q, k, v, q_segments, kv_segments):
    scores = _scores(q, k, q_segments, kv_segments, causal, window)
    peak = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    # A row that sees nothing has peak == MASKED: weights of 1 everywhere, to be zeroed.
    alive = peak > MASKED / 2
    out = jnp.where(alive, jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total, 0.0)
    return out.astype(v.dtype), jnp.where(alive, peak + jnp.log(total), -MASKED)[:, 0]


def _head_backward(causal, window, q, k, v, q_segments, kv_segments, out, lse, d_out):
    scores = _scores(q, k, q_segments, kv_segments, causal, window)
    weights = jnp.exp(scores - lse[:, None])
    d_v = jnp.dot(weights.astype(v.dtype).T, d_out)
    d_weights = jnp.dot(d_out, v.T, preferred_element_type=jnp.float32)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    d_scores = (weights * (d_weights - delta) / math.sqrt(q.shape[-1])).astype(q.dtype)
    return jnp.dot(d_scores, k), jnp.dot(d_scores.T, q), d_v


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(causal, window, q, k, v, q_segments, kv_segments):
    return _blocked_forward(causal, window, q, k, v, q_segments, kv_segments)[0]


def _blocked_forward(causal, window, q, k, v, q_segments, kv_segments):
    out, lse = jax.lax.map(lambda a: _head_forward(causal, window, *a), (q, k, v, q_segments, kv_segments))
    # Named, so that a remat policy can keep them: attention is the expensive part of a layer to recompute.
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return out, (q, k, v, q_segments, kv_segments, out, lse)


def _blocked_backward(causal, window, residuals, d_out):
    d_q, d_k, d_v = jax.lax.map(lambda a: _head_backward(causal, window, *a), (*residuals, d_out))
    return d_q, d_k, d_v, None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def blocked_attention(q, k, v, q_segments=None, kv_segments=None, causal=False, window=0):
    """Computes attention one head at a time: the scores take memory once, not for each of B rows and H heads."""
    batch, q_length, heads, size = q.shape
    repeat = heads // k.shape[2]
    k, v = (jnp.repeat(x, repeat, axis=2) if repeat > 1 else x for x in (k, v))

    def rows(x):
        return x.transpose(0, 2, 1, 3).reshape(batch * heads, x.shape[1], size)

    def per_head(segments):
        return None if segments is None else jnp.repeat(segments, heads, axis=0)

    out = _blocked(causal, window, rows(q), rows(k), rows(v), per_head(q_segments), per_head(kv_segments))
    return out.reshape(batch, heads, q_length, size).transpose(0, 2, 1, 3)


def attention(q, k, v, q_segments=None, kv_segments=None, causal=False, window=0):
    """Computes `reference_attention` by the fastest kernel for this device and shape.

    Args:
      q: (B, Q, H, d), queries. k, v: (B, S, K, d), keys and values, with K dividing H.
      q_segments, kv_segments: int (B, Q), (B, S); 0 is padding. Both or neither; `causal` needs both.
      window: with `causal`, how many positions a query sees, itself included; 0 for all.

    Returns:
      (B, Q, H, d) in the dtype of v; zeros where a query sees no key.
    """
    kernel = choose(partition.platform(), q.shape[1], k.shape[1], q.dtype, q_segments is not None, causal, window)
    heads, segments = ("batch", None, "heads", None), ("batch", None)
    run = partition.split(
        lambda *arrays: kernel(*arrays, causal, window), (heads, heads, heads, segments, segments), heads
    )
    return run(q, k, v, q_segments, kv_segments)


def choose(platform: str, q_length: int, k_length: int, dtype, segments: bool, causal: bool, window: int):
    """Chooses the kernel for a device and a shape; each keeps the contract of `reference_attention`.

    | device | long rows | short ones, and one new token |
    |---|---|---|
    | TPU | flash that skips unseen blocks, splash for rows too long for it | plain |
    | NVIDIA GPU, 16 bits | the decoder's packed rows: Triton flash; others: cuDNN | plain |
    | CPU | in C | in C |
    | CPU without a C compiler | one head at a time | plain |
    """
    if platform == "cpu" and cpu_kernels.available():
        return cpu_attention.compiled_attention
    # The scores of short rows fit into the processor's cache, where one batched product is faster than a loop.
    if q_length * k_length < 128 * 128:
        return reference_attention
    if platform == "cpu":
        return blocked_attention
    from fusion_jax.models import flash  # not needed on CPU: Pallas takes a while to import

    if platform == "tpu":
        return flash.tpu_attention
    if platform in ("gpu", "cuda") and jnp.dtype(dtype).itemsize == 2:
        if segments and causal and not window:
            return flash.triton_attention
        return flash.cudnn_attention
    return reference_attention
