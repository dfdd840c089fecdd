"""Computes flash attention on TPUs (Pallas); skips blocks of keys that no query of a block of queries sees.

A program has one key/value head with all keys and values of a row, and a part of the queries of heads that share it. It
takes a block of queries at a time, and only the blocks of keys between the first and the last that one of them sees:

    program     computes for each block of queries            and at the end
    forward     output, log-sum-exp (2 products)
    backward    d(query), and adds to its sums (5 products)   d(key), d(value)

Scores are (keys, queries), so that what a query has once (maximum, sum, segment) is one row of lanes. Which blocks of
keys are seen comes from the ranges of segment ids that blocks hold: segments in any order give correct results, and
rows packed one segment after the other are cheap. Algorithm: FlashAttention-2 (arXiv 2307.08691).
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK = 128  # keys of a block: the lanes of a TPU
_STEPS = (4, 2, 1)  # blocks of keys that are taken at once, the largest that remain first
_LANES = 512  # queries that are taken at once, of all heads of a program, unless one head's block is larger
_KEY_BYTES = 2 * 2**20  # of a head that fit into a program
_VMEM = 48 * 2**20  # bytes that a program may take of a core's vector memory, which has 64 MiB or more from v5e on
_HIDDEN = -1e30  # a score whose weight is 0, and which no sum makes infinite
_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Attention:
    """What a call computes and how.

    Attributes:
      causal, window: see `attention.attention`. queries: of a block, a multiple of `BLOCK`. part: queries of a head in
      one program, a multiple of `queries` that divides their length.
    """

    causal: bool
    window: int
    queries: int
    part: int
    interpret: bool = False


def fits(length: int, width: int, dtype) -> bool:
    """Returns whether a program can hold all keys of a head: 8192 of 16 bits if the head has up to 128 numbers."""
    return length * math.ceil(width / BLOCK) * BLOCK * jnp.dtype(dtype).itemsize <= _KEY_BYTES


def seen_blocks(how: Attention, q_segments: jax.Array, kv_segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns which blocks of keys each block of queries may see.

    Args:
      q_segments: int32 (B, Q). kv_segments: int32 (B, S). 0 is padding, which sees and is seen by nothing.

    Returns:
      first: int32 (B, Q / queries), the first such block of keys. last: one more than the last; 0 if there is none.
    """

    def ranges(segments, size):
        blocks = segments.reshape(len(segments), -1, size)
        return jnp.where(blocks > 0, blocks, jnp.iinfo(jnp.int32).max).min(-1), blocks.max(-1)

    (q_low, q_high), (k_low, k_high) = ranges(q_segments, how.queries), ranges(kv_segments, BLOCK)
    meets = (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
    query, key = jnp.arange(q_low.shape[1])[:, None] * how.queries, jnp.arange(k_low.shape[1]) * BLOCK
    if how.causal:
        meets &= key < query + how.queries
    if how.window:
        meets &= key + BLOCK > query - how.window + 1
    index = jnp.arange(meets.shape[2], dtype=jnp.int32)
    return jnp.where(meets, index, len(index)).min(2), jnp.where(meets, index + 1, 0).max(2)


def _over_keys(bounds_ref, block, keys, body, state):
    """Runs `body` over the seen blocks of so many keys, several at a time: (first key, size, state) -> state."""
    start, last = bounds_ref[2 * block], bounds_ref[2 * block + 1]
    count = jnp.maximum(last - start, 0)
    for step in (step for step in _STEPS if step * BLOCK <= keys):
        times = jax.lax.div(count, step)  # `//` would ask which TPU this machine has
        state = jax.lax.fori_loop(
            0, times, lambda i, state, a=start, n=step: body((a + i * n) * BLOCK, n * BLOCK, state), state
        )
        start, count = start + times * step, count - times * step
    return state


def _queries(ref, here):
    """Loads a block of queries of all heads, one head after the other: (heads * queries, d)."""
    heads, width = ref.shape[0], ref.shape[2]
    return ref[:, here, :].reshape(heads * here.size, width)


def _row(ref, here):
    """Loads a number for each of those queries: (1, heads * queries)."""
    return jnp.concatenate([ref[head, :, here] for head in range(ref.shape[0])], axis=1)


def _store(ref, here, columns):
    """Stores (d, heads * queries) as a block of queries of all heads."""
    for head in range(ref.shape[0]):
        ref[head, here, :] = columns[:, head * here.size : (head + 1) * here.size].T.astype(ref.dtype)


def _sees(how, theirs, ours, first_key, first_query):
    """Returns which keys each query of a block sees: (keys, heads * queries)."""
    shape = theirs.shape[0], ours.shape[1]
    sees = jnp.tile(theirs, (1, shape[1] // BLOCK)) == ours
    if how.causal:
        query = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, shape, 1), how.queries)
        distance = query - jax.lax.broadcasted_iota(jnp.int32, shape, 0)  # and that of the two blocks
        sees &= distance >= first_key - first_query
        if how.window:
            sees &= distance < how.window + first_key - first_query
    return sees


def _dot(a, b, contract: tuple[int, int]):
    """Computes a product over axis `contract[0]` of `a` and `contract[1]` of `b`, with a float32 result."""
    return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)


