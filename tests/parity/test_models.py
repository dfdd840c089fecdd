"""The model against tensors of the published PyTorch system: every case, both masks, float32 on CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers.goldens import CASES, MASKS, layout_spec, load, needs_goldens

from fusion_jax.batch import windows
from fusion_jax.data.layout import Example, lay_out
from fusion_jax.inference import generate
from fusion_jax.interop import table
from fusion_jax.models import llm
from fusion_jax.models.layers import example_lengths, rotary
from fusion_jax.training.step import losses_of

pytestmark = [pytest.mark.slow, needs_goldens]


@functools.cache
def run(case, file):
    """One compiled program a case: forward, losses and gradients by published name."""
    g = load(case, file)

    def forward(params):
        variables = {"params": params}
        hidden, visual, _ = g.model.apply(variables, g.batch)
        embeds = g.model.apply(variables, g.batch, visual, method="assemble")
        logits = g.model.apply(variables, hidden, method="logits")
        total, parts = losses_of(g.model, params, g.batch, hidden, visual)
        return total, (parts, hidden, visual, embeds, logits)

    # With the whole image in every crop, unlike other tests, running takes longer than compiling.
    step = jax.jit(jax.value_and_grad(forward, has_aux=True), compiler_options={"xla_backend_optimization_level": 1})
    (total, (parts, *states)), grads = step(g.params)
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(grads, sep="/").items()}
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    rows = table.published_rows(g.config, shapes, "phi" in case)
    named = {
        row.name: table.to_published(row, lambda p, i: flat[p] if i is None else flat[p][i], g.config) for row in rows
    }
    return states, {"loss": total, **parts}, named


both = pytest.mark.parametrize("file", MASKS)
each = pytest.mark.parametrize("case", CASES)


def assert_close(actual, expected, atol, where=None):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    if where is not None:
        actual, expected = actual[where], expected[where]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@each
@both
def test_layout_equals_published_positions(case, file):
    g = load(case, file)
    real = g.io["out_attention_mask"].astype(bool)
    np.testing.assert_array_equal(g.batch.segment_ids > 0, real)
    np.testing.assert_array_equal(g.batch.round_end, g.io["out_instruct_pos"])
    places = g.batch.latent_start[..., None] + np.arange(g.batch.latent_count)
    places = np.where(g.batch.latent_start[..., None] >= 0, places, -1).reshape(len(places), -1)
    # The published list puts the latents of a row in front and fills up with -1 behind.
    np.testing.assert_array_equal(places, g.io["out_vision_pos"])
    labels = g.io["out_labels"]
    supervised = np.zeros_like(real)
    supervised[:, :-1] = labels[:, 1:] >= 0
    np.testing.assert_array_equal(g.batch.loss_weights > 0, supervised)
    np.testing.assert_array_equal(g.batch.targets[:, :-1][supervised[:, :-1]], labels[:, 1:][supervised[:, :-1]])


@each
@both
def test_encoder_and_projectors(case, file):
    g, (_, visual, _, _) = load(case, file), run(case, file)[0]
    assert_close(visual.patches[:, 0], g.io["out_vision_embeddings"], 1e-4)
    assert_close(visual.patch_features[:, 0], g.io["out_vision_features"], 1e-4)
    mask = g.io["out_instruct_mask"].astype(bool)
    assert_close(visual.question[:, 0], g.io["out_instruct_embeddings"], 1e-4, mask)
    assert_close(visual.question_features[:, 0], g.io["out_instruct_features"], 1e-4, mask)
    assert_close(visual.context, g.io["out_global_ctx"], 1e-4)


@each
@both
def test_hidden_states_and_logits(case, file):
    g, (hidden, _, embeds, logits) = load(case, file), run(case, file)[0]
    real = g.io["out_attention_mask"].astype(bool)
    assert_close(embeds, g.io["out_inputs_embeds"], 1e-4, real)
    assert_close(hidden, g.io["out_hidden_final"], 1e-4, real)
    assert_close(logits, g.io["out_logits"], 2e-4, real)


@each
@both
def test_first_block(case, file):
    g, (_, visual, embeds, _) = load(case, file), run(case, file)[0]
    exchange = g.config.exchange.start == 0
    segments, positions = jnp.asarray(g.batch.segment_ids), jnp.asarray(g.batch.positions)
    lengths = example_lengths(segments, positions)
    cos, sin = rotary(g.config.llm.rope, g.config.llm.per_head, positions, lengths)
    plan = g.model.apply({"params": g.params}, g.batch, visual, method="exchange_plan")
    shared = llm._Shared(cos, sin, segments, None, None, plan)
    first = jax.tree.map(lambda a: a[0], g.params["llm"]["stack_0"])
    block = llm.Superblock(g.config, 1, exchange, jnp.float32)
    (x, _, _), _ = block.apply({"params": first}, (embeds, None, jnp.int32(0)), shared)
    assert_close(x, g.io["out_hidden_after_first_block"], 1e-4, g.io["out_attention_mask"].astype(bool))


@each
@both
def test_losses(case, file):
    g, losses = load(case, file), run(case, file)[1]
    for name, golden in (("loss", "out_loss"), ("ce", "out_ce"), ("v2t", "out_l_v2t"), ("t2v", "out_l_t2v")):
        assert abs(float(losses[name]) - float(g.io[golden])) <= 1e-5, name


@each
@both
def test_gradient_of_every_parameter(case, file):
    g, named = load(case, file), run(case, file)[2]
    published_norms = dict(zip(g.io["grad_norm_names"].tolist(), g.io["grad_norms"].tolist()))
    assert set(published_norms) == set(named)
    for name, expected in published_norms.items():
        actual = float(np.linalg.norm(named[name].astype(np.float64)))
        assert abs(actual - expected) <= max(1e-3 * expected, 1e-6), f"{name}: {actual} instead of {expected}"
    given = [key for key in g.io if key.startswith("grad::")]
    assert given
    for key in given:
        expected = g.io[key]
        # A key bias has no gradient in exact arithmetic: what is there is rounding, below 1e-8.
        atol = max(1e-3 * float(np.abs(expected).max()), 1e-8)
        np.testing.assert_allclose(named[key.removeprefix("grad::")], expected, rtol=0, atol=atol, err_msg=key)


@each
@both
def test_greedy_generation(case, file):
    g = load(case, file)
    prompt = g.io["gen_prompt"][0].astype(np.int32)
    row = 0
    crops = g.io["images_uint8_48"][row].repeat(8, axis=2).repeat(8, axis=3).transpose(0, 2, 3, 1)
    example = Example(prompt, None, g.io["instructs"][row].astype(np.int32), crops)
    length = len(prompt) - 2 + g.config.tokens_per_image + g.config.latent_counts[0]
    spec = layout_spec(g.config, length, g.io["instructs"].shape[1], 1)
    batch = lay_out([example], spec, g.config.latent_counts[0])
    result = generate.greedy(g.model, g.params, batch, steps=12, stop_ids=(), keep_logits=True)
    np.testing.assert_array_equal(result.tokens, g.io["gen_tokens"])
    assert_close(result.logits, g.io["gen_logits"], 2e-4)


def test_windows_cover_the_grid_like_adaptive_pooling():
    index, valid = windows(7, 3)
    assert index.shape == (9, 9)
    rows = {tuple(sorted({int(i) // 7 for i in index[w][valid[w]]})) for w in (0, 3, 6)}
    assert rows == {(0, 1, 2), (2, 3, 4), (4, 5, 6)}
