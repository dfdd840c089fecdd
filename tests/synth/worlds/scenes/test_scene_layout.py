"""Scale and support, asked of 500 scenes: what is higher is drawn higher, and nothing hangs on nothing."""

import itertools

import numpy as np
import pytest

from fusion_jax.synth.worlds.scenes import backdrop, compose, drawing, graph, layout
from fusion_jax.synth.worlds.scenes.graph import Group, Scene
from fusion_jax.synth.worlds.scenes.lexicon import NOUNS
from fusion_jax.synth.worlds.scenes.parse import parse
from fusion_jax.synth.worlds.scenes.settings import SETTINGS

SIZE = (384, 384)
FLIES_BY_ITSELF = ("bird", "butterfly", "airplane", "balloon")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    made = []
    for number in range(500):
        rng = graph.generator("layout test", number)
        made.append(compose.settle(compose.random_draft(rng, rng.randint(1, 6), rng.choice((0, 0, 1, 2))), rng))
    return made


def heights(scene: Scene, seed: int) -> dict[int, int]:
    """Height in pixels of each group's things."""
    return {one.group: one.box[3] - one.box[1] for one in layout.layout(scene, SIZE, seed)}


def apparent(group: Group) -> float:
    return layout.metres(group) * layout.NEARNESS[group.row]


def test_what_is_higher_is_drawn_higher_and_all_can_be_seen(scenes):
    for number, scene in enumerate(scenes):
        drawn = heights(scene, number)
        assert min(drawn.values()) > 0.05 * SIZE[1], scene
        for a, b in itertools.permutations(range(len(scene.groups)), 2):
            if apparent(scene.groups[a]) > layout.CLEARLY * apparent(scene.groups[b]):
                assert drawn[a] > drawn[b], (scene.groups[a], scene.groups[b], drawn)


@pytest.mark.parametrize(
    ("higher", "lower"),
    [
        ("house", "apple"),
        ("house", "snail"),
        ("tent", "bucket"),
        ("bus", "bottle"),
        ("tree", "duck"),
        ("car", "pumpkin"),
        ("barrel", "pear"),
        ("chair", "mug"),
        ("billboard", "cat"),
    ],
)
def test_no_caption_makes_a_small_thing_the_higher_one(higher, lower):
    for seed, caption in enumerate((f"A small {higher} and a large {lower}", f"A {lower} in front of a {higher}")):
        scene = compose.settle(parse(caption), graph.generator(caption))
        drawn = {scene.groups[k].noun: high for k, high in heights(scene, seed).items()}
        assert drawn[higher] > drawn[lower], caption


def test_invented_scenes_hold_what_one_finds_there(scenes):
    for scene in scenes:
        low, high = scene.place.metres
        for group in scene.groups:
            noun = NOUNS[group.noun]
            assert low <= noun.metres <= high, (scene.setting, group)
            assert noun.home != "sky" or scene.place.sky, (scene.setting, group)
        standing = [NOUNS[group.noun].metres for group in scene.groups if group.row != "air"]
        assert not standing or max(standing) <= compose.RATIO * min(standing), scene


def test_nothing_hangs_or_stands_on_nothing(scenes):
    for number, scene in enumerate(scenes):
        for one in layout.layout(scene, SIZE, number):
            group = scene.groups[one.group]
            if group.row == "air":
                assert group.noun in (*drawing.HANGING, "kite", *FLIES_BY_ITSELF)
            else:  # its feet are on the ground, which begins at 0.5 to 0.56 of the height
                assert 0.58 * SIZE[1] < one.box[3] < 0.97 * SIZE[1], (scene, one)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("noun", ["banner", "lantern", "kite"])
def test_what_cannot_fly_by_itself_is_tied_to_something(noun, setting):
    scene = Scene(setting, (Group(noun, 1, "red", "", "air", "center"),))
    (placed,) = layout.layout(scene, SIZE, 3)
    rng = graph.generator(3, "backdrop")
    bare = np.asarray(backdrop.backdrop(setting, SIZE, rng.uniform(0.5, 0.56), rng)).astype(int)
    tied = np.abs(np.asarray(drawing.stage(scene, SIZE, 3)).astype(int) - bare).max(-1) > 0
    left, top, right, bottom = placed.box
    assert tied[top - 2 : bottom, left:right].any()  # it begins at the thing
    rows, columns = np.nonzero(tied)
    if noun == "kite":  # and ends at the edge, where someone holds it,
        assert columns.min() == 0 or columns.max() == SIZE[0] - 1
    elif SETTINGS[setting].sky:  # or on the ground,
        assert rows.max() > 0.56 * SIZE[1]
    else:  # or above the picture
        assert rows.min() == 0
