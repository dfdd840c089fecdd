"""The kernels of decoding on CPU give what XLA's operations give; a step copies neither cache nor weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.fixtures import tiny

from fusion_jax.inference import decoding, sampling
from fusion_jax.models import attention, cpu_decoding, cpu_kernels, fusion, llm, weights

pytestmark = pytest.mark.skipif(not cpu_kernels.available(), reason="needs a C compiler")


def cache_of(rows, heads, kv_heads, size, slots, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(rows, 1, heads, size)).astype(np.float32)
    keys = rng.normal(size=(3, rows, kv_heads, size, slots)).astype(np.float32)
    values = rng.normal(size=(3, rows, kv_heads, slots, size)).astype(np.float32)
    return q, keys, values, rng.integers(0, 3, (rows, slots)).astype(np.int32)


def attend(q, keys, values, layer, segments):
    return np.asarray(cpu_decoding.cached_attention(*map(jnp.asarray, (q, keys, values, layer, segments))))


def plain(monkeypatch, *arrays):
    with monkeypatch.context() as patch:
        patch.setattr(cpu_decoding, "attends", lambda *_: False)
        return np.asarray(attention.cached_attention(*map(jnp.asarray, arrays)))


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "size", "slots"),
    [(1, 1, 1, 8, 1), (2, 4, 4, 16, 63), (1, 16, 4, 16, 200), (3, 8, 1, 24, 129), (2, 9, 3, 96, 64), (1, 6, 2, 5, 77)],
)
def test_attention_over_a_layer_of_the_cache(monkeypatch, rows, heads, kv_heads, size, slots):
    q, keys, values, segments = cache_of(rows, heads, kv_heads, size, slots)
    segments[0, slots // 3 : slots - slots // 4] = 0  # whole blocks are not seen
    segments[:, 0] = 1
    for layer in range(3):
        arrays = (q, keys, values, layer, segments)
        np.testing.assert_allclose(attend(*arrays), plain(monkeypatch, *arrays), rtol=2e-5, atol=2e-6)


def test_slots_that_are_not_seen_do_not_matter_whatever_they_hold():
    q, keys, values, segments = cache_of(2, 4, 2, 16, 90)
    segments[:, 70:] = 0
    expected = attend(q, keys, values, 1, segments)
    keys[..., 70:], values[..., 70:, :] = np.nan, np.nan
    values = np.where(np.isnan(values), 1e30, values).astype(np.float32)
    np.testing.assert_array_equal(attend(q, keys, values, 1, segments), expected)
    segments[0] = 0
    assert not np.any(attend(q, keys, values, 1, segments)[0])


def test_large_scores_and_nan():
    q, keys, values, segments = cache_of(2, 4, 2, 16, 90)
    segments[:] = 1
    q[0] *= 1e4
    q[1, 0, 0, 0] = np.nan
    out = attend(q, keys, values, 1, segments)
    assert np.isfinite(out[0]).all() and np.isnan(out[1, 0, 0]).all() and np.isfinite(out[1, 0, 1:]).all()


@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(1, 7, 5), (3, 64, 128), (8, 33, 131), (13, 100, 700), (16, 1, 16)]
)
def test_product_with_int8_weights(rows, depth, columns):
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.normal(size=(rows, depth)), jnp.float32)
    integers, scales = weights.to_int8(jnp.asarray(rng.normal(size=(depth, columns)), jnp.float32))
    exact = np.asarray(x, np.float64) @ np.asarray(integers, np.float64) * np.asarray(scales, np.float64)
    np.testing.assert_allclose(cpu_decoding.product(x, integers, scales), exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(weights.scaled_product(x, integers, scales), exact, rtol=1e-5, atol=1e-5)


def test_step_of_decoding_reads_cache_and_weights_where_they_lie():
    """Nothing as large as a layer's part of the cache or a matrix is copied for a token."""
    config = tiny()
    model = fusion.Fusion(config)
    params = weights.unstack(fusion.init(config, jax.random.key(0)))
    rows, slots, c = 2, 512, config.llm
    none = jnp.zeros(rows, jnp.int32)
    state = decoding.State(
        jnp.zeros((rows, c.vocab_size)),
        none,
        llm.empty_cache(c, none + slots, slots, jnp.float32),
        jnp.int32(0),
        none > 0,
        none,
        none + 9,
        jnp.zeros((rows, c.vocab_size), bool),
        sampling.settings([sampling.Sampling()] * rows),
    )
    leaves, tree = jax.tree.flatten(state)
    run = jax.jit(lambda p, s: decoding.decode.__wrapped__(model, p, tree.unflatten(s), 4, (), False), donate_argnums=1)
    text = run.lower(params, leaves).compile().as_text()
    assert text.count('custom_call_target="fusion_cached_attention"') == c.layers
    layer = rows * c.kv_heads * c.per_head * slots
    for dims in re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|slice|dynamic-slice)\(", text):
        assert np.prod([int(d) for d in dims.split(",")]) < layer, dims
