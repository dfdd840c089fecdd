"""Computes causal flash attention of packed rows in Triton (NVIDIA GPU); skips other segments' blocks.

    one program                 reads                              and writes
    forward: a block of queries  keys from `first` to the diagonal  output, log-sum-exp
    keys:    a block of keys     queries from the diagonal to `last` d(key), d(value)
    queries: a block of queries  keys from `first` to the diagonal  d(query)

`first` and `last` come from the ranges of segment ids that blocks hold, so segments in any order give correct results,
and rows packed one segment after the other are cheap. Algorithm: FlashAttention-2 (arXiv 2307.08691).
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

_HIDDEN = -1e30  # a score whose weight is 0, and which no sum makes infinite
_LAST = 2**30  # the first segment id of padding, which comes after all others
_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Blocks:
    """The sizes of a kernel: queries and keys of a block, warps and pipeline stages of a program."""

    queries: int
    keys: int
    warps: int
    stages: int


# The fastest of those tried on an H100; see docs/performance.md.
BLOCKS = FORWARD, KEYS, QUERIES = Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)


def ranges(segments: jax.Array, queries: int, keys: int) -> tuple[jax.Array, jax.Array]:
    """Returns which blocks may hold the same segments.

    Returns:
      first: int32 (B, S / queries), the first block of keys that each block of queries must read. last: int32
      (B, S / keys), one more than the last block of queries that must read each block of keys.
    """
    batch = len(segments)
    of_queries, of_keys = (segments.reshape(batch, -1, size) for size in (queries, keys))
    meets = (of_queries.min(-1)[:, :, None] <= of_keys.max(-1)[:, None]) & (
        of_keys.min(-1)[:, None] <= of_queries.max(-1)[:, :, None]
    )
    first = jnp.argmax(meets, axis=2)
    last = meets.shape[1] - jnp.argmax(meets[:, ::-1], axis=1)
    return first.astype(jnp.int32), last.astype(jnp.int32)


def _load(ref, start, size, width):
    """Loads (size, padded width) of a (S, width) array, from row `start` on, with zeros beyond the width."""
    columns = jnp.arange(ref.shape[-1])[None] < width
    return plt.load(ref.at[pl.ds(start, size), :], mask=columns, other=0.0)


def _scores(q, k, q_segments, k_segments, q_start, k_start, scale):
    """Computes scores in base 2 (queries, keys), `_HIDDEN` where a query does not see a key."""
    q_places, k_places = q_start + jnp.arange(q.shape[0]), k_start + jnp.arange(k.shape[0])
    sees = (q_segments[:, None] == k_segments[None]) & (q_places[:, None] >= k_places[None])
    return jnp.where(sees, plt.dot(q, k.T) * (scale * _LOG2E), _HIDDEN)


def _forward_kernel(q_ref, k_ref, v_ref, segments_ref, first_ref, out_ref, lse_ref, *, blocks, width, scale):
    size, step = blocks.queries, blocks.keys
    start = pl.program_id(0) * size
    q, mine = _load(q_ref, start, size, width), segments_ref[pl.ds(start, size)]

    def over_keys(block, carry):
        total, top, out = carry
        at = block * step
        k, v = _load(k_ref, at, step, width), _load(v_ref, at, step, width)
        scores = _scores(q, k, mine, segments_ref[pl.ds(at, step)], start, at, scale)
        new_top = jnp.maximum(top, scores.max(axis=1))
        shrink, weights = jnp.exp2(top - new_top), jnp.exp2(scores - new_top[:, None])
        out = out * shrink[:, None] + plt.dot(weights.astype(v.dtype), v)
        return total * shrink + weights.sum(axis=1), new_top, out

    zeros = jnp.zeros(size, jnp.float32)
    begin = zeros, zeros + 2 * _HIDDEN, jnp.zeros((size, q.shape[1]), jnp.float32)
    total, top, out = jax.lax.fori_loop(first_ref[...], pl.cdiv(start + size, step), over_keys, begin)
    columns = jnp.arange(out.shape[1])[None] < width
    plt.store(out_ref, (out / total[:, None]).astype(out_ref.dtype), mask=columns)
    lse_ref[...] = top + jnp.log2(total)


def _keys_kernel(
    q_ref, k_ref, v_ref, segments_ref, last_ref, g_ref, lse_ref, delta_ref, d_k_ref, d_v_ref, *, blocks, width, scale
):
    size, step = blocks.keys, blocks.queries
    start = pl.program_id(0) * size
    k, v = _load(k_ref, start, size, width), _load(v_ref, start, size, width)
    mine = segments_ref[pl.ds(start, size)]

    def over_queries(block, carry):
        d_k, d_v = carry
        at = block * step
        q, g = _load(q_ref, at, step, width), _load(g_ref, at, step, width)
        scores = _scores(q, k, segments_ref[pl.ds(at, step)], mine, at, start, scale)
        weights = jnp.exp2(scores - lse_ref[pl.ds(at, step)][:, None])
        d_v += plt.dot(weights.astype(g.dtype).T, g)
        d_scores = weights * (plt.dot(g, v.T) - delta_ref[pl.ds(at, step)][:, None])
        return d_k + plt.dot(d_scores.astype(q.dtype).T, q), d_v

    zeros = jnp.zeros((size, k.shape[1]), jnp.float32)
    d_k, d_v = jax.lax.fori_loop(start // step, last_ref[...], over_queries, (zeros, zeros))
    columns = jnp.arange(k.shape[1])[None] < width
    plt.store(d_k_ref, (d_k * scale).astype(d_k_ref.dtype), mask=columns)
    plt.store(d_v_ref, d_v.astype(d_v_ref.dtype), mask=columns)


def _queries_kernel(
    q_ref, k_ref, v_ref, segments_ref, first_ref, g_ref, lse_ref, delta_ref, d_q_ref, *, blocks, width, scale
):
    size, step = blocks.queries, blocks.keys
    start = pl.program_id(0) * size
    q, g = _load(q_ref, start, size, width), _load(g_ref, start, size, width)
    mine, lse, delta = (ref[pl.ds(start, size)] for ref in (segments_ref, lse_ref, delta_ref))

    def over_keys(block, d_q):
        at = block * step
        k, v = _load(k_ref, at, step, width), _load(v_ref, at, step, width)
        scores = _scores(q, k, mine, segments_ref[pl.ds(at, step)], start, at, scale)
        weights = jnp.exp2(scores - lse[:, None])
        d_scores = weights * (plt.dot(g, v.T) - delta[:, None])
        return d_q + plt.dot(d_scores.astype(k.dtype), k)

    d_q = jnp.zeros((size, q.shape[1]), jnp.float32)
    d_q = jax.lax.fori_loop(first_ref[...], pl.cdiv(start + size, step), over_keys, d_q)
    columns = jnp.arange(d_q.shape[1])[None] < width
    plt.store(d_q_ref, (d_q * scale).astype(d_q_ref.dtype), mask=columns)


def _call(kernel, name, blocks, grid_size, shape, repeat, interpret, in_kinds, out_kinds, *arrays):
    """Calls a kernel on a grid of (blocks of the row, heads, rows).

    Kinds of arrays: `heads` and `groups` (whole rows of a query head, or of the key/value head that a group of heads
    shares), `row` (B, S), `bound` (B, blocks), `sums` (B, H, S); `part` and `part_sums` are a block of heads and sums.
    """
    batch, length, heads, width = shape
    padded = pl.next_power_of_2(width)
    own = length // grid_size
    specs = {
        "heads": pl.BlockSpec((None, length, None, padded), lambda i, h, b: (b, 0, h, 0)),
        "groups": pl.BlockSpec((None, length, None, padded), lambda i, h, b: (b, 0, h // repeat, 0)),
        "row": pl.BlockSpec((None, length), lambda i, h, b: (b, 0)),
        "bound": pl.BlockSpec((None, None), lambda i, h, b: (b, i)),
        "sums": pl.BlockSpec((None, None, length), lambda i, h, b: (b, h, 0)),
        "part": pl.BlockSpec((None, own, None, padded), lambda i, h, b: (b, i, h, 0)),
        "part_sums": pl.BlockSpec((None, None, own), lambda i, h, b: (b, h, i)),
    }
    out_shapes = {
        "part": jax.ShapeDtypeStruct(shape, arrays[0].dtype),
        "part_sums": jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
    }
    return pl.pallas_call(
        functools.partial(kernel, blocks=blocks, width=width, scale=width**-0.5),
        grid=(grid_size, heads, batch),
        in_specs=[specs[kind] for kind in in_kinds],
        out_specs=[specs[kind] for kind in out_kinds],
        out_shape=[out_shapes[kind] for kind in out_kinds],
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        name=name,
        interpret=interpret,
    )(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def segment_attention(q, k, v, segments, blocks=BLOCKS, interpret=False):
    """Computes causal attention within segments: q (B, S, H, d); k, v (B, S, K, d), K divides H; segments int32 (B, S).

    S must be a multiple of every block. Padding, segment 0, sees some of the padding before it. On a device the
    arrays must have 16 bits.
    """
    return _forward(q, k, v, segments, blocks, interpret)[0]


def _forward(q, k, v, segments, blocks, interpret):
    forward, repeat = blocks[0], q.shape[2] // k.shape[2]
    # Each block of padding is a segment of its own, so that long padding costs no more than its own blocks.
    padding = _LAST + jnp.arange(segments.shape[1], dtype=jnp.int32) // forward.queries
    segments = jnp.where(segments > 0, segments, padding)
    first, _ = ranges(segments, forward.queries, forward.keys)
    out, lse = _call(
        *(_forward_kernel, "segment_flash_forward", forward, first.shape[1], q.shape, repeat, interpret),
        *(("heads", "groups", "groups", "row", "bound"), ("part", "part_sums")),
        *(q, k, v, segments, first),
    )
    return out, (q, k, v, segments, out, lse)


def _backward(blocks, interpret, kept, g):
    q, k, v, segments, out, lse = kept
    _, keys, queries = blocks
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    delta = jnp.sum(out.astype(jnp.float32) * g.astype(jnp.float32), -1).transpose(0, 2, 1)
    inputs = ("heads", "groups", "groups", "row", "bound", "heads", "sums", "sums")
    (first, _), (_, last) = ranges(segments, queries.queries, queries.keys), ranges(segments, keys.queries, keys.keys)
    about = q.shape, heads // groups, interpret, inputs
    d_k, d_v = _call(
        *(_keys_kernel, "segment_flash_keys", keys, last.shape[1], *about, ("part", "part")),
        *(q, k, v, segments, last, g, lse, delta),
    )
    (d_q,) = _call(
        *(_queries_kernel, "segment_flash_queries", queries, first.shape[1], *about, ("part",)),
        *(q, k, v, segments, first, g, lse, delta),
    )
    if groups < heads:
        of_groups = (batch, length, groups, heads // groups, width)
        d_k, d_v = (x.reshape(of_groups).astype(jnp.float32).sum(3).astype(x.dtype) for x in (d_k, d_v))
    return d_q, d_k, d_v, None


segment_attention.defvjp(_forward, _backward)
