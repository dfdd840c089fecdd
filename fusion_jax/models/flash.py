"""Calls attention kernels for TPU and GPU that never write the scores to memory.

Each has the contract of `attention.reference_attention`: packed segments, padding, grouped heads, zeros where a query
sees no key. Lengths are padded to whole blocks with positions of segment 0, which no query sees.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from fusion_jax.models import segment_flash, segment_flash_tpu
from fusion_jax.models.remat import ATTENTION

LANES = 128  # lanes of a TPU; its blocks are multiples of this
UNSEEN = -1  # the segment of padded keys, which no query has


def _pad(x: jax.Array, length: int, value: int = 0) -> jax.Array:
    """Pads (B, n, ...) to (B, length, ...)."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *((0, 0),) * (x.ndim - 2)), constant_values=value)


def _segments(q, k, q_segments, kv_segments):
    """Returns the segment ids, or puts all positions in segment 1 if there are none."""
    if q_segments is not None:
        return q_segments, kv_segments
    return jnp.ones(q.shape[:2], jnp.int32), jnp.ones(k.shape[:2], jnp.int32)


def _zero_blind(out, q_segments, kv_segments, causal):
    """Sets zeros where a query sees no key, as one of padding; kernels leave arbitrary values there."""
    sees = q_segments > 0
    if not causal:  # a causal query sees at least itself
        sees &= (q_segments[:, :, None] == kv_segments[:, None, :]).any(-1)
    return jnp.where(sees[..., None, None], out, 0)


def _parts(length: int) -> tuple[int, int]:
    """Returns (padded length, part): one part up to 1024 positions, else parts of 512 or 1024."""
    if length <= 1024:
        padded = math.ceil(length / LANES) * LANES
        return padded, padded
    padded = math.ceil(length / 512) * 512
    return padded, math.gcd(padded, 1024)


def _blocks(length: int) -> tuple[int, int]:
    """Returns (padded length, block): one block up to 1024 positions, else the block that pads least."""
    if length <= 1024:
        padded = math.ceil(length / LANES) * LANES
        return padded, padded
    return min(((math.ceil(length / b) * b, b) for b in (512, 384, 256)), key=lambda size: (size[0], -size[1]))


def splash_attention(q, k, v, q_segments=None, kv_segments=None, causal=False, window=0, interpret=False):
    """Calls splash attention (TPU); blocks that a causal mask or window hides are never computed."""
    _, q_length, heads, size = q.shape
    ours, theirs = _segments(q, k, q_segments, kv_segments)
    (q_padded, q_block), (k_padded, k_block) = _blocks(q_length), _blocks(k.shape[1])
    shape = (q_padded, k_padded)
    if window:
        mask = splash_mask.LocalMask(shape, (window - 1, 0), 0)
    else:
        mask = splash_mask.CausalMask(shape) if causal else splash_mask.FullMask(shape)
    sizes = splash.BlockSizes(q_block, k_block, None, q_block, k_block, None, q_block, k_block)
    kernel = splash.make_splash_mha(
        splash_mask.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )
    q = (q.astype(jnp.float32) / math.sqrt(size)).astype(q.dtype)
    q, k, v = (_pad(x, n).transpose(0, 2, 1, 3) for x, n in ((q, q_padded), (k, k_padded), (v, k_padded)))
    ids = splash.SegmentIds(_pad(ours, q_padded), _pad(theirs, k_padded, UNSEEN))
    out = jax.vmap(kernel)(q, k, v, ids).transpose(0, 2, 1, 3)[:, :q_length]
    if q_segments is None:
        return out.astype(v.dtype)
    return _zero_blind(out, ours, theirs, causal).astype(v.dtype)


def tpu_attention(q, k, v, q_segments=None, kv_segments=None, causal=False, window=0, interpret=False):
    """Calls flash attention that skips unseen blocks (TPU); rows too long for it get splash attention."""
    q_length, k_length = q.shape[1], k.shape[1]
    (q_padded, part), (k_padded, _) = _parts(q_length), _parts(k_length)
    if not segment_flash_tpu.fits(k_padded, k.shape[3], k.dtype):
        return splash_attention(q, k, v, q_segments, kv_segments, causal, window, interpret)
    # Small blocks skip most of the other segments; where there is one segment, large ones are faster.
    how = segment_flash_tpu.Attention(causal, window, LANES if causal else part, part, interpret)
    if q_segments is None:
        q_segments, kv_segments = jnp.ones((1, q_length), jnp.int32), jnp.ones((1, k_length), jnp.int32)
    q, k, v = (_pad(x, n).transpose(0, 2, 1, 3) for x, n in ((q, q_padded), (k, k_padded), (v, k_padded)))
    ids = _pad(q_segments, q_padded), _pad(kv_segments, k_padded)
    return segment_flash_tpu.segment_attention(how, q, k, v, *ids).transpose(0, 2, 1, 3)[:, :q_length]


def triton_attention(q, k, v, q_segments, kv_segments, causal=False, window=0, interpret=False):
    """Calls Triton flash attention (GPU) of a packed sequence with itself: queries and keys have the same segments.

    It is causal and has no window.
    """
    assert causal and not window
    length = q.shape[1]
    step = math.lcm(*(size for blocks in segment_flash.BLOCKS for size in (blocks.queries, blocks.keys)))
    padded = math.ceil(length / step) * step
    q, k, v = (_pad(x, padded) for x in (q, k, v))
    out = segment_flash.segment_attention(q, k, v, _pad(q_segments, padded), interpret=interpret)
    return _zero_blind(out[:, :length], q_segments, kv_segments, causal).astype(v.dtype)


def cudnn_attention(q, k, v, q_segments=None, kv_segments=None, causal=False, window=0, implementation="cudnn"):
    """Calls cuDNN's fused attention (NVIDIA GPU). It has no segments, so they become a mask of two bytes per pair.

    It takes float16 and bfloat16 only. `implementation`: see `jax.nn.dot_product_attention`; tests use another.
    """
    q_length, k_length, extra = q.shape[1], k.shape[1], {}
    # Its backward pass needs even lengths.
    q, k, v = (_pad(x, x.shape[1] + x.shape[1] % 2) for x in (q, k, v))
    if q_segments is not None:
        ours, theirs = _pad(q_segments, q.shape[1]), _pad(kv_segments, k.shape[1], UNSEEN)
        sees = (ours[:, :, None] == theirs[:, None, :]) & (theirs > 0)[:, None, :]
        # A query without a key would make its gradient NaN: it sees all keys, and `_zero_blind` undoes that.
        extra["mask"] = (sees | ~sees.any(-1, keepdims=True))[:, None]
    elif k.shape[1] > k_length:
        extra["key_value_seq_lengths"] = jnp.full(len(k), k_length, jnp.int32)
    if window:
        extra["local_window_size"] = (window - 1, 0)
    out = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=implementation, **extra)[:, :q_length]
    return out if q_segments is None else _zero_blind(out, q_segments, kv_segments, causal).astype(v.dtype)
