"""Dynamic resolution: which grid, which pixels, which tokens, which windows; and that the model reads them so."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.fixtures import example, forward_fn, grad_fn, lay, params, tiny
from PIL import Image

from fusion_jax.batch import adaptive_cells
from fusion_jax.data import tiles
from fusion_jax.data.conversation import ANSWER_START, IGNORE, IMAGE, LATENTS
from fusion_jax.data.examples import layout_spec
from fusion_jax.data.image import read_tiles
from fusion_jax.data.layout import Example, LayoutSpec, lay_out, lay_out_rows, measure
from fusion_jax.data.tiles import WHOLE, Tiling, choose_tiling
from fusion_jax.models.config import VARIANTS

GRIDS = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))
TILE = 24  # pixels; 3 x 3 patches of the tiny encoder


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((400, 400), Tiling(2, 2, 48, 48, 0, 0)),
        ((800, 400), Tiling(1, 2, 48, 24, 0, 0)),  # as much of it as on 2 x 2, less wasted
        ((100, 200), Tiling(2, 1, 24, 48, 0, 0)),
        ((900, 300), Tiling(1, 3, 72, 24, 0, 0)),
        ((640, 480), Tiling(2, 2, 48, 36, 0, 6)),
        ((300, 1000), Tiling(3, 1, 22, 72, 1, 0)),
        ((5000, 1), Tiling(1, 3, 72, 1, 0, 11)),  # absurd, but an image
        ((1, 1), Tiling(1, 2, 24, 24, 12, 0)),  # nothing is gained by any grid: the smallest, first of its kind
    ],
)
def test_the_grid_keeps_most_of_the_image_and_wastes_least(size, expected):
    assert choose_tiling(size, GRIDS, TILE) == expected


def test_small_images_stay_whole_where_that_is_allowed():
    assert choose_tiling((20, 24), ((1, 1), *GRIDS), TILE) == WHOLE
    assert choose_tiling((200, 24), ((1, 1), *GRIDS), TILE) != WHOLE
    assert choose_tiling((200, 24), (), TILE) == WHOLE


SIZES = [(640, 480), (480, 640), (37, 91), (300, 1000), (5000, 1), (48, 48), (47, 50), (1000, 311)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [1, 2, 3, 16])
def test_tokens_of_padding_alone_are_cut_away(size, side):
    tiling = choose_tiling(size, GRIDS, TILE)
    held = np.zeros((tiling.rows * TILE * side, tiling.columns * TILE * side), bool)  # side^2 dots to a pixel
    held[
        tiling.top * side : (tiling.top + tiling.height) * side,
        tiling.left * side : (tiling.left + tiling.width) * side,
    ] = True
    cells = held.reshape(tiling.rows * side, TILE, tiling.columns * side, TILE).any((1, 3))
    top, bottom, left, right = tiling.box(TILE, side)
    expected = np.zeros_like(cells)
    expected[top:bottom, left:right] = True
    np.testing.assert_array_equal(cells, expected)
    assert tiling.tokens(TILE, side) == (bottom - top) * (right - left) + (bottom - top)
    assert tiling.tokens(TILE, side) <= tiles.most_tokens(GRIDS, side * side)


@pytest.mark.parametrize("size", SIZES)
def test_crops_are_the_whole_view_and_the_padded_image_in_pieces(size, tmp_path):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8))
    tiling = choose_tiling(size, GRIDS, TILE)
    image.save(tmp_path / "image.png")
    crops = read_tiles(tmp_path / "image.png", tiling, TILE)
    assert crops.shape == (tiling.crops, TILE, TILE, 3)

    def resized(width, height):
        across = image.resize((width, image.height), Image.Resampling.BICUBIC)
        return np.asarray(across.resize((width, height), Image.Resampling.BICUBIC))

    np.testing.assert_array_equal(crops[0], resized(TILE, TILE))
    canvas = np.full((tiling.rows * TILE, tiling.columns * TILE, 3), tiles.PADDING, np.uint8)
    inside = slice(tiling.top, tiling.top + tiling.height), slice(tiling.left, tiling.left + tiling.width)
    canvas[inside] = resized(tiling.width, tiling.height)
    for i, crop in enumerate(crops[1:]):
        y, x = i // tiling.columns * TILE, i % tiling.columns * TILE
        np.testing.assert_array_equal(crop, canvas[y : y + TILE, x : x + TILE])


# Layout.

SPEC = LayoutSpec(
    length=300,
    question_length=4,
    rounds=3,
    image_tokens=9,
    image_size=TILE,
    quadrants=0,
    zero_image_for_text=False,
    hide_question_id_zero=False,
    crops=9,
    images=2,
    grids=GRIDS,
    tile_tokens=4,
)
TILINGS = tuple(choose_tiling(size, GRIDS, TILE) for size in ((640, 480), (100, 200)))  # 2 x 2 padded, 2 x 1


def two_images():
    ids = [1, IMAGE, 40, IMAGE, LATENTS, 50, 30, 60, LATENTS, 51, 30, 61]
    labels = [IGNORE] * 6 + [ANSWER_START, 60] + [IGNORE] * 2 + [ANSWER_START, 61]
    crops = np.random.default_rng(0).integers(0, 256, (8, 1, TILE, TILE, 3)).astype(np.uint8)
    return Example(np.array(ids), np.array(labels), np.array([1, 50], np.int32), crops, "here", TILINGS)


def table(spec, rows_in_group, latents):
    """What each entry of the visual table is: (kind, crop, y, x)."""
    whole = [("whole", k, y, x) for k in range(spec.crops) for y in range(3) for x in range(3)]
    tile = [("tile", k, y, x) for k in range(spec.crops) for y in range(2) for x in range(2)]
    return (
        whole + tile + ["end"] + [("latent", i, r, n) for i in range(rows_in_group) for r in range(3) for n in latents]
    )


def image_of(first, tiling, side=2):
    """An image's tokens as the sequence holds them, drawn on the merged grid."""
    found = [("whole", first, y, x) for y in range(3) for x in range(3)]
    top, bottom, left, right = tiling.box(TILE, side)
    for y in range(top, bottom):
        for x in range(left, right):
            tile = y // side * tiling.columns + x // side
            found.append(("tile", first + 1 + tile, y % side, x % side))
        found.append("end")
    return found


