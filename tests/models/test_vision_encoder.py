"""The encoder: pixels and patches, one layer against plain numpy under every mask, taps, padding, two views."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.fixtures import flat, params, random_array, tiny

from fusion_jax.models import fusion
from fusion_jax.models.config import VisionConfig
from fusion_jax.models.vision import EncoderLayer, VisionEncoder, normalise, patchify

PATCHES, TEXT, WIDTH = 9, 4, 16
# Three question tokens and padding; one token that is not at the front.
TEXT_MASK = np.array([[True, True, True, False], [False, True, False, False]])


def embedded(seed=0):
    """State 0 of two images and projected question tokens of each."""
    return random_array(2, PATCHES, WIDTH, seed=seed), random_array(2, TEXT, WIDTH, seed=seed + 100)


@functools.cache
def encoder_fn(config, view="guided"):
    def run(weights, x, text, mask):
        views = {"guided": x} if view == "guided" else {"guided": x, "plain": x[:, ::-1]}
        return VisionEncoder(config).apply({"params": weights["vision"]}, views, text, mask)

    return jax.jit(run)


def encode(config, x, text=None, mask=TEXT_MASK, view="guided"):
    """Taps as (2, P + T, taps, width)."""
    text = None if text is None else jnp.asarray(text)
    taps = encoder_fn(config, view)(params(config), jnp.asarray(x), text, jnp.asarray(mask))[view]
    return np.asarray(taps).reshape(*taps.shape[:2], -1, WIDTH)


@functools.cache
def layer_fn(mask, early):
    layer = EncoderLayer(tiny().vision, mask, early, jnp.float32)
    return jax.jit(lambda weights, x, segments: layer.apply({"params": weights}, x, segments))


def layer_params(config, k):
    assert k < config.encoder_layers
    return jax.tree.map(lambda a: a[k], params(config)["vision"]["layers"]["layer"])


def states(config, x, text, mask=TEXT_MASK):
    """All states from 0 on, one layer after the other."""
    states = [jnp.concatenate([x, text], 1)]
    segments = jnp.asarray(mask, jnp.int32)
    for k in range(config.encoder_layers):
        early = k < config.vision.layers // 2
        states.append(layer_fn(config.mask, early)(layer_params(config, k), states[-1], segments))
    return [np.asarray(s) for s in states]


# Pixels and patches.


def test_pixels_become_minus_one_to_one_and_blank_crops_zero():
    crops = jnp.asarray(np.arange(0, 256, 4, dtype=np.uint8)[: 2 * 2 * 3 * 3].reshape(3, 2, 2, 3))
    out = np.asarray(normalise(crops, jnp.array([False, True, False])))
    np.testing.assert_allclose(out[0], np.asarray(crops[0]) / 127.5 - 1, atol=1e-6)
    assert (out[1] == 0).all() and (out[2] != 0).any()
    ends = normalise(jnp.array([0, 255], jnp.uint8).reshape(1, 1, 2, 1).repeat(3, -1), jnp.array([False]))
    np.testing.assert_array_equal(np.asarray(ends)[0, 0, :, 0], [-1.0, 1.0])


@pytest.mark.parametrize("size", [24, 30])
def test_patches_times_kernel_equal_the_convolution(size):
    patch, width = 8, 5
    pixels, kernel = random_array(2, size, size, 3), random_array(patch, patch, 3, width, seed=1)
    expected = jax.lax.conv_general_dilated(
        pixels, kernel, (patch, patch), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    patches = patchify(jnp.asarray(pixels), patch)
    assert patches.shape == (2, (size // patch) ** 2, patch * patch * 3)
    actual = np.asarray(patches) @ kernel.reshape(-1, width)
    np.testing.assert_allclose(actual, np.asarray(expected).reshape(2, -1, width), atol=1e-4)


@pytest.mark.parametrize(("size", "patch", "grid"), [(24, 8, 3), (30, 8, 3), (32, 8, 4), (384, 14, 27), (384, 16, 24)])
def test_grid_floors(size, patch, grid):
    config = VisionConfig(image_size=size, patch_size=patch)
    assert (config.grid, config.patches) == (grid, grid**2)


def test_state_0_is_patches_plus_positions_and_pixels_beyond_the_last_patch_are_ignored():
    config = tiny(**{"vision.image_size": 30})
    weights = params(config)["vision"]
    rng = np.random.default_rng(0)
    crops = rng.integers(0, 256, (2, 30, 30, 3)).astype(np.uint8)
    run = jax.jit(lambda c, b: VisionEncoder(config).apply({"params": weights}, c, b, method="embed"))
    out = np.asarray(run(crops, np.array([False, True])))
    dense, position = weights["patch_embedding"], np.asarray(weights["position_embedding"])
    tile = (crops[0, 8:16, 16:24] / 127.5 - 1).reshape(-1)  # row 1, column 2: patch 5
    np.testing.assert_allclose(out[0, 5], tile @ dense["kernel"] + dense["bias"] + position[5], atol=1e-5)
    np.testing.assert_allclose(out[1], dense["bias"] + position, atol=1e-6)
    crops[:, 24:] = 0
    crops[:, :, 24:] = 0
    np.testing.assert_array_equal(np.asarray(run(crops, np.array([False, True]))), out)


# One layer.


def plain_layer(weights, x, sees, uniform):
    """One row in float64. sees: (S, S) bool; uniform: (S,) queries whose scores are all equal."""
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), weights)

    def norm(y, p):
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
        return y * p["scale"] + p["bias"]

    def dense(y, p):
        return y @ p["kernel"] + p["bias"]

    x = x.astype(np.float64)
    y, heads = norm(x, w["norm1"]), 2
    q, k, v = (dense(y, w[name]).reshape(len(x), heads, -1) for name in ("query", "key", "value"))
    out = np.zeros_like(q)
    for h in range(heads):
        scores = q[:, h] @ k[:, h].T / math.sqrt(q.shape[-1])
        scores[uniform] = 0
        weight = np.where(sees, np.exp(scores), 0)
        total = weight.sum(-1, keepdims=True)
        out[:, h] = np.divide(weight, total, where=total > 0, out=np.zeros_like(weight)) @ v[:, h]
    x = x + dense(out.reshape(len(x), -1), w["out"])
    y = dense(norm(x, w["norm2"]), w["mlp"]["in"])
    y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    return x + dense(y, w["mlp"]["out"])


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("mask", ["paper", "released", "none"])
def test_layer_equals_numpy_under_its_mask(mask, early):
    config = tiny(mask=mask)
    x, text = embedded()
    both = np.concatenate([x, text], 1)
    out = layer_fn(mask, early)(layer_params(config, 1), both, jnp.asarray(TEXT_MASK, jnp.int32))
    for row in range(2):
        real = np.concatenate([np.ones(PATCHES, bool), TEXT_MASK[row]])
        sees = np.broadcast_to(real, (len(real), len(real))).copy()
        if early and mask == "paper":
            sees[:PATCHES, PATCHES:] = False
        is_text = np.arange(len(real)) >= PATCHES
        expected = plain_layer(layer_params(config, 1), both[row], sees, is_text & (early and mask == "released"))
        np.testing.assert_allclose(np.asarray(out)[row][real], expected[real], atol=2e-5)


# The tower.


def test_image_reads_the_question_only_from_the_late_layers_on():
    x, text = embedded()
    config = tiny(mask="paper")
    before, after = states(config, x, text), states(config, x, -text)
    changed = [np.abs(a[:, :PATCHES] - b[:, :PATCHES]).max() for a, b in zip(before, after)]
    assert changed[:3] == [0, 0, 0] and min(changed[3:]) > 1e-3
    # ... but text reads the image from the first layer on.
    other = states(config, -x, text)
    assert np.abs(before[1][:, PATCHES:] - other[1][:, PATCHES:])[TEXT_MASK].max() > 1e-3
    released = tiny(mask="released")
    before, after = states(released, x, text), states(released, x, -text)
    changed = [np.abs(a[:, :PATCHES] - b[:, :PATCHES]).max() for a, b in zip(before, after)]
    assert changed[0] == 0 and min(changed[1:]) > 1e-3


def test_taps_of_the_whole_tower_follow_the_half_mask():
    x, text = embedded()
    config = tiny(mask="paper")
    a, b = encode(config, x, text), encode(config, x, -text)
    np.testing.assert_array_equal(a[:, :PATCHES, 0], b[:, :PATCHES, 0])  # shallow: states 0 and 1
    assert np.abs(a[:, :PATCHES, 1] - b[:, :PATCHES, 1]).max() > 1e-3  # deep: state 3 has seen the question


@pytest.mark.parametrize("layers", [2, 3, 4, 5])
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_taps_are_means_of_the_states(preset, layers):
    # Five layers: h = 2, so state 4 is in no mean, as state 38 of the published 39, and its layer is not there.
    config = tiny(preset, **{"vision.layers": layers})
    x, text = embedded()
    s, taps = states(config, x, text), encode(config, x, text)
    half = layers // 2
    means = [np.mean(s[:half], 0), np.mean(s[half : 2 * half], 0)]
    expected = means if preset == "paper" else [s[layers], *means]
    real = np.concatenate([np.ones((2, PATCHES), bool), TEXT_MASK], 1)
    assert taps.shape[2] == len(expected) == config.tap_count
    for k, tap in enumerate(expected):
        np.testing.assert_allclose(taps[:, :, k][real], tap[real], atol=1e-5)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_means_of_states_are_rounded_once(preset):
    """Layers that add nothing: every state is the first one, and so are its means, in bfloat16 to the bit."""
    config = tiny(preset, **{"vision.layers": 14})
    weights = jax.tree.map_with_path(
        lambda path, x: 0 * x if any(key.key == "out" for key in path) else x, params(config)["vision"]
    )
    x = jnp.asarray(random_array(2, PATCHES, WIDTH), jnp.bfloat16)
    run = jax.jit(lambda w, x: VisionEncoder(config, jnp.bfloat16).apply({"params": w}, {"guided": x}, None, None))
    taps = run(weights, x)["guided"]
    assert taps.dtype == jnp.bfloat16
    np.testing.assert_array_equal(taps, jnp.concatenate([x] * config.tap_count, -1))


@pytest.mark.parametrize("layers", [4, 5])
def test_layers_behind_the_last_tap_change_nothing(layers):
    whole = tiny("released", taps="released", mask="paper", **{"vision.layers": layers})
    config = dataclasses.replace(whole, taps="paper")
    assert config.encoder_layers == 3
    weights = {"vision": params(whole)["vision"]}
    cut = jax.tree.map(lambda a: a[:3], weights["vision"]["layers"])
    x, text = embedded()

    def means(config, weights, text):
        views = {"guided": jnp.asarray(x), "plain": jnp.asarray(x[:, ::-1])}
        taps = VisionEncoder(config).apply({"params": weights}, views, text, jnp.asarray(TEXT_MASK))
        return jnp.concatenate([tap[:, :, -2 * WIDTH :] for tap in taps.values()], 1)

    def gradients(config, weights):
        run = jax.jit(jax.value_and_grad(lambda w: jnp.mean(means(config, w, jnp.asarray(text)) ** 2)))
        return jax.tree.map(np.asarray, run(weights))

    tower = {**weights["vision"], "layers": cut}
    ours, theirs = (
        jax.jit(means, static_argnums=0)(c, w, text) for c, w in ((config, tower), (whole, weights["vision"]))
    )
    np.testing.assert_array_equal(ours, theirs)
    (loss, here), (expected, there) = gradients(config, tower), gradients(whole, weights["vision"])
    assert loss == expected
    for path, leaf in flat(there["layers"]).items():
        assert not leaf[3:].any(), path
        # The backward pass is another program.
        np.testing.assert_allclose(flat(here["layers"])[path], leaf[:3], rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("mask", ["paper", "released", "none"])
def test_random_layers_do_not_depend_on_how_many_run(mask):
    config = tiny(mask=mask, **{"vision.layers": 5})
    every = dataclasses.replace(config, taps="released")
    ours, theirs = (fusion.init(c, jax.random.key(2))["vision"]["layers"] for c in (config, every))
    for path, leaf in flat(theirs).items():
        np.testing.assert_array_equal(flat(ours)[path], leaf[:3], err_msg=path)


@pytest.mark.parametrize("mask", ["paper", "released", "none"])
def test_padded_question_tokens_have_no_influence(mask):
    config = tiny("released", mask=mask)
    x, text = embedded()
    real = np.concatenate([np.ones((2, PATCHES), bool), TEXT_MASK], 1)
    expected = encode(config, x, text)[real]
    noisy = np.where(TEXT_MASK[..., None], text, 50.0).astype(np.float32)
    np.testing.assert_array_equal(encode(config, x, noisy)[real], expected)
    assert np.abs(encode(config, x, noisy, np.ones_like(TEXT_MASK))[real] - expected).max() > 1e-2
    wider = np.concatenate([text, noisy[:, :2]], 1)
    wider_mask = np.concatenate([TEXT_MASK, np.zeros((2, 2), bool)], 1)
    wider_real = np.concatenate([np.ones((2, PATCHES), bool), wider_mask], 1)
    np.testing.assert_allclose(encode(config, x, wider, wider_mask)[wider_real], expected, atol=1e-5)


@pytest.mark.parametrize("mask", ["paper", "released", "none"])
def test_without_question_the_image_is_encoded_alone(mask):
    config = tiny("released", mask=mask)
    x, text = embedded()
    alone = encode(config, x)
    assert alone.shape[1] == PATCHES
    unread = encode(config, x, text, np.zeros_like(TEXT_MASK))[:, :PATCHES]
    np.testing.assert_allclose(unread, alone, atol=1e-5)
    # A plain view travels with a guided one and does not read the question.
    plain = encode(config, x[:, ::-1], text, view="plain")
    np.testing.assert_allclose(plain, alone, atol=1e-5)


def test_rows_do_not_see_each_other():
    config = tiny()
    x, text = embedded()
    before = encode(config, x, text)[0]
    x[1], text[1] = 9, 9
    np.testing.assert_array_equal(encode(config, x, text)[0], before)
