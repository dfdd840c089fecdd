"""The whole model: presets, ablations, published shapes, bfloat16, rematerialisation, rows that do not mix."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers.fixtures import (
    assert_trees_close,
    example,
    flat,
    forward_fn,
    grad_fn,
    lay,
    mixed_batch,
    params,
    random_array,
    shapes,
    tiny,
)

from fusion_jax.models import fusion
from fusion_jax.models.config import VARIANTS
from fusion_jax.models.vision import VisionEncoder

PRESETS = ("paper", "released")


@functools.cache
def gradient(config, dtype=jnp.float32, remat="none"):
    """(loss, parts), gradients by path, on the mixed batch."""
    return grad_fn(config, dtype, remat)(params(config), mixed_batch(config))


def assert_trains(config):
    """Finite gradients, and a small step along them lowers the loss."""
    (loss, _), grads = gradient(config)
    square = sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(grads))
    assert np.isfinite(square) and square > 0
    rate = 1e-3 / square
    moved = jax.tree.map(lambda p, g: p - rate * g, params(config), grads)
    (after, _), _ = grad_fn(config)(moved, mixed_batch(config))
    np.testing.assert_allclose(float(loss - after), 1e-3, rtol=0.05)


# Presets.


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_trains(preset):
    config = tiny(preset)
    (loss, parts), grads = gradient(config)
    assert loss.dtype == jnp.float32 and np.isfinite(float(loss))
    np.testing.assert_allclose(loss, parts["ce"] + 0.1 * (parts["v2t"] + parts["t2v"]), rtol=1e-6)
    assert all(float(part) > 0.1 for part in parts.values())
    for path, g in flat(grads).items():
        assert np.isfinite(g).all(), path
        # Only a bias of keys moves all scores of a query alike and cannot matter.
        assert (np.abs(g).max() > 1e-6) == (not path.endswith(("key/bias", "key_norm/bias"))), path
    assert_trains(config)


def test_presets_differ_where_they_should():
    paper, released = (set(flatten_dict(shapes(tiny(preset)), sep="/")) for preset in PRESETS)
    assert paper - released == {"latents_4"} and released < paper
    assert shapes(tiny("paper"))["vision_to_text"]["in"]["kernel"].shape == (2 * 16, 16)
    assert shapes(tiny("released"))["vision_to_text"]["in"]["kernel"].shape == (3 * 16, 16)


def test_init_is_finite_and_random():
    config = tiny()
    first = jax.jit(functools.partial(fusion.init, config))(jax.random.key(1))
    for path, leaf in flat(first).items():
        assert leaf.dtype == np.float32 and np.isfinite(leaf).all()
        spread = float(leaf.std())
        name = path.split("/")[-1]
        assert (spread == 0) == (name in ("bias", "scale")), path
        if name == "scale":
            assert (leaf == 1).all()
    layers = first["vision"]["layers"]["layer"]["query"]["kernel"]
    assert (layers[0] != layers[1]).any()


def visual_of(config):
    """Shapes of what the encoder hands over; nothing is run."""
    model = fusion.Fusion(config)
    run = jax.eval_shape(lambda p, b: vars(model.apply({"params": p}, b)[1]), params(config), mixed_batch(config))
    return types.SimpleNamespace(**run)


# Ablations: A text guidance, B mapping loss, C semantic exchange.


def test_a_off():
    config = tiny(text_guided=False)
    batch = mixed_batch(config)
    assert batch.crop_text.shape[-1] == 0
    (_, parts), _ = gradient(config)
    assert float(parts["v2t"]) == 0 and float(parts["t2v"]) > 0.1
    visual = visual_of(config)
    assert visual.question is None and visual.question_features is None
    assert "text_to_vision" in shapes(config)  # the mapping loss still projects back
    assert_trains(config)


def test_b_off():
    config = tiny(mapping_loss_weight=0.0)
    (loss, parts), _ = gradient(config)
    assert float(parts["v2t"]) == float(parts["t2v"]) == 0 and float(loss) == float(parts["ce"])
    visual = visual_of(config)
    assert visual.patches is None and visual.patch_features is None
    assert "text_to_vision" in shapes(config)  # text still enters the encoder through it
    assert "text_to_vision" not in shapes(tiny(mapping_loss_weight=0.0, text_guided=False))
    assert_trains(config)


@pytest.mark.parametrize("preset", PRESETS)
def test_c_off(preset):
    config = tiny(preset, semantic_exchange=False)
    paths = flatten_dict(shapes(config), sep="/")
    assert not any("exchange" in path or "latents" in path for path in paths)
    batch = mixed_batch(config)
    assert batch.latent_count == 0 and batch.round_end.shape[1] == 0 and batch.quadrants.shape[2] == 0
    assert batch.visual_index.max() == config.vision.patches - 1
    visual = visual_of(config)
    assert visual.context is None and visual.latents is None
    if preset == "paper":
        assert_trains(config)


def test_latents_without_exchange_layers():
    config = tiny(**{"exchange.layers": 0})
    paths = flatten_dict(shapes(config), sep="/")
    assert "latents_4" in paths and not any("exchange" in path for path in paths)
    _, grads = gradient(config)
    assert float(jnp.abs(grads["latents_4"]).max()) > 1e-6
    assert_trains(config)


def test_everything_off_is_a_plain_vision_language_model():
    config = tiny(text_guided=False, mapping_loss_weight=0.0, semantic_exchange=False)
    assert set(shapes(config)) == {"vision", "vision_to_text", "llm"}
    visual = visual_of(config)
    assert visual.patches is None and visual.latents is None and visual.question is None


def test_resized_image_tokens():
    config = tiny(image_tokens=4)
    batch = mixed_batch(config)
    hidden, visual = forward_fn(config)(params(config), batch)
    assert visual.image_tokens.shape == (4, 4, 16) and visual.context.shape == (4, 4, 16)
    assert visual.patches.shape == (4, 1, 9, 16)  # the mapping loss keeps all patches
    assert batch.visual_index.max() == 4 + 2 * 4 - 1 and np.isfinite(np.asarray(hidden)).all()


# Published shapes; nothing is allocated.


GIANT = {"layers": 39, "width": 1536, "mlp": 6144, "patches": 24 * 24, "heads": 16, "patch": 16}
SO400M = {"layers": 26, "width": 1152, "mlp": 4304, "patches": 27 * 27, "heads": 16, "patch": 14}
PHI = {"layers": 32, "width": 3072, "mlp": 8192, "heads": 32, "kv": 32, "vocab": 32013, "exchange": 0.85e9}
LLAMA = {"layers": 32, "width": 4096, "mlp": 14336, "heads": 32, "kv": 8, "vocab": 128258, "exchange": 1.5e9}
PUBLISHED = [
    (name, size, tower, llm, visual)
    for name, tower, visual in (
        ("flare_l", GIANT, 630),
        ("flare_x", GIANT, 630),  # of its whole view
        ("fusion", SO400M, 780),
        ("fusion_x", GIANT, 620),
        ("fusion_l", GIANT, 308),
    )
    for size, llm in (("3b", PHI), ("8b", LLAMA))
]


def test_every_variant_is_checked():
    assert {(name, size) for name, sizes in VARIANTS.items() for size in sizes} == {p[:2] for p in PUBLISHED}


@pytest.mark.parametrize(("name", "size", "tower", "llm", "visual"), PUBLISHED)
def test_variant_has_the_published_shapes(name, size, tower, llm, visual):
    config = VARIANTS[name][size]
    assert (config.vision.heads, config.llm.heads, config.llm.kv_heads) == (tower["heads"], llm["heads"], llm["kv"])
    assert config.llm.vocab_size == llm["vocab"] and config.exchange.heads == 16
    assert abs(config.tokens_per_image + np.mean(config.latent_counts) - visual) / visual < 0.02
    by_path = {path: leaf.shape for path, leaf in flatten_dict(shapes(config), sep="/").items()}

    v, dv, d = "vision/layers/layer/", tower["width"], llm["width"]
    assert by_path["vision/patch_embedding/kernel"] == (tower["patch"] ** 2 * 3, dv)
    assert by_path["vision/position_embedding"] == (tower["patches"], dv)
    # 39 published layers: the taps of `paper` read states 0 to 37, the output of the 37th layer.
    run = tower["layers"] - 2 if name.startswith("flare") else tower["layers"]
    assert config.vision.layers == tower["layers"] and config.encoder_layers == run
    assert by_path[v + "query/kernel"] == (run, dv, dv)
    assert by_path[v + "mlp/in/kernel"] == (run, dv, tower["mlp"])
    assert by_path["vision_to_text/in/kernel"] == ((2 if name.startswith("flare") else 3) * dv, d)
    assert by_path["vision_to_text/out/kernel"] == (d, d)
    assert by_path["text_to_vision/in/kernel"] == (d, dv) and by_path["text_to_vision/out/kernel"] == (dv, dv)

    def layers(suffix):
        return [shape for path, shape in by_path.items() if path.startswith("llm/stack") and path.endswith(suffix)]

    per_head = d // llm["heads"]
    for suffix, shape in (
        ("query/kernel", (d, d)),
        ("key/kernel", (d, llm["kv"] * per_head)),
        ("gate/kernel", (d, llm["mlp"])),
        ("down/kernel", (llm["mlp"], d)),
    ):
        stacks = [s for s in layers(suffix) if s[1:] == shape]
        # Exchange layers have a query and a key of their own, D x D.
        extra = 10 if suffix in ("query/kernel", "key/kernel") else 0
        own = [s for p, s in by_path.items() if p.startswith("llm/stack") and p.endswith("exchange/" + suffix)]
        assert sum(s[0] for s in own) == extra
        assert sum(s[0] for s in stacks) - (extra if shape == (d, d) else 0) == llm["layers"], suffix
    assert by_path["llm/head"][0] == d and by_path["llm/embedding"][1] == d
    assert llm["vocab"] <= by_path["llm/embedding"][0] == by_path["llm/head"][1] < llm["vocab"] + 128
    exchange = sum(np.prod(shape, dtype=np.int64) for path, shape in by_path.items() if "/exchange/" in path)
    assert abs(exchange - llm["exchange"]) / llm["exchange"] < 0.02
    tables = {path: shape for path, shape in by_path.items() if path.startswith("latents_")}
    assert tables == ({f"latents_{n}": (n, d) for n in (4, 16, 36, 64, 144)} if name.startswith("flare") else {})


# Numerics.


def test_bfloat16_compute_keeps_float32_weights_and_losses():
    config = tiny()
    (loss, parts), grads = gradient(config, jnp.bfloat16)
    (expected, expected_parts), expected_grads = gradient(config)
    assert {a.dtype for a in (loss, *parts.values())} == {jnp.dtype("float32")}
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(loss, expected, rtol=0.02)
    for name, part in parts.items():
        np.testing.assert_allclose(part, expected_parts[name], rtol=0.05)
    a, b = (np.concatenate([g.ravel() for g in flat(tree).values()]) for tree in (grads, expected_grads))
    assert np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) > 0.98
    model = fusion.Fusion(config, jnp.bfloat16)
    out = jax.eval_shape(
        lambda p, x: model.apply({"params": p}, x, method="logits"), params(config), random_array(2, 16)
    )
    assert out.dtype == jnp.float32
    hidden = jax.eval_shape(lambda p, b: model.apply({"params": p}, b)[0], params(config), mixed_batch(config))
    assert hidden.dtype == jnp.bfloat16


def test_rematerialisation_changes_no_gradient():
    config = tiny()
    (loss, _), grads = gradient(config, remat="full")
    (expected, _), expected_grads = gradient(config)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert_trees_close(grads, expected_grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("remat", ["dots", "attention"])
def test_every_policy_gives_the_gradients_of_the_encoder_layers(remat):
    """The encoder alone, over rows long enough for the attention kernel that names its results."""
    config = tiny(**{"vision.image_size": 96, "vision.layers": 2})  # 144 patches
    crops = np.random.default_rng(0).integers(0, 256, (1, 96, 96, 3)).astype(np.uint8)

    def gradients(policy):
        encoder = VisionEncoder(config, jnp.float32, policy)

        def loss(p, crops):
            x = encoder.apply({"params": p}, crops, jnp.array([False]), method="embed")
            return (encoder.apply({"params": p}, {"guided": x}, None, None)["guided"] ** 2).mean()

        return jax.jit(jax.grad(loss))(params(config)["vision"], crops)

    assert_trees_close(gradients(remat), gradients("none"), rtol=1e-4, atol=1e-6)


# Rows.


@pytest.mark.parametrize("preset", PRESETS)
def test_permuted_rows_give_permuted_results(preset):
    config = tiny(preset)
    batch, order = mixed_batch(config), np.array([2, 0, 3, 1])
    hidden, visual = forward_fn(config)(params(config), batch)
    other = jax.tree.map(lambda a: a[order], batch)
    hidden_other, visual_other = forward_fn(config)(params(config), other)
    np.testing.assert_allclose(hidden_other, np.asarray(hidden)[order], atol=1e-5)
    np.testing.assert_allclose(visual_other.latents, np.asarray(visual.latents)[order], atol=1e-5)


def test_text_only_row_of_the_paper_does_not_look_at_crops():
    config = tiny()
    batch = mixed_batch(config)
    assert (batch.visual_index[2] == -1).all() and (batch.latent_start[2] == -1).all()
    hidden, _ = forward_fn(config)(params(config), batch)
    noisy = jax.tree.map(np.copy, batch)
    noisy.crops[2] = 200
    noisy.crop_text[2] = 7
    noisy.crop_text_mask[2] = True
    after, _ = forward_fn(config)(params(config), noisy)
    np.testing.assert_array_equal(np.asarray(after), np.asarray(hidden))
    (_, parts), _ = grad_fn(config)(params(config), noisy)
    for name, value in gradient(config)[0][1].items():
        assert float(parts[name]) == float(value), name
    noisy.crops[0] = 200
    after, _ = forward_fn(config)(params(config), noisy)
    assert np.abs(np.asarray(after) - np.asarray(hidden))[0].max() > 1e-3


def test_text_only_row_of_the_released_weights_looks_at_a_zero_image():
    config = tiny("released")
    batch = mixed_batch(config)
    hidden, visual = forward_fn(config)(params(config), batch)
    assert (np.asarray(visual.latents)[2] == 0).all() and (np.asarray(visual.latents)[0] != 0).any()
    noisy = jax.tree.map(np.copy, batch)
    noisy.crops[2], noisy.quadrants[2] = 200, 200
    after, _ = forward_fn(config)(params(config), noisy)
    np.testing.assert_array_equal(np.asarray(after), np.asarray(hidden))
    absent = dataclasses.replace(batch, round_end=np.where(np.arange(4)[:, None] == 2, -1, batch.round_end))
    absent = dataclasses.replace(absent, latent_start=np.where(np.arange(4)[:, None] == 2, -1, batch.latent_start))
    after, _ = forward_fn(config)(params(config), absent)
    assert np.abs(np.asarray(after) - np.asarray(hidden))[2].max() > 1e-3


def test_assembled_rows_and_their_gradients():
    """Two groups of two rows; the first row has tiles with two row ends, which many places may share."""
    config = tiny(tile_grids=((1, 2),), tile_tokens=4)
    batch = mixed_batch(config)
    table = random_array(2, 3 * 9 + 3 * 4 + 1, 16)
    row_end, latents = table.shape[1] - 1, random_array(4, 2, 4, 16, seed=1)
    # The gradient of an entry is that of its place, of the row end the sum over its places.
    index = np.full((4, 34), -1, np.int32)
    index[0, :17] = [*range(9), *range(30, 34), row_end, *range(34, 36), row_end]
    index[1, 3:7], index[2, 5:9] = np.arange(row_end + 1, row_end + 5), np.arange(18, 22)
    index[3, :4] = np.arange(row_end + 9, row_end + 13)
    batch = dataclasses.replace(batch, visual_index=index, crop_kind=np.zeros((2, 3), np.int32))
    batch, weights = jax.tree.map(jnp.asarray, batch), params(config)
    cotangent = random_array(4, 34, 16, seed=3)

    def assemble(table, latents, row_end):
        visual = fusion.Visual(table, None, latents, *(None,) * 4)
        model = fusion.Fusion(config)
        return model.apply({"params": weights | {"row_end": row_end}}, batch, visual, method="assemble")

    out, back = jax.vjp(assemble, jnp.asarray(table), jnp.asarray(latents), weights["row_end"])
    d_table, d_latents, d_row_end = map(np.array, back(cotangent))
    whole = np.concatenate([table, latents.reshape(2, -1, 16)], 1)
    expected, d_whole = np.asarray(weights["llm"]["embedding"])[batch.tokens], np.zeros_like(whole)
    d_end = np.zeros(16, np.float32)
    for row, place in np.argwhere(index >= 0):
        entry = row // 2, index[row, place]
        if index[row, place] == row_end:
            expected[row, place] = weights["row_end"]
            d_end += cotangent[row, place]
        else:
            expected[row, place] = whole[entry]
            d_whole[entry] += cotangent[row, place]
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_allclose(d_row_end, d_end, atol=1e-6)
    np.testing.assert_array_equal(np.concatenate([d_table, d_latents.reshape(2, -1, 16)], 1), d_whole)


def test_pooled_latents_are_the_stitched_quadrants():
    config = tiny("released")
    batch = mixed_batch(config)
    _, visual = forward_fn(config)(params(config), batch)
    context, latents = np.asarray(visual.context)[0].reshape(6, 6, 16), np.asarray(visual.latents)[0]
    expected = context.reshape(2, 3, 2, 3, 16).max((1, 3)).reshape(4, 16)
    np.testing.assert_array_equal(latents[0], expected)


def test_text_batch_without_image_slots_needs_no_encoder():
    config = tiny()
    batch = lay(config, [example(config, s, image=False) for s in range(2)])
    none = {
        name: getattr(batch, name)[:, :0] for name in ("crops", "crop_kind", "quadrants", "crop_text", "crop_text_mask")
    }
    bare = dataclasses.replace(batch, **none)
    with_slots, _ = forward_fn(config)(params(config), batch)
    hidden, visual = forward_fn(config)(params(config), bare)
    assert visual is None
    np.testing.assert_allclose(hidden, with_slots, atol=1e-6)