def test_an_image_stands_as_its_whole_view_and_rows_of_its_tiles():
    made = two_images()
    takes = measure(made, SPEC, 4)
    assert (takes.crops, made.images, takes.rounds) == (8, 2, 2)
    batch = lay_out_rows([[], [made]], SPEC, 4, groups=1)
    entries = table(SPEC, 2, range(4))
    index = batch.visual_index[1]
    found = [entries[i] if i >= 0 else None for i in index[: takes.length]]
    latents = [[("latent", 1, r, n) for n in range(4)] for r in range(2)]
    first, second = image_of(0, TILINGS[0]), image_of(5, TILINGS[1])
    expected = [None, *first, None, *second, *latents[0], None, None, None, *latents[1], None, None, None]
    assert found == expected and (index[takes.length :] == -1).all()
    np.testing.assert_array_equal(batch.crops[0, :8], made.crops[:, 0])
    assert batch.crop_text_mask[0].sum(-1).tolist() == [2] * 8 + [0]  # the question guides every tile
    assert batch.round_crop[1].tolist() == [5, 5, -1]


@pytest.mark.parametrize("count", [1, 4, 9])
def test_latents_see_their_cell_of_the_whole_view_and_of_the_tiles(count):
    made, cells = two_images(), int(count**0.5)
    made = dataclasses.replace(made, input_ids=made.input_ids.copy())
    made.input_ids[[3, 4]] = 41, IMAGE  # the second image after the latents of its round would: keep one image a round
    made.input_ids[2] = LATENTS
    batch = lay_out_rows([[made]], SPEC, count, groups=1)
    context = table(SPEC, 1, ())[: SPEC.crops * (9 + 4)]
    first, tiling = 5, TILINGS[1]
    top, bottom, left, right = tiling.box(TILE, 2)
    for n, window in enumerate(batch.windows[0, 1]):
        r, c = divmod(n, cells)

        def cell(size, at):
            index, real = adaptive_cells(size, cells)
            return index[at][real[at]].tolist()

        expected = {("whole", first, y, x) for y in cell(3, r) for x in cell(3, c)}
        for y in cell(bottom - top, r):
            for x in cell(right - left, c):
                y_, x_ = y + top, x + left
                expected.add(("tile", first + 1 + y_ // 2 * tiling.columns + x_ // 2, y_ % 2, x_ % 2))
        assert {context[i] for i in window if i >= 0} == expected
        assert (window >= 0).sum() == len(expected)


# The model.

DYNAMIC = {"tile_grids": GRIDS, "tile_tokens": 4}


def dynamic_example(config, seed, sizes, **changes):
    """`fixtures.example` with one image of dynamic resolution."""
    made = example(config, seed, **changes)
    tiling = choose_tiling(sizes, GRIDS, TILE)
    crops = np.random.default_rng(seed).integers(0, 256, (tiling.crops, 1, TILE, TILE, 3)).astype(np.uint8)
    return dataclasses.replace(made, crops=crops, tilings=(tiling,))


def test_without_tiles_the_model_is_that_of_fixed_resolution():
    fixed, dynamic = tiny(), tiny(**DYNAMIC)
    examples = [example(fixed, s) for s in range(2)]
    whole = [dataclasses.replace(e, tilings=(WHOLE,)) for e in examples]
    weights = dict(params(dynamic))
    assert weights.pop("row_end").shape == (fixed.llm.width,)
    batch = lay(dynamic, whole)
    expected, _ = forward_fn(fixed)(weights, lay(fixed, examples))
    found, visual = forward_fn(dynamic)(params(dynamic), batch)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert visual.image_tokens.shape == (2, 5 * (9 + 4) + 1, fixed.llm.width)  # room for 2 x 2 tiles


def test_every_parameter_learns_and_shared_tables_change_nothing():
    config = tiny(**DYNAMIC)
    examples = [dynamic_example(config, s, size) for s, size in enumerate(((640, 480), (100, 200), (90, 30), (50, 50)))]
    alone = lay(config, examples)
    (total, _), grads = grad_fn(config)(params(config), alone)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads["row_end"]))
    assert np.isfinite(total)
    crops = sum(e.tilings[0].crops for e in examples)
    spec = dataclasses.replace(layout_spec(config, alone.tokens.shape[1], alone.crop_text.shape[-1], 2), crops=crops)
    shared = lay_out_rows([[e] for e in examples], spec, alone.latent_count, groups=1)
    assert shared.crops.shape[:2] == (1, crops) and alone.crops.shape[:2] == (4, 5)
    (total_shared, _), grads_shared = grad_fn(config)(params(config), shared)
    np.testing.assert_allclose(total_shared, total, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads_shared), jax.tree.leaves(grads)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_tile_reaches_the_decoder_and_the_exchange():
    config = tiny(**DYNAMIC)
    made = dynamic_example(config, 0, (640, 480))
    batch = lay(config, [made])
    hidden, visual = forward_fn(config)(params(config), batch)
    noisy = dataclasses.replace(batch, crops=batch.crops.copy())
    noisy.crops[0, 4] = 255 - noisy.crops[0, 4]  # the last tile
    after, moved = forward_fn(config)(params(config), noisy)
    changed = np.abs(np.asarray(moved.image_tokens) - np.asarray(visual.image_tokens))[0].max(-1) > 1e-6
    first = 5 * 9 + 4 * 4
    assert changed[4 * 9 : 5 * 9].all() and changed[first : first + 4].all() and changed.sum() == 9 + 4
    assert np.abs(np.asarray(after) - np.asarray(hidden)).max() > 1e-4
    # Were its tokens left out of the sequence, the exchange would still carry it.
    hidden_places = (batch.visual_index >= first) & (batch.visual_index < first + 4)
    assert hidden_places.sum() == 4
    unseen = np.where(hidden_places, 0, batch.visual_index)
    kept, without = (
        forward_fn(config)(params(config), dataclasses.replace(b, visual_index=unseen))[0] for b in (batch, noisy)
    )
    assert np.abs(np.asarray(without) - np.asarray(kept)).max() > 1e-4


