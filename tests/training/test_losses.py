"""Cross-entropy against a plain log-softmax, the mapping loss against plain cosines; values and gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.fixtures import mixed_batch, random_array, tiny

from fusion_jax.batch import NO_CROP, PIXELS, ZERO_IMAGE
from fusion_jax.models.fusion import Visual
from fusion_jax.training import losses

ROWS, LENGTH, WIDTH, VOCAB, PADDED = 2, 7, 5, 11, 16


def inputs(supervised: int, fractional: bool = False):
    """Weights are 1, or anything above 0, at `supervised` random places."""
    rng = np.random.default_rng(supervised)
    weights = np.zeros(ROWS * LENGTH, np.float32)
    places = rng.permutation(ROWS * LENGTH)[:supervised]
    weights[places] = rng.uniform(0.2, 3, supervised) if fractional else 1
    targets = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    hidden, kernel = random_array(ROWS, LENGTH, WIDTH), random_array(WIDTH, PADDED, seed=1)
    return [jnp.asarray(a) for a in (hidden, kernel, targets, weights.reshape(ROWS, LENGTH))]


def plain(hidden, kernel, targets, weights):
    log_p = jax.nn.log_softmax(hidden @ kernel[:, :VOCAB], axis=-1)
    chosen = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(weights > 0, chosen * weights, 0.0))


def ours(hidden, kernel, targets, weights):
    return losses.cross_entropy_sum(hidden, kernel, targets, weights, VOCAB)


def both(arguments):
    # Traced anew each time: CHUNK is read while tracing.
    run = [jax.jit(jax.value_and_grad(lambda *a, f=f: f(*a), argnums=(0, 1))) for f in (ours, plain)]
    (value, grads), (expected, expected_grads) = (f(*arguments) for f in run)
    return value, grads, expected, expected_grads


@pytest.mark.parametrize("chunk", [1, 3, 4, 512])
@pytest.mark.parametrize("supervised", [0, 1, 4, 14])
def test_cross_entropy_equals_log_softmax(monkeypatch, supervised, chunk):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    value, grads, expected, expected_grads = both(inputs(supervised))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for g, e in zip(grads, expected_grads):
        np.testing.assert_allclose(g, e, atol=2e-5)
    if supervised == 0:
        assert float(value) == 0 and all((np.asarray(g) == 0).all() for g in grads)
    else:
        assert float(value) > 0.1 and all(np.abs(g).max() > 0.01 for g in grads)


@pytest.mark.parametrize("chunk", [4, 512])
def test_weights_count(monkeypatch, chunk):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    value, grads, expected, expected_grads = both(inputs(9, fractional=True))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for g, e in zip(grads, expected_grads):
        np.testing.assert_allclose(g, e, atol=2e-5)


def test_gradient_scales_with_what_comes_from_above():
    arguments = inputs(6)
    run = jax.jit(jax.grad(lambda scale, *a: scale * ours(*a), argnums=(1, 2)))
    for one, two in zip(run(1.0, *arguments), run(-2.5, *arguments)):
        np.testing.assert_allclose(-2.5 * np.asarray(one), two, rtol=1e-5, atol=1e-6)


def test_padded_columns_have_no_influence_and_no_gradient():
    hidden, kernel, targets, weights = inputs(8)
    huge = kernel.at[:, VOCAB:].set(100.0)
    run = jax.jit(jax.value_and_grad(ours, argnums=1))
    (value, _), (after, grad) = run(hidden, kernel, targets, weights), run(hidden, huge, targets, weights)
    assert float(value) == float(after)
    assert (np.asarray(grad)[:, VOCAB:] == 0).all() and np.isfinite(np.asarray(grad)).all()


def test_unsupervised_positions_have_no_influence_and_no_gradient():
    hidden, kernel, targets, weights = inputs(5)
    other = jnp.where(weights[..., None] > 0, hidden, 30.0)
    moved = jnp.where(weights > 0, targets, 3)
    run = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))
    value, (d_hidden, d_kernel) = run(hidden, kernel, targets, weights)
    after, (d_hidden_after, d_kernel_after) = run(other, kernel, moved, weights)
    assert float(value) == float(after)
    np.testing.assert_array_equal(d_hidden, d_hidden_after)
    np.testing.assert_array_equal(d_kernel, d_kernel_after)
    assert (np.asarray(d_hidden)[np.asarray(weights) == 0] == 0).all()


def test_nothing_gathers_from_logits_or_scatters_into_them():
    """Each would be one more pass over (chunk, V) float32 in HBM."""
    text = jax.jit(jax.grad(ours)).lower(*inputs(5)).as_text()
    logits = rf"tensor<{ROWS * LENGTH}x{PADDED}xf32>"
    assert re.search(rf"stablehlo.dot_general.*{logits}", text)
    assert not re.search(rf'(stablehlo.gather"|\}}\)).* : \({logits}', text)


def test_bfloat16_head_gives_a_float32_loss_near_the_exact_one():
    hidden, kernel, targets, weights = inputs(10)
    half = (hidden.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), targets, weights)
    value, (d_hidden, d_kernel) = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(*half)
    assert (value.dtype, d_hidden.dtype, d_kernel.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(value, plain(hidden, kernel, targets, weights), rtol=0.02)


# Mapping loss: two rows with two crops each, of which one does not exist and one is the zero image.

KIND = np.array([[PIXELS, NO_CROP], [ZERO_IMAGE, PIXELS]], np.int32)
TEXT_MASK = np.array([[[1, 1, 0], [1, 1, 1]], [[0, 0, 0], [1, 0, 0]]], bool)
QUESTION, QUESTION_FEATURES = random_array(2, 2, 3, 6), random_array(2, 2, 3, 6, seed=1)
PATCHES, PATCH_FEATURES = random_array(2, 2, 4, 5, seed=2), random_array(2, 2, 4, 5, seed=3)


def visual(question=QUESTION, question_features=QUESTION_FEATURES, patches=PATCHES, patch_features=PATCH_FEATURES):
    fields = (question, question_features, patches, patch_features)
    image = jnp.zeros((2, 2 * 4, 6))
    return Visual(image, None, None, *(None if a is None else jnp.asarray(a) for a in fields))


def mapping(text_mask=TEXT_MASK, **fields):
    return losses.mapping_loss_sums(visual(**fields), jnp.asarray(KIND), jnp.asarray(text_mask))


def distance(a, b):
    return 1 - np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)


def test_mapping_loss_equals_cosines_over_what_exists():
    v2t, t2v = mapping()
    tokens = [(0, 0, 0), (0, 0, 1), (1, 1, 0)]
    np.testing.assert_allclose(v2t, sum(distance(QUESTION[i], QUESTION_FEATURES[i]) for i in tokens), rtol=1e-5)
    places = [(b, n, p) for b, n in ((0, 0), (1, 0), (1, 1)) for p in range(4)]
    np.testing.assert_allclose(t2v, sum(distance(PATCHES[i], PATCH_FEATURES[i]) for i in places), rtol=1e-5)


def test_mapping_loss_without_a_side_is_zero():
    v2t, t2v = mapping(question=None, question_features=None)
    assert float(v2t) == 0 and float(t2v) > 1
    v2t, t2v = mapping(patches=None, patch_features=None)
    assert float(v2t) > 1 and float(t2v) == 0
    assert float(mapping(text_mask=np.zeros_like(TEXT_MASK))[0]) == 0


def test_both_sides_of_the_mapping_loss_carry_gradient_where_they_count():
    def total(*arrays):
        return sum(losses.mapping_loss_sums(visual(*arrays), jnp.asarray(KIND), jnp.asarray(TEXT_MASK)))

    arrays = [jnp.asarray(a) for a in (QUESTION, QUESTION_FEATURES, PATCHES, PATCH_FEATURES)]
    grads = [np.asarray(g) for g in jax.grad(total, argnums=(0, 1, 2, 3))(*arrays)]
    exists = KIND != NO_CROP
    for g in grads[:2]:
        counted = TEXT_MASK & exists[..., None]
        assert (g[~counted] == 0).all() and (np.abs(g[counted]).max(-1) > 1e-3).all()
    for g in grads[2:]:
        assert (g[~exists] == 0).all() and (np.abs(g[exists]).max(-1) > 1e-3).all()
    # A cosine does not change along its own vector.
    np.testing.assert_allclose((grads[0] * QUESTION).sum(-1), 0, atol=1e-5)


def test_zero_vectors_give_finite_gradients():
    zero = np.zeros_like(PATCHES)
    for a, b in ((zero, PATCH_FEATURES), (PATCHES, zero), (zero, zero)):
        value, grads = jax.value_and_grad(lambda a, b: mapping(patches=a, patch_features=b)[1], argnums=(0, 1))(
            jnp.asarray(a), jnp.asarray(b)
        )
        np.testing.assert_allclose(value, 12, rtol=1e-6)  # cosine 0 at 3 x 4 patches
        assert all(np.isfinite(np.asarray(g)).all() for g in grads)


def test_counts_are_those_of_the_sums():
    batch = mixed_batch(tiny())
    divisors = losses.counts(tiny(), jax.tree.map(jnp.asarray, batch))
    # Answers of 5, 2 x 3, 2 and 1 tokens; questions of 6, 5 and 6 tokens beside three images, none beside the text.
    assert {name: float(n) for name, n in divisors.items()} == {"ce": 14, "v2t": 17, "t2v": 27}
