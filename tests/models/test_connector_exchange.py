"""Pooling, windows, stitching and resizing against loops; the exchange layer against its equations in numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.fixtures import image_windows, random_array, randomise

from fusion_jax.batch import windows
from fusion_jax.models import connector
from fusion_jax.models.exchange import ExchangePlan, SemanticExchange


def cell(i, size, cells):
    return slice(math.floor(i * size / cells), math.ceil((i + 1) * size / cells))


# (6, 2) and (6, 6) divide; the others overlap.
GRIDS = [(6, 2), (6, 6), (7, 3), (5, 4), (3, 2), (27, 4)]


@pytest.mark.parametrize(("size", "cells"), GRIDS)
def test_adaptive_max_pool_equals_loops(size, cells):
    grid = random_array(2, size, size, 3)
    expected = np.empty((2, cells, cells, 3), np.float32)
    for i in range(cells):
        for j in range(cells):
            expected[:, i, j] = grid[:, cell(i, size, cells), cell(j, size, cells)].max((1, 2))
    np.testing.assert_array_equal(connector.adaptive_max_pool(jnp.asarray(grid), cells), expected)


def test_adaptive_max_pool_of_negative_values_and_unequal_sides():
    grid = -1 - np.abs(random_array(1, 7, 5, 2))
    out = np.asarray(connector.adaptive_max_pool(jnp.asarray(grid), 3))
    assert (out < 0).all()
    np.testing.assert_array_equal(out[0, 2, 0], grid[0, 4:7, 0:2].max((0, 1)))


@pytest.mark.parametrize(("size", "cells"), GRIDS)
def test_windows_hold_the_tokens_of_their_cell(size, cells):
    index, valid = windows(size, cells)
    assert index.shape == valid.shape and len(index) == cells**2
    numbers = np.arange(size**2).reshape(size, size)
    for w in range(cells**2):
        expected = numbers[cell(w // cells, size, cells), cell(w % cells, size, cells)].ravel()
        np.testing.assert_array_equal(np.sort(index[w][valid[w]]), expected)
    assert ((index >= 0) & (index < size**2)).all()


def test_pooling_a_pooled_grid_again_is_exact():
    # Latents start as an l x l pool of the context, itself a 3l x 3l pool.
    grid = jnp.asarray(random_array(1, 8, 8, 2))
    for cells in (2, 4):
        once = connector.adaptive_max_pool(grid, cells)
        twice = connector.adaptive_max_pool(connector.adaptive_max_pool(grid, 3 * cells), cells)
        np.testing.assert_array_equal(once, twice)


def test_quadrants_are_stitched_top_left_top_right_bottom_left_bottom_right():
    whole = np.arange(2 * 6 * 6 * 2, dtype=np.float32).reshape(2, 6, 6, 2)
    quadrants = [whole[:, r : r + 3, c : c + 3].reshape(2, 9, 2) for r, c in ((0, 0), (0, 3), (3, 0), (3, 3))]
    np.testing.assert_array_equal(connector.stitch_quadrants(jnp.asarray(np.stack(quadrants, 1))), whole)


@pytest.mark.parametrize(("side", "out"), [(4, 3), (3, 5), (6, 4), (4, 4), (24, 16)])
def test_resize_equals_bilinear_loops(side, out):
    grid = random_array(2, side, side, 3)

    def along(value):  # two neighbours and the weight of the second: half-pixel centres, edges clamped
        centre = min(max((value + 0.5) * side / out - 0.5, 0), side - 1)
        low = math.floor(centre)
        return low, min(low + 1, side - 1), centre - low

    expected = np.empty((2, out, out, 3))
    for i in range(out):
        top, bottom, y = along(i)
        for j in range(out):
            left, right, x = along(j)
            upper = (1 - x) * grid[:, top, left] + x * grid[:, top, right]
            lower = (1 - x) * grid[:, bottom, left] + x * grid[:, bottom, right]
            expected[:, i, j] = (1 - y) * upper + y * lower
    resized = connector.resize_tokens(jnp.asarray(grid.reshape(2, -1, 3)), out**2)
    np.testing.assert_allclose(np.asarray(resized).reshape(2, out, out, 3), expected, atol=1e-5)


# Exchange: two rows, two images each, three rounds, l^2 = 9 latents. Windows over 5 x 5 tokens are 2 or 3 wide, so that
# the mask of the narrow ones matters.

BATCH, IMAGES, ROUNDS, LATENTS, SIDE, WIDTH, HEADS, LENGTH = 2, 2, 3, 9, 5, 16, 4, 36
WINDOWS = windows(SIDE, 3)
ROUND_IMAGE = np.array([[0, 1, 0], [1, -1, -1]], np.int32)
LATENT_START = np.array([[2, 13, 24], [5, -1, -1]], np.int32)
# The second round's question ends on a latent of the first: an update seen too early would show.
ROUND_END = np.array([[11, 4, 34], [20, -1, -1]], np.int32)
STATE = random_array(BATCH, LENGTH, WIDTH)
CONTEXT = random_array(BATCH, IMAGES, SIDE**2, WIDTH, seed=1)


@functools.cache
def weights():
    shapes = jax.eval_shape(lambda: SemanticExchange(HEADS).init(jax.random.key(0), jnp.asarray(STATE), plan()))
    return randomise(jax.tree.map(lambda a: a.value, shapes["params"], is_leaf=lambda a: hasattr(a, "value")))


def plan(round_image=ROUND_IMAGE, round_end=ROUND_END, latent_start=LATENT_START, context=CONTEXT):
    windows = image_windows(round_image, SIDE, 3)
    context = context.reshape(BATCH, -1, WIDTH)
    return ExchangePlan(*map(jnp.asarray, (context, windows, round_image, round_end, latent_start)), side=SIDE)


@functools.cache
def exchange_fn():
    return jax.jit(lambda w, x, p: SemanticExchange(HEADS).apply({"params": w}, x, p))


def exchange(x=STATE, **changes):
    return np.asarray(exchange_fn()(weights(), jnp.asarray(x), plan(**changes)))


def equations(x):
    """The layer's equations, one latent at a time, in float64."""
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), weights())
    x, out, per_head = x.astype(np.float64), x.astype(np.float64).copy(), WIDTH // HEADS

    def norm(y, p):
        return (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    for b in range(BATCH):
        for r in range(ROUNDS):
            if LATENT_START[b, r] < 0:
                continue
            for n in range(LATENTS):
                place = LATENT_START[b, r] + n
                p = np.concatenate([x[b, ROUND_END[b, r]], x[b, place]]) @ w["in"]
                window = CONTEXT[b, ROUND_IMAGE[b, r], WINDOWS[0][n][WINDOWS[1][n]]].astype(np.float64)
                c = window @ w["context"]["kernel"]
                q = norm(p, w["query_norm"]) @ w["query"]["kernel"]
                k = norm(c, w["key_norm"]) @ w["key"]["kernel"]
                v = norm(c, w["value_norm"]) @ w["value"]["kernel"]
                heads = []
                for h in range(HEADS):
                    part = slice(h * per_head, (h + 1) * per_head)
                    weight = np.exp(k[:, part] @ q[part] / math.sqrt(per_head))
                    heads.append(weight / weight.sum() @ v[:, part])
                y = norm(np.concatenate(heads) @ w["out"]["kernel"] + p, w["norm"])
                y = y @ w["mlp"]["in"]["kernel"]
                y = np.array([0.5 * a * (1 + math.erf(a / math.sqrt(2))) for a in y])
                out[b, place] = x[b, place] + y @ w["mlp"]["out"]["kernel"]
    return out


def is_latent():
    places = np.zeros((BATCH, LENGTH), bool)
    for b, r in zip(*np.nonzero(LATENT_START >= 0)):
        places[b, LATENT_START[b, r] + np.arange(LATENTS)] = True
    return places


def test_exchange_equals_its_equations():
    out = exchange()
    assert np.abs(out - STATE)[is_latent()].max() > 0.1
    np.testing.assert_allclose(out, equations(STATE), atol=2e-5)


def test_only_latents_of_present_rounds_change():
    out = exchange()
    np.testing.assert_array_equal(out[~is_latent()], STATE[~is_latent()])
    nothing = exchange(latent_start=np.full_like(LATENT_START, -1))
    np.testing.assert_array_equal(nothing, STATE)


def test_rounds_do_not_see_each_others_update():
    first, second = np.arange(2, 11), np.arange(13, 22)
    out = exchange()
    for absent, kept in ((0, second), (1, first)):
        start = LATENT_START.copy()
        start[0, absent] = -1
        np.testing.assert_array_equal(exchange(latent_start=start)[0, kept], out[0, kept])


def test_a_latent_reads_its_round_its_question_and_its_image_only():
    out = exchange()
    x = STATE.copy()
    x[0, 34] += random_array(WIDTH, seed=3)  # where the third round's question ends
    moved = np.abs(exchange(x) - out)[0].max(-1) > 1e-4
    np.testing.assert_array_equal(np.flatnonzero(moved), [*range(24, 33), 34])
    context = CONTEXT.copy()
    context[0, 1] *= -1
    moved = np.abs(exchange(context=context) - out).max(-1) > 1e-4
    np.testing.assert_array_equal(np.argwhere(moved), [[0, p] for p in range(13, 22)])
    context = CONTEXT.copy()
    context[1, 1, 0] *= -1  # the corner is in the first window alone
    moved = np.abs(exchange(context=context) - out).max(-1) > 1e-4
    np.testing.assert_array_equal(np.argwhere(moved), [[1, 5]])


def test_crops_fetched_whole_give_what_single_tokens_give():
    """Where l divides the grid: results and gradients, the windows' indices being left unread."""
    context = random_array(BATCH, IMAGES * 36, WIDTH, seed=4)
    cotangent = random_array(BATCH, LENGTH, WIDTH, seed=5)

    @functools.partial(jax.jit, static_argnums=3)
    def run(weights, x, context, side):
        windows = image_windows(ROUND_IMAGE, 6, 3) if side is None else np.full((BATCH, ROUNDS, LATENTS, 4), -1)
        rounds = map(jnp.asarray, (windows, ROUND_IMAGE, ROUND_END, LATENT_START))
        layer = SemanticExchange(HEADS)
        out, pull = jax.vjp(
            lambda w, x, c: layer.apply({"params": w}, x, ExchangePlan(c, *rounds, side)), weights, x, context
        )
        return out, pull(cotangent)

    single, whole = (run(weights(), jnp.asarray(STATE), jnp.asarray(context), side) for side in (None, 6))
    assert np.abs(single[0] - STATE)[is_latent()].max() > 0.1 and np.abs(single[1][2]).max() > 0.1
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), whole, single)


def test_layers_have_no_biases_but_those_of_norms():
    names = set(weights())
    assert names == {
        "in",
        "context",
        "key",
        "value",
        "query",
        "out",
        "mlp",
        "norm",
        "key_norm",
        "value_norm",
        "query_norm",
    }
    for name in ("context", "key", "value", "query", "out"):
        assert set(weights()[name]) == {"kernel"}
    assert sum(a.size for a in jax.tree.leaves(weights())) == 9 * WIDTH**2 + 4 * 2 * WIDTH
