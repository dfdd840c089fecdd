"""Attention kernels against loops in float64: masks, packing, grouped heads, gradients, bfloat16."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.fixtures import random_array

from fusion_jax.models import cpu_attention, cpu_kernels
from fusion_jax.models.attention import (
    attention,
    blocked_attention,
    extending_attention,
    reference_attention,
    score_product,
)

KERNELS = {"reference": reference_attention, "blocked": blocked_attention}
if cpu_kernels.available():
    KERNELS["compiled"] = cpu_attention.compiled_attention
HEADS, GROUPS, SIZE = 4, 2, 6

# Two packed examples and padding; one short example and padding.
PACKED = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 0, 0, 0]], np.int32)
# Queries of segment 3 have no key at all, those of segment 0 are padding.
CROSS = np.array([[1, 2, 3, 1, 2], [1, 1, 1, 0, 3]], np.int32)
CROSS_KEYS = np.array([[1, 1, 2, 2, 0, 1, 0, 2, 1], [1, 0, 0, 0, 1, 1, 1, 0, 0]], np.int32)
# name: (query segments, key segments, causal, window, kv heads, query length, key length)
CASES = {
    "plain": (None, None, False, 0, GROUPS, 5, 9),
    "cross": (CROSS, CROSS_KEYS, False, 0, 1, 5, 9),
    "segments": (PACKED, PACKED, False, 0, HEADS, 7, 7),
    "causal": (PACKED, PACKED, True, 0, GROUPS, 7, 7),
    "window": (PACKED, PACKED, True, 2, GROUPS, 7, 7),
}


def loops(q, k, v, q_segments, kv_segments, causal, window=0):
    """Softmax attention one query at a time, in float64."""
    batch, q_length, heads, size = q.shape
    out = np.zeros(q.shape)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // k.shape[2])
            for i in range(q_length):
                seen = [
                    j
                    for j in range(k.shape[1])
                    if (q_segments is None or (q_segments[b, i] == kv_segments[b, j] != 0))
                    and (not causal or j <= i)
                    and (not window or i - j < window)
                ]
                if not seen:
                    continue
                scores = np.array([np.dot(q[b, i, h], k[b, j, g]) / math.sqrt(size) for j in seen], np.float64)
                weights = np.exp(scores - scores.max())
                out[b, i, h] = (weights[:, None] * v[b, seen, g]).sum(0) / weights.sum()
    return out


@functools.cache
def arrays(case):
    groups, q_length, k_length = CASES[case][4:]
    q, cotangent = (random_array(2, q_length, HEADS, SIZE, seed=s) for s in (0, 1))
    k, v = (random_array(2, k_length, groups, SIZE, seed=s) for s in (2, 3))
    return q, k, v, cotangent


@functools.cache
def compiled(kernel, case):
    *segments, causal, window = CASES[case][:4]
    q_segments, kv_segments = (None if s is None else jnp.asarray(s) for s in segments)

    def run(q, k, v, cotangent):
        out, pull = jax.vjp(lambda *a: KERNELS[kernel](*a, q_segments, kv_segments, causal, window), q, k, v)
        return out, pull(cotangent.astype(out.dtype))

    return jax.jit(run)


def run(kernel, case, dtype=jnp.float32, inputs=None):
    out, grads = compiled(kernel, case)(*(jnp.asarray(a, dtype) for a in inputs or arrays(case)))
    assert out.dtype == dtype and all(g.dtype == dtype for g in grads)
    return np.asarray(out, np.float32), [np.asarray(g, np.float32) for g in grads]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_forward_equals_loops(kernel, case):
    expected = loops(*arrays(case)[:3], *CASES[case][:4])
    np.testing.assert_allclose(run(kernel, case)[0], expected, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "reference"])
def test_gradients_of_all_kernels_agree(kernel, case):
    for ours, plain in zip(run(kernel, case)[1], run("reference", case)[1]):
        assert np.abs(plain).max() > 0.1
        np.testing.assert_allclose(ours, plain, atol=5e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_equals_finite_differences(kernel):
    *inputs, cotangent = arrays("causal")
    grads = run(kernel, "causal")[1]
    for k in range(3):
        direction = random_array(*inputs[k].shape, seed=9).astype(np.float64)
        moved = [
            [a + sign * 1e-5 * direction if i == k else a.astype(np.float64) for i, a in enumerate(inputs)]
            for sign in (1, -1)
        ]
        high, low = ((loops(*m, *CASES["causal"][:4]) * cotangent).sum() for m in moved)
        np.testing.assert_allclose((grads[k] * direction).sum(), (high - low) / 2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["plain", "causal"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_is_near_float32(kernel, case):
    out, grads = run(kernel, case, jnp.bfloat16)
    expected, expected_grads = run("reference", case)
    np.testing.assert_allclose(out, expected, atol=0.03)
    for ours, plain in zip(grads, expected_grads):
        np.testing.assert_allclose(ours, plain, atol=0.02 * np.abs(plain).max() + 0.02)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_query_without_keys_gives_zeros_and_finite_gradients(kernel):
    out, grads = run(kernel, "cross")
    blind = (CROSS == 3) | (CROSS == 0)
    assert blind.any() and (out[blind] == 0).all() and (out[~blind] != 0).all()
    assert all(np.isfinite(g).all() for g in grads)
    assert (grads[0][blind] == 0).all()
    assert (grads[1][CROSS_KEYS == 0] == 0).all() and (grads[2][CROSS_KEYS == 0] == 0).all()


@pytest.mark.parametrize("case", ["segments", "causal"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_packed_segments_do_not_see_each_other(kernel, case):
    q, k, v, cotangent = arrays(case)
    others = PACKED != 1
    changed = [np.where(others[..., None, None], a + 5, a) for a in (q, k, v)]
    # No gradient flows in at the other segments either.
    cotangent = np.where(others[..., None, None], 0, cotangent)
    out, grads = run(kernel, case, inputs=(q, k, v, cotangent))
    out_changed, grads_changed = run(kernel, case, inputs=(*changed, cotangent))
    np.testing.assert_array_equal(out[~others], out_changed[~others])
    assert np.abs(out[PACKED == 2] - out_changed[PACKED == 2]).max() > 0.1
    for a, b in zip(grads, grads_changed):
        np.testing.assert_array_equal(a[~others], b[~others])
        assert (a[others] == 0).all()


def test_causal_rows_do_not_see_later_tokens():
    q, k, v, cotangent = arrays("causal")
    for kernel in KERNELS:
        before = run(kernel, "causal")[0]
        k_changed, v_changed = k.copy(), v.copy()
        k_changed[:, 2], v_changed[:, 2] = 3, 3
        after = run(kernel, "causal", inputs=(q, k_changed, v_changed, cotangent))[0]
        np.testing.assert_array_equal(before[:, :2], after[:, :2])
        assert (before[:, 2] != after[:, 2]).any()


def test_the_chosen_kernel_keeps_the_contract_on_long_rows():
    # Longer than what any kernel would leave to the plain one.
    length = 131
    q, k, v = (random_array(1, length, n, 4, seed=s) for s, n in ((0, 2), (1, 1), (2, 1)))
    segments = np.repeat([1, 2, 0], [60, 65, 6])[None].astype(np.int32)
    out = jax.jit(functools.partial(attention, causal=True))(q, k, v, segments, segments)
    np.testing.assert_allclose(out, loops(q, k, v, segments, segments, True), atol=5e-6)


@pytest.mark.parametrize("kernel", ["reference", "blocked"])
def test_all_products_of_bfloat16_attention_are_of_bfloat16(kernel):
    def total(*arrays):
        return KERNELS[kernel](*arrays).astype(jnp.float32).sum()

    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in arrays("plain"))
    text = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, v).as_text()
    products = re.findall(r"dot_general .* : \(tensor<(\S+)>, tensor<(\S+)>\)", text)
    assert len(products) >= 5 and {shape.split("x")[-1] for pair in products for shape in pair} == {"bf16"}


def test_gradient_of_scores_is_that_of_the_product():
    q, k, *_ = map(jnp.asarray, arrays("plain"))
    k = jnp.repeat(k, HEADS // GROUPS, axis=2)
    equation, by = "bqhd,bkhd->bhqk", random_array(2, HEADS, 5, 9, seed=7)

    def gradients(product):
        return jax.grad(lambda q, k: (product(equation, q, k) * by).sum(), (0, 1))(q, k)

    for ours, theirs in zip(gradients(score_product), gradients(jnp.einsum)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [HEADS, GROUPS, 1])
def test_tokens_that_extend_a_cache_see_it_and_each_other(heads):
    """Three new tokens behind four of the cache; slot 1 is padding, two slots are free, and a window hides some."""
    q = random_array(2, 9, HEADS, SIZE, seed=0)
    k, v = (random_array(2, 9, heads, SIZE, seed=s) for s in (1, 2))
    segments = np.array([[1, 0, 1, 1, 1, 1, 1, 0, 0]] * 2, np.int32)
    distance = np.arange(4, 7)[:, None] - np.arange(9)
    seen = np.broadcast_to((distance >= 0) & (distance < 5) & (segments[:, None] > 0), (2, 3, 9))
    keys, values = (np.stack([np.full_like(x, 9.0), x]) for x in (k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)))
    got = extending_attention(*map(jnp.asarray, (q[:, 4:7], keys, values, np.int32(1), seen)))
    expected = loops(q, k, v, segments, segments, True, 5)[:, 4:7]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
