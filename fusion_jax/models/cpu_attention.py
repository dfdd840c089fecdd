"""Attention on CPU in C: cpu_attention.c, compiled for this processor on first use.

XLA's own products and elementwise passes write the scores to memory between them; here they stay in the first cache,
which takes less than half of the processor's time, forward and backward. Without a C compiler the kernels in
`attention.py` do the work, and the log says so once.
"""

import ctypes
import functools
import logging
import subprocess
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from fusion_jax import c_compiler
from fusion_jax.models.remat import ATTENTION

log = logging.getLogger("fusion_jax")

SOURCE = Path(__file__).with_name("cpu_attention.c")
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-pthread")
FORWARD, BACKWARD = "fusion_attention_forward", "fusion_attention_backward"
_lock = threading.Lock()


def available() -> bool:
    """Returns whether the library is there; compiles and registers it with JAX when first asked."""
    with _lock:  # threads that come in the meantime wait for the one compilation
        return _register()


@functools.cache
def _register() -> bool:
    try:
        library = ctypes.CDLL(str(_build()))
        for name in (FORWARD, BACKWARD):
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
        return True
    except (OSError, RuntimeError, subprocess.SubprocessError) as e:  # RuntimeError: there is no home folder
        log.warning("Attention runs on XLA's products, at half the speed: %s", e)
        return False


def _build() -> Path:
    """Returns the library for this processor."""
    return c_compiler.build(SOURCE, (*FLAGS, f"-I{jax.ffi.include_dir()}"), (_processor(), jax.__version__))


def _processor() -> str:
    """Returns the instructions that this processor has: homes, and so caches, may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def compiled_attention(q, k, v, q_segments=None, kv_segments=None, causal=False, window=0):
    """Computes `attention.reference_attention` in C, where `available`; the arithmetic is float32 for every dtype."""
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