def test_prompts_of_several_shapes_are_answered_as_alone():
    config = tiny(**DYNAMIC)
    examples = [dynamic_example(config, s, size) for s, size in enumerate(((640, 480), (100, 200)))]
    together = lay(config, examples)
    hidden, _ = forward_fn(config)(params(config), together)
    for i, e in enumerate(examples):
        alone, _ = forward_fn(config)(params(config), lay(config, [e]))
        length = int((together.segment_ids[i] > 0).sum())
        np.testing.assert_allclose(np.asarray(hidden)[i, :length], np.asarray(alone)[0, :length], atol=1e-5)


def test_the_published_variant_spends_about_1400_tokens():
    config = VARIANTS["flare_x"]["3b"]
    usual = [(640, 480), (480, 640), (500, 375), (1024, 768), (1280, 720), (1920, 1080), (600, 400), (400, 600)]
    usual += [(1000, 1000), (512, 512), (1700, 2200), (2480, 3508), (1600, 1200), (800, 1200), (1000, 500), (1500, 500)]
    side = int(config.tokens_per_tile**0.5)
    tokens = [config.tokens_per_image + choose_tiling(size, config.tile_grids, 384).tokens(384, side) for size in usual]
    assert abs(np.mean(tokens) + np.mean(config.latent_counts) - 1400) < 40
    assert config.most_tile_tokens == tiles.most_tokens(config.tile_grids, config.tokens_per_tile)  # exported folders'
    assert max(tokens) <= config.tokens_per_image + config.most_tile_tokens


def test_images_without_a_place_of_their_crops_are_refused():
    made = dataclasses.replace(two_images(), tilings=TILINGS[1:] * 2)
    with pytest.raises(ValueError, match="8 crops"):
        lay_out([made], SPEC, 4)
