"""Pixels against the graph: colours, places and numbers are measured in the picture, not taken from the layout.

The trick: a scene drawn twice, once with one group in another colour, differs exactly where that group's paint shows.
"""

import dataclasses
import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

from fusion_jax.synth.worlds.scenes import backdrop, compose, drawing, graph
from fusion_jax.synth.worlds.scenes.art import ARTISTS, PANELS, VARIANTS, master
from fusion_jax.synth.worlds.scenes.graph import Group, Scene
from fusion_jax.synth.worlds.scenes.lexicon import CARRIERS, COLOURS, COLUMNS, NOUNS, RGB
from fusion_jax.synth.worlds.scenes.settings import SETTINGS

SIZE = (384, 384)


def some_scenes(count: int, texts: int = 0) -> list[Scene]:
    made = []
    for number in range(count):
        rng = graph.generator("drawing", number)
        made.append(compose.settle(compose.random_draft(rng, rng.randint(2, 6), texts), rng))
    return made


def paint_of(scene: Scene, k: int, seed: int) -> np.ndarray:
    """(height, width) bool: where the paint of group k shows."""
    group = scene.groups[k]
    other = "white" if group.colour not in ("white", "gray", "yellow") else "black"
    # Not through graph.scene: the recoloured twin may clash with another group, which matters to words alone.
    twin = Scene(
        scene.setting, (*scene.groups[:k], dataclasses.replace(group, colour=other, text=""), *scene.groups[k + 1 :])
    )
    plain = Scene(scene.setting, (*scene.groups[:k], dataclasses.replace(group, text=""), *scene.groups[k + 1 :]))
    pictures = [np.asarray(drawing.draw(s, SIZE, seed)).astype(int) for s in (plain, twin)]
    return np.abs(pictures[0] - pictures[1]).max(-1) > 12


def nearest_colour(pixels: np.ndarray) -> str:
    """The named colour of most pixels, by hue where there is one: shading changes only how light they are."""

    def chroma(rgb: np.ndarray) -> np.ndarray:
        rgb = rgb.astype(float)
        return np.concatenate([(rgb - rgb.mean(-1, keepdims=True)) * 1.5, rgb.mean(-1, keepdims=True) * 0.6], -1)

    names = np.array([RGB[name] for name in COLOURS])
    distance = np.linalg.norm(chroma(np.median(pixels, axis=0))[None] - chroma(names), axis=-1)
    return COLOURS[int(distance.argmin())]


def things_seen(scene: Scene, seed: int) -> int:
    """How many things stand side by side in a picture, by how it differs from the picture without them."""
    empty = np.asarray(drawing.stage(scene, SIZE, seed)).astype(int)
    mask = np.abs(np.asarray(drawing.draw(scene, SIZE, seed)).astype(int) - empty).max(-1) > 30
    if scene.groups[0].noun == "snail":  # its feelers stand apart from its shell
        mask = paint_of(scene, 0, seed)
    rows = np.flatnonzero(mask.any(1))
    share = 1 if scene.groups[0].row == "air" else 0.7  # shadows on the ground run into each other
    upper = mask[: rows[0] + int(share * (rows[-1] - rows[0]))]
    columns = np.flatnonzero(upper.sum(0) > 0)
    return 1 + int((np.diff(columns) > 3).sum())


def test_every_noun_has_an_artist_and_mostly_shows_its_own_colour():
    assert set(ARTISTS) == set(NOUNS) and set(PANELS) == set(CARRIERS)
    for noun in NOUNS:
        for variant in range(VARIANTS):
            model = master(noun, variant)
            tint, cover = np.asarray(model.paint)[..., 3], np.asarray(model.coverage)
            share = (tint > 40).sum() / (cover > 128).sum()
            assert share > 0.4, (noun, share)
            assert max(model.paint.size) > 150


@pytest.mark.parametrize("number", range(10))
def test_colours_and_places_in_the_picture_are_those_of_the_graph(number):
    scene = some_scenes(10)[number]
    middles = {}
    for k, group in enumerate(scene.groups):
        mask = paint_of(scene, k, number)
        assert mask.sum() > 250 * group.count, group
        picture = np.asarray(drawing.draw(scene, SIZE, number))
        inner = ndimage.binary_erosion(mask)  # at the edge the backdrop shines through
        bright = inner & (picture.max(-1) > np.percentile(picture[inner].max(-1), 40))
        assert nearest_colour(picture[bright]) == group.colour, group
        rows, columns = np.nonzero(mask)
        middles[k] = np.median(columns) / SIZE[0], (rows.min() / SIZE[1], rows.max() / SIZE[1])
        x = middles[k][0]
        assert COLUMNS[0 if x < 0.37 else (1 if x < 0.63 else 2)] == group.column, (group, x)
        if group.row == "air":
            assert rows.max() < 0.42 * SIZE[1]
    for a, group_a in enumerate(scene.groups):
        for b, group_b in enumerate(scene.groups):
            if graph.holds("left of", group_a, group_b):
                assert middles[a][0] < middles[b][0]
            if graph.holds("above", group_a, group_b):
                assert middles[a][1][1] < middles[b][1][1]
            if graph.holds("in front of", group_a, group_b):
                assert middles[a][1][1] > middles[b][1][1] + 0.03  # its feet are lower