def _forward_kernel(bounds_ref, q_ref, k_ref, v_ref, ours_ref, theirs_ref, out_ref, lse_ref, sum_ref, *, how, scale):
    heads, blocks = q_ref.shape[0], how.part // how.queries
    part, first_block = pl.program_id(3), (pl.program_id(0) * pl.num_programs(3) + pl.program_id(3)) * blocks

    def over_queries(i, _):
        here = pl.ds(pl.multiple_of(i * how.queries, BLOCK), how.queries)
        q, ours = _queries(q_ref, here), jnp.tile(ours_ref[:, here], (1, heads))
        sum_ref[...] = jnp.zeros_like(sum_ref)

        def over_keys(first_key, size, state):
            top, total = state
            keys = pl.ds(pl.multiple_of(first_key, BLOCK), size)
            sees = _sees(how, theirs_ref[keys, :], ours, first_key, part * how.part + i * how.queries)
            scores = jnp.where(sees, _dot(k_ref[keys, :], q, (1, 1)) * (scale * _LOG2E), _HIDDEN)
            new_top = jnp.maximum(top, scores.max(axis=0, keepdims=True))
            shrink, weights = jnp.exp2(top - new_top), jnp.exp2(scores - new_top)
            sum_ref[...] = sum_ref[...] * shrink + _dot(v_ref[keys, :], weights.astype(v_ref.dtype), (0, 0))
            return new_top, total * shrink + weights.sum(axis=0, keepdims=True)

        # A query that sees no key keeps this maximum, which is above every hidden score: its sum is 0.
        begin = jnp.full(ours.shape, _HIDDEN / 2, jnp.float32), jnp.zeros(ours.shape, jnp.float32)
        top, total = _over_keys(bounds_ref, first_block + i, theirs_ref.shape[0], over_keys, begin)
        blind = total == 0
        _store(out_ref, here, sum_ref[...] / jnp.where(blind, 1.0, total))
        lse = jnp.where(blind, -_HIDDEN, top + jnp.log2(total))
        for head in range(heads):
            lse_ref[head, :, here] = lse[:, head * how.queries : (head + 1) * how.queries]

    jax.lax.fori_loop(0, blocks, over_queries, None)


def _backward_kernel(
    bounds_ref, q_ref, k_ref, v_ref, ours_ref, theirs_ref, g_ref, lse_ref, delta_ref,
    d_q_ref, d_k_ref, d_v_ref, q_sum_ref, k_sum_ref, v_sum_ref, *, how, scale,
):  # fmt: skip
    heads, blocks = q_ref.shape[0], how.part // how.queries
    part, first_block = pl.program_id(3), (pl.program_id(0) * pl.num_programs(3) + pl.program_id(3)) * blocks

    @pl.when((pl.program_id(2) == 0) & (part == 0))
    def _():
        k_sum_ref[...] = jnp.zeros_like(k_sum_ref)
        v_sum_ref[...] = jnp.zeros_like(v_sum_ref)

    def over_queries(i, _):
        here = pl.ds(pl.multiple_of(i * how.queries, BLOCK), how.queries)
        q, g = _queries(q_ref, here), _queries(g_ref, here)
        lse, delta, ours = _row(lse_ref, here), _row(delta_ref, here), jnp.tile(ours_ref[:, here], (1, heads))
        q_sum_ref[...] = jnp.zeros_like(q_sum_ref)

        def over_keys(first_key, size, state):
            keys = pl.ds(pl.multiple_of(first_key, BLOCK), size)
            k, v = k_ref[keys, :], v_ref[keys, :]
            sees = _sees(how, theirs_ref[keys, :], ours, first_key, part * how.part + i * how.queries)
            scores = jnp.where(sees, _dot(k, q, (1, 1)) * (scale * _LOG2E), _HIDDEN)
            weights = jnp.exp2(scores - lse)
            v_sum_ref[keys, :] += _dot(weights.astype(g.dtype), g, (1, 0))
            d_scores = (weights * (_dot(v, g, (1, 1)) - delta)).astype(q.dtype)
            k_sum_ref[keys, :] += _dot(d_scores, q, (1, 0))
            q_sum_ref[...] += _dot(k, d_scores, (0, 0))
            return state

        _over_keys(bounds_ref, first_block + i, theirs_ref.shape[0], over_keys, None)
        _store(d_q_ref, here, q_sum_ref[...] * scale)

    jax.lax.fori_loop(0, blocks, over_queries, None)

    @pl.when((pl.program_id(2) == pl.num_programs(2) - 1) & (part == pl.num_programs(3) - 1))
    def _():
        d_k_ref[...] = (k_sum_ref[...] * scale).astype(d_k_ref.dtype)
        d_v_ref[...] = v_sum_ref[...].astype(d_v_ref.dtype)


