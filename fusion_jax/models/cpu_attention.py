"""Attention on CPU in C (cpu_attention.c), forward and backward.

XLA's own products and elementwise passes write the scores to memory between them; here they stay in the first cache,
which takes less than half of the processor's time.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from fusion_jax.models.cpu_kernels import BACKWARD, FORWARD
from fusion_jax.models.remat import ATTENTION


def compiled_attention(q, k, v, q_segments=None, kv_segments=None, causal=False, window=0):
    """Computes `attention.reference_attention` where `cpu_kernels.available`; the arithmetic is float32."""
    if q_segments is None:
        q_segments, kv_segments = jnp.ones(q.shape[:2], jnp.int32), jnp.ones(k.shape[:2], jnp.int32)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    return _attention(causal, window, *wide, q_segments, kv_segments).astype(v.dtype)


def _call(name: str, causal: bool, window: int, results, *arrays):
    call = jax.ffi.ffi_call(name, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results])
    return call(*arrays, causal=np.int64(causal), window=np.int64(window))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(causal, window, q, k, v, q_segments, kv_segments):
    return _forward(causal, window, q, k, v, q_segments, kv_segments)[0]


def _forward(causal, window, q, k, v, q_segments, kv_segments):
    batch, length, heads, _ = q.shape
    arrays = (q, k, v, q_segments, kv_segments)
    out, lse = _call(FORWARD, causal, window, (q.shape, (batch, heads, length)), *arrays)
    # Named, so that a remat policy can keep them: attention is the expensive part of a layer to recompute.
    out, lse = checkpoint_name(out, ATTENTION), checkpoint_name(lse, ATTENTION)
    return out, (*arrays, out, lse)


def _backward(causal, window, residuals, d_out):
    q, k, v = residuals[:3]
    return *_call(BACKWARD, causal, window, (q.shape, k.shape, v.shape), *residuals, d_out), None, None


_attention.defvjp(_forward, _backward)
