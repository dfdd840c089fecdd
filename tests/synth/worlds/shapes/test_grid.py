"""Scenes keep to their grid and their split; drawings show what the grid says."""

import random

import numpy as np
import pytest

from fusion_jax.synth.worlds.shapes import grid as grids
from fusion_jax.synth.worlds.shapes.grid import Grid, Thing, Word


def many(split: str, count: int = 400) -> list[Grid]:
    return [grids.random_grid(random.Random(f"{split}/{i}"), split) for i in range(count)]


def test_every_colour_and_every_shape_occurs_in_training():
    assert {colour for colour, _ in grids.SEEN} == set(grids.COLOURS)
    assert {shape for _, shape in grids.SEEN} == set(grids.SHAPES)
    assert {colour for colour, _ in grids.UNSEEN} == set(grids.COLOURS)
    assert {shape for _, shape in grids.UNSEEN} == set(grids.SHAPES)
    assert len(grids.UNSEEN) * 6 == len(grids.PAIRS)


def test_held_out_pairs_never_occur_in_training_and_always_when_held_out():
    assert not any(thing.pair in grids.HELD_OUT for grid in many("train") for thing in grid.things)
    assert all(any(thing.pair in grids.HELD_OUT for thing in grid.things) for grid in many("held_out"))


@pytest.mark.parametrize("split", grids.SPLITS)
def test_cells_are_used_once_and_words_have_a_row_to_themselves(split):
    drawn = many(split)
    for grid in drawn:
        cells = [thing.cell for thing in grid.things]
        assert cells == sorted(set(cells)) and 1 <= len(cells) <= 4
        assert grid.word is None or all(cell // 3 != grid.word.row for cell in cells)
    assert {len(grid.things) for grid in drawn} == {1, 2, 3, 4}
    assert 0.25 < np.mean([grid.word is not None for grid in drawn]) < 0.45


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="held_out"):
        grids.random_grid(random.Random(0), "test")


def test_a_scene_and_its_drawing_repeat():
    first, again = (grids.random_grid(random.Random(7)) for _ in range(2))
    assert first == again
    assert grids.draw(first, 96, random.Random(1)).tobytes() == grids.draw(first, 96, random.Random(1)).tobytes()
    assert grids.draw(first, 96, random.Random(1)).tobytes() != grids.draw(first, 96, random.Random(2)).tobytes()


def strong(image) -> np.ndarray:
    """Pixels far from any grey background: saturated, nearly black (outlines, writing) or nearly white."""
    pixels = np.asarray(image).astype(int)
    return (pixels.max(-1) - pixels.min(-1) > 60) | (pixels.max(-1) < 70) | (pixels.min(-1) > 200)


def nearest_colour(pixel: np.ndarray) -> str:
    return min(grids.COLOURS, key=lambda colour: np.abs(np.array(grids.RGB[colour]) - pixel).sum())


@pytest.mark.parametrize("seed", range(30))
def test_cells_hold_what_the_scene_says(seed):
    rng = random.Random(seed)
    grid = grids.random_grid(rng, "held_out")
    image = grids.draw(grid, 96, rng)
    assert image.size == (96, 96) and image.mode == "RGB"
    pixels, mask = np.asarray(image).astype(int), strong(image)
    things = {thing.cell: thing for thing in grid.things}
    for cell in range(9):
        row, column = divmod(cell, 3)
        area = np.s_[row * 32 + 1 : row * 32 + 31, column * 32 + 1 : column * 32 + 31]
        if cell in things:
            assert mask[area].sum() > 40
            filled = mask[area] & (pixels[area].max(-1) > 110)  # inside the outline
            assert nearest_colour(np.median(pixels[area][filled], axis=0)) == things[cell].colour
        elif grid.word is None or grid.word.row != row:
            assert mask[area].sum() < 12  # at most a neighbour's edge


@pytest.mark.parametrize("shape", grids.SHAPES)
def test_small_and_large_are_far_apart_whatever_the_jitter(shape):
    def spans(size: str) -> list[int]:
        grid = Grid((Thing(shape, "red", size, 4),), None, 0)
        masks = [strong(grids.draw(grid, 96, random.Random(seed))) for seed in range(12)]
        return [int(mask.any(0).sum()) for mask in masks]

    assert max(spans("small")) < 0.8 * min(spans("large"))


@pytest.mark.parametrize("word", grids.WORDS)
def test_words_fit_into_their_row(word):
    for row in range(3):
        grid = Grid((Thing("circle", "red", "small", 0 if row else 8),), Word(word, row), 0)
        grey = np.asarray(grids.draw(grid, 96, random.Random(row)).convert("RGB")).astype(int)
        ink = grey.max(-1) < 70
        ink[np.s_[:32, :32] if row else np.s_[64:, 64:]] = False  # the circle's outline
        rows, columns = np.nonzero(ink)
        assert rows.min() >= row * 32 and rows.max() < (row + 1) * 32
        assert columns.min() > 0 and columns.max() < 95
        assert rows.max() - rows.min() >= 18  # capitals fill most of the row
