"""Computes causal flash attention of packed rows on TPUs (Pallas); skips other segments' blocks.

A program has a few key/value heads with their whole row of keys and values, and a part of the row's queries of the
heads that share them. It takes 128 queries of every head at a time, and only the keys from the block `first`, in which
their earliest segment begins, to the diagonal:

    program     for each 128 queries of a head                writes
    forward     2 products a block of keys                    output, log-sum-exp
    backward    5 products a block of keys                    d(query); after the last queries d(key), d(value)

Arrays of scores are (keys, queries), so that what a query has once (maximum, sum, segment) is a row of lanes. `first`
comes from the ranges of segment ids that blocks hold, so segments in any order give correct results, and rows packed one
segment after the other are cheap. Algorithm: FlashAttention-2 (arXiv 2307.08691).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK = 128  # positions of the smallest block: the lanes of a TPU
LONGEST = 8192  # positions of keys that a program holds, of all its heads; longer rows do not fit
_QUERY_HEADS = 4  # of a program, where so many keys fit: their products are independent and hide each other's latency
_STEPS = (4, 2, 1)  # blocks of keys that a program takes at once, the largest that remain first
_VMEM = 48 * 2**20  # bytes that a program may take
_HIDDEN = -1e30  # a score whose weight is 0, and which no sum makes infinite
_LOG2E = math.log2(math.e)


def first_blocks(segments: jax.Array) -> jax.Array:
    """Returns which block of keys is the first that each block of queries must read.

    Args:
      segments: int32 (B, S), S a multiple of `BLOCK`; 0 is padding.

    Returns:
      int32 (B, S / BLOCK); for blocks of padding the one after themselves: they read nothing.
    """
    blocks = segments.reshape(len(segments), -1, BLOCK)
    low, high = jnp.where(blocks > 0, blocks, jnp.iinfo(jnp.int32).max).min(-1), blocks.max(-1)
    meets = (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
    index = jnp.arange(blocks.shape[1], dtype=jnp.int32)
    return jnp.where(meets, index, index[:, None] + 1).min(2)


def _over_keys(first, last, body, state):
    """Runs `body` over the blocks from `first` to before `last`, several at a time: (start, positions, state) -> state."""
    start, count = first, last - first
    for step in _STEPS:
        times = jax.lax.div(count, step)  # `//` asks for the device that is there
        state = jax.lax.fori_loop(
            0, times, lambda i, state, a=start, n=step: body((a + i * n) * BLOCK, n * BLOCK, state), state
        )
        start, count = start + times * step, count - times * step
    return state


def _queries(ref, head, group, here):
    """Loads the queries of a group of heads, one head after the other: (group * BLOCK, d)."""
    return ref[head * group : (head + 1) * group, here, :].reshape(group * BLOCK, ref.shape[2])


def _row(ref, head, group, here):
    """Loads a number for each of those queries: (1, group * BLOCK)."""
    return jnp.concatenate([ref[head * group + g, :, here] for g in range(group)], axis=1)


def _sees(theirs, ours, start, size, block):
    """Returns which of `size` keys from `start` on each query of a block sees: (keys, queries)."""
    shape = size, ours.shape[1]
    key = start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    query = block * BLOCK + jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, shape, 1), BLOCK)
    return (jnp.tile(theirs, (1, shape[1] // BLOCK)) == ours) & (key <= query)


def _dot(a, b, contract: tuple[int, int]):
    """Computes a product over axis `contract[0]` of `a` and `contract[1]` of `b`, with a float32 result."""
    return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)


def _forward_kernel(first_ref, q_ref, k_ref, v_ref, ours_ref, theirs_ref, out_ref, lse_ref, sum_ref, *, scale):
    heads, group, blocks = k_ref.shape[0], q_ref.shape[0] // k_ref.shape[0], q_ref.shape[1] // BLOCK
    row, part = pl.program_id(0), pl.program_id(2)

    def over_queries(i, _):
        block, here = part * blocks + i, pl.ds(i * BLOCK, BLOCK)
        ours = jnp.tile(ours_ref[:, here], (1, group))
        queries = [_queries(q_ref, head, group, here) for head in range(heads)]
        sum_ref[...] = jnp.zeros_like(sum_ref)

        def over_keys(start, size, state):
            keys = pl.ds(pl.multiple_of(start, BLOCK), size)
            sees = _sees(theirs_ref[keys, :], ours, start, size, block)
            new = []
            for head, (top, total) in enumerate(state):
                scores = _dot(k_ref[head, keys, :], queries[head], (1, 1)) * (scale * _LOG2E)
                scores = jnp.where(sees, scores, _HIDDEN)
                new_top = jnp.maximum(top, scores.max(axis=0, keepdims=True))
                shrink, weights = jnp.exp2(top - new_top), jnp.exp2(scores - new_top)
                values = _dot(v_ref[head, keys, :], weights.astype(v_ref.dtype), (0, 0))
                sum_ref[head] = sum_ref[head] * shrink + values
                new.append((new_top, total * shrink + weights.sum(axis=0, keepdims=True)))
            return tuple(new)

        # A query that sees no key keeps this maximum, which is above every hidden score: its sum is 0.
        begin = jnp.full(ours.shape, _HIDDEN / 2, jnp.float32), jnp.zeros(ours.shape, jnp.float32)
        state = _over_keys(first_ref[row, block], block + 1, over_keys, (begin,) * heads)
        for head, (top, total) in enumerate(state):
            blind = total == 0
            out = sum_ref[head] / jnp.where(blind, 1.0, total)
            lse = jnp.where(blind, -_HIDDEN, top + jnp.log2(total))
            for g in range(group):
                lanes = slice(g * BLOCK, (g + 1) * BLOCK)
                out_ref[head * group + g, here, :] = out[:, lanes].T.astype(out_ref.dtype)
                lse_ref[head * group + g, :, here] = lse[:, lanes]

    jax.lax.fori_loop(0, blocks, over_queries, None)


def _backward_kernel(
    first_ref, q_ref, k_ref, v_ref, ours_ref, theirs_ref, g_ref, lse_ref, delta_ref,
    d_q_ref, d_k_ref, d_v_ref, q_sum_ref, k_sum_ref, v_sum_ref, *, scale,
):  # fmt: skip
    heads, group, blocks = k_ref.shape[0], q_ref.shape[0] // k_ref.shape[0], q_ref.shape[1] // BLOCK
    row, part = pl.program_id(0), pl.program_id(2)

    @pl.when(part == 0)
    def _():
        k_sum_ref[...] = jnp.zeros_like(k_sum_ref)
        v_sum_ref[...] = jnp.zeros_like(v_sum_ref)

    def over_queries(i, _):
        block, here = part * blocks + i, pl.ds(i * BLOCK, BLOCK)
        ours = jnp.tile(ours_ref[:, here], (1, group))
        of_heads = [
            (*(_queries(ref, head, group, here) for ref in (q_ref, g_ref)), *(_row(ref, head, group, here) for ref in (lse_ref, delta_ref)))
            for head in range(heads)
        ]
        q_sum_ref[...] = jnp.zeros_like(q_sum_ref)

        def over_keys(start, size, state):
            keys = pl.ds(pl.multiple_of(start, BLOCK), size)
            sees = _sees(theirs_ref[keys, :], ours, start, size, block)
            for head, (q, g, lse, delta) in enumerate(of_heads):
                k, v = k_ref[head, keys, :], v_ref[head, keys, :]
                scores = _dot(k, q, (1, 1)) * (scale * _LOG2E)
                weights = jnp.exp2(jnp.where(sees, scores, _HIDDEN) - lse)
                v_sum_ref[head, keys, :] += _dot(weights.astype(g.dtype), g, (1, 0))
                d_scores = (weights * (_dot(v, g, (1, 1)) - delta)).astype(q.dtype)
                k_sum_ref[head, keys, :] += _dot(d_scores, q, (1, 0))
                q_sum_ref[head] += _dot(k, d_scores, (0, 0))
            return state

        _over_keys(first_ref[row, block], block + 1, over_keys, None)
        for head in range(heads):
            d_q = q_sum_ref[head] * scale
            for g in range(group):
                d_q_ref[head * group + g, here, :] = d_q[:, g * BLOCK : (g + 1) * BLOCK].T.astype(d_q_ref.dtype)

    jax.lax.fori_loop(0, blocks, over_queries, None)

    @pl.when(part == pl.num_programs(2) - 1)
    def _():
        d_k_ref[...] = (k_sum_ref[...] * scale).astype(d_k_ref.dtype)
        d_v_ref[...] = v_sum_ref[...].astype(d_v_ref.dtype)


def _heads(groups: int, group: int, length: int) -> int:
    """Returns how many key/value heads a program has."""
    fit = max(1, min(_QUERY_HEADS // group, LONGEST // length))
    return next(heads for heads in range(fit, 0, -1) if groups % heads == 0)


def _call(kernel, name, part, interpret, in_kinds, out_kinds, sums, first, *arrays):
    """Calls a kernel on a grid of (rows, key/value heads, parts of the queries).

    Kinds of arrays: `queries` (B, H, S, d), `keys` (B, K, S, d), `query_row` (B, H, 1, S), and segment ids: `ours`
    (B, 1, S) of queries and `theirs` (B, S, BLOCK) of keys.
    """
    q, k = arrays[:2]
    batch, groups, length, width = k.shape
    heads = _heads(groups, q.shape[1] // groups, length)
    group = q.shape[1] // groups
    specs = {
        "queries": pl.BlockSpec((None, heads * group, part, width), lambda b, h, i, *_: (b, h, i, 0)),
        "keys": pl.BlockSpec((None, heads, length, width), lambda b, h, i, *_: (b, h, 0, 0)),
        "query_row": pl.BlockSpec((None, heads * group, 1, part), lambda b, h, i, *_: (b, h, 0, i)),
        "ours": pl.BlockSpec((None, 1, part), lambda b, h, i, *_: (b, 0, i)),
        "theirs": pl.BlockSpec((None, length, BLOCK), lambda b, h, i, *_: (b, 0, 0)),
    }
    out_shapes = {
        "queries": jax.ShapeDtypeStruct(q.shape, q.dtype),
        "keys": jax.ShapeDtypeStruct(k.shape, k.dtype),
        "query_row": jax.ShapeDtypeStruct((*q.shape[:2], 1, length), jnp.float32),
    }
    sum_shapes = {"queries": (heads, width, group * BLOCK), "keys": (heads, length, width)}
    return pl.pallas_call(
        functools.partial(kernel, scale=width**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, groups // heads, length // part),
            in_specs=[specs[kind] for kind in in_kinds],
            out_specs=[specs[kind] for kind in out_kinds],
            scratch_shapes=[pltpu.VMEM(sum_shapes[kind], jnp.float32) for kind in sums],
        ),
        out_shape=[out_shapes[kind] for kind in out_kinds],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        name=name,
        interpret=interpret,
    )(first, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def segment_attention(q, k, v, segments, part, interpret=False):
    """Computes causal attention within segments: q (B, H, S, d); k, v (B, K, S, d), K divides H; segments int32 (B, S).

    Args:
      part: queries of a program; a multiple of `BLOCK` that divides S. S is at most `LONGEST`.

    Returns:
      (B, H, S, d); zeros for padding, segment 0.
    """
    return _forward(q, k, v, segments, part, interpret)[0]


def _ids(segments):
    """Returns the segment ids of queries as a row of lanes, and those of keys as a column repeated in every lane."""
    ours = jnp.where(segments > 0, segments, -1)[:, None]
    return ours, jnp.broadcast_to(segments[:, :, None], (*segments.shape, BLOCK))


_INPUTS = ("queries", "keys", "keys", "ours", "theirs")


def _forward(q, k, v, segments, part, interpret):
    out, lse = _call(
        *(_forward_kernel, "segment_flash_tpu_forward", part, interpret),
        *(_INPUTS, ("queries", "query_row"), ("queries",)),
        *(first_blocks(segments), q, k, v, *_ids(segments)),
    )
    return out, (q, k, v, segments, out, lse)


def _backward(part, interpret, kept, g):
    q, k, v, segments, out, lse = kept
    delta = jnp.sum(out.astype(jnp.float32) * g.astype(jnp.float32), -1)[:, :, None]
    inputs = (*_INPUTS, "queries", "query_row", "query_row")
    d_q, d_k, d_v = _call(
        *(_backward_kernel, "segment_flash_tpu_backward", part, interpret),
        *(inputs, ("queries", "keys", "keys"), ("queries", "keys", "keys")),
        *(first_blocks(segments), q, k, v, *_ids(segments), g, lse, delta),
    )
    return d_q, d_k, d_v, None


segment_attention.defvjp(_forward, _backward)