def _call(kernel, name, how, in_kinds, out_kinds, sums, *arrays):
    """Calls a kernel on a grid of (rows, key/value heads, heads that share one, parts of the queries).

    Kinds of arrays: `queries` (B, H, Q, d), `keys` (B, K, S, d), `query_row` (B, H, 1, Q), and segment ids: `ours`
    (B, 1, Q) of queries and `theirs` (B, S, BLOCK) of keys, or those of one row if all have the same.
    """
    _, q, k, *_ = arrays
    (batch, groups, keys, width), group = k.shape, q.shape[1] // k.shape[1]
    heads = next(n for n in range(group, 0, -1) if group % n == 0 and (n == 1 or n * how.queries <= _LANES))
    programs = group // heads
    rows = min(1, len(arrays[4]) - 1)  # 0 if all rows have the same ids
    specs = {
        "queries": pl.BlockSpec((None, heads, how.part, width), lambda b, k, h, i, *_: (b, k * programs + h, i, 0)),
        "keys": pl.BlockSpec((None, None, keys, width), lambda b, k, h, i, *_: (b, k, 0, 0)),
        "query_row": pl.BlockSpec((None, heads, 1, how.part), lambda b, k, h, i, *_: (b, k * programs + h, 0, i)),
        "ours": pl.BlockSpec((None, 1, how.part), lambda b, k, h, i, *_: (b * rows, 0, i)),
        "theirs": pl.BlockSpec((None, keys, BLOCK), lambda b, k, h, i, *_: (b * rows, 0, 0)),
    }
    out_shapes = {
        "queries": jax.ShapeDtypeStruct(q.shape, q.dtype),
        "keys": jax.ShapeDtypeStruct(k.shape, k.dtype),
        "query_row": jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[2]), jnp.float32),
    }
    sum_shapes = {"queries": (width, heads * how.queries), "keys": (keys, width)}
    return pl.pallas_call(
        functools.partial(kernel, how=how, scale=width**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, groups, programs, q.shape[2] // how.part),
            in_specs=[specs[kind] for kind in in_kinds],
            out_specs=[specs[kind] for kind in out_kinds],
            scratch_shapes=[pltpu.VMEM(sum_shapes[kind], jnp.float32) for kind in sums],
        ),
        out_shape=[out_shapes[kind] for kind in out_kinds],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        name=name,
        interpret=how.interpret,
    )(*arrays)


_INPUTS = ("queries", "keys", "keys", "ours", "theirs")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def segment_attention(how: Attention, q, k, v, q_segments, kv_segments):
    """Computes `attention.reference_attention` of arrays whose heads come before their positions.

    Args:
      q: (B, H, Q, d). k, v: (B, K, S, d), K divides H; S is a multiple of `BLOCK`, and `fits`.
      q_segments, kv_segments: int32 (B, Q), (B, S), or (1, Q), (1, S) if all rows have the same.

    Returns:
      (B, H, Q, d); zeros where a query sees no key.
    """
    return _forward(how, q, k, v, q_segments, kv_segments)[0]


def _inputs(how, q, k, v, q_segments, kv_segments):
    """Returns the arrays that both kernels read."""
    bounds = jnp.stack(seen_blocks(how, q_segments, kv_segments), -1)
    bounds = jnp.broadcast_to(bounds, (len(q), *bounds.shape[1:])).reshape(-1)
    ours = jnp.where(q_segments > 0, q_segments, -1)[:, None]  # no key is of segment -1
    theirs = jnp.broadcast_to(kv_segments[:, :, None], (*kv_segments.shape, BLOCK))
    return bounds, q, k, v, ours, theirs


def _forward(how, *arrays):
    out, lse = _call(
        *(_forward_kernel, "segment_flash_tpu_forward", how),
        *(_INPUTS, ("queries", "query_row"), ("queries",)),
        *_inputs(how, *arrays),
    )
    return out, (*arrays, out, lse)


def _backward(how, kept, g):
    *arrays, out, lse = kept
    delta = jnp.sum(out.astype(jnp.float32) * g.astype(jnp.float32), -1)[:, :, None]
    d_q, d_k, d_v = _call(
        *(_backward_kernel, "segment_flash_tpu_backward", how),
        *((*_INPUTS, "queries", "query_row", "query_row"), ("queries", "keys", "keys"), ("queries", "keys", "keys")),
        *(*_inputs(how, *arrays), g, lse, delta),
    )
    return d_q, d_k, d_v, None, None


segment_attention.defvjp(_forward, _backward)