@pytest.mark.parametrize("noun", NOUNS)
def test_one_counts_in_the_picture_what_the_graph_says(noun):
    row = "air" if NOUNS[noun].air else "front"
    for count in (1, 2, 3):
        scene = Scene("meadow", (Group(noun, count, "pink", "large", row, "center"),))
        assert things_seen(scene, count) == count


def test_what_stands_in_front_never_hides_what_is_behind():
    for number, scene in enumerate(some_scenes(150, texts=1)):
        placed = drawing.layout(scene, SIZE, number)
        for thing in placed:
            assert min(thing.box) >= 0 and thing.box[2] <= SIZE[0] and thing.box[3] <= SIZE[1]
            left, top, right, bottom = thing.box
            assert right - left >= 14 and bottom - top >= 14, (scene.groups[thing.group], thing.box)
            seen = np.ones((bottom - top, right - left), bool)
            for other in placed[placed.index(thing) + 1 :]:
                x0, y0, x1, y1 = other.box
                seen[max(0, y0 - top) : max(0, y1 - top), max(0, x0 - left) : max(0, x1 - left)] = False
            assert seen.mean() > 0.7, (scene, thing)
            group = scene.groups[thing.group]
            if group.text:
                low = PANELS[group.noun][1]
                assert seen[: int((1 - low) * seen.shape[0])].all(), group


@pytest.mark.parametrize("noun", CARRIERS)
def test_writing_lies_on_its_carrier_and_is_legible(noun):
    row = "air" if NOUNS[noun].air else "front"
    long = "one two three four five six seven eight nine ten eleven twelve"
    for size, text, least in (("large", "OPEN", 12), ("small", "Fresh bread", 9), ("large", long, 24)):
        group = Group(noun, 1, "yellow", size, row, "center", text)
        # The same letters in no ink: a text of spaces only would be another layout, so another text of its length.
        other = dataclasses.replace(group, text=text.translate(str.maketrans("OPENFreshbadotwuivglx", "|" * 21)))
        (box,) = [placed.box for placed in drawing.layout(Scene("beach", (group,)), SIZE, 3)]
        pictures = [np.asarray(drawing.draw(Scene("beach", (g,)), SIZE, 3)).astype(int) for g in (group, other)]
        rows, columns = np.nonzero(np.abs(pictures[0] - pictures[1]).max(-1) > 60)
        assert rows.min() >= box[1] and rows.max() < box[3]
        assert columns.min() >= box[0] and columns.max() < box[2]
        assert rows.max() - rows.min() >= least, (size, text)


@pytest.mark.parametrize("setting", SETTINGS)
def test_backdrops_are_textured_and_differ(setting):
    first, second = (
        np.asarray(backdrop.backdrop(setting, (192, 192), 0.52, graph.generator(setting, k))).astype(float)
        for k in range(2)
    )
    assert first.shape == (192, 192, 3) and first.std() > 12
    assert np.abs(first - second).mean() > 4
    ground = first[110:].mean(-1)
    assert max(np.abs(np.diff(ground, axis=axis)).mean() for axis in (0, 1)) > 0.8  # grain, not a flat colour


@pytest.mark.parametrize("size", [(64, 64), (512, 384), (200, 300), (768, 768)])
def test_any_size(size):
    scene = some_scenes(1, texts=1)[0]
    image = drawing.draw(scene, size, 0)
    assert image.size == size and image.mode == "RGB"


def test_a_seed_repeats_and_another_one_differs():
    scene = some_scenes(1)[0]
    first, again, other = (drawing.draw(scene, SIZE, seed).tobytes() for seed in (4, 4, 5))
    assert first == again != other


def test_pictures_do_not_depend_on_the_process_or_on_what_it_drew_before():
    scene = some_scenes(2)[1]
    here = hashlib.sha256(drawing.draw(scene, SIZE, 9).tobytes()).hexdigest()
    code = (
        "import hashlib\n"
        "from fusion_jax.synth.worlds.scenes import compose, drawing, graph\n"
        "rng = graph.generator('drawing', 1)\n"
        "scene = compose.settle(compose.random_draft(rng, rng.randint(2, 6), 0), rng)\n"
        "print(hashlib.sha256(drawing.draw(scene, (384, 384), 9).tobytes()).hexdigest())\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert there.stdout.strip() == here
