"""Rows drawn by hand: where image, latents, text, targets and round marks land, and what does not fit."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.fixtures import QUESTION_LENGTH, example, tiny

from fusion_jax.batch import NO_CROP, PIXELS, ZERO_IMAGE
from fusion_jax.data.conversation import ANSWER_START, IGNORE, IMAGE, LATENTS
from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import Example, LayoutSpec, Measured, check_fits, lay_out, lay_out_rows, measure
from fusion_jax.errors import BadRecord

I, L, A, X = IMAGE, LATENTS, ANSWER_START, IGNORE

SPEC = LayoutSpec(
    length=40,
    question_length=4,
    rounds=2,
    image_tokens=4,
    image_size=2,
    quadrants=0,
    zero_image_for_text=False,
    hide_question_id_zero=False,
)
CROPS = np.arange(5 * 2 * 2 * 3, dtype=np.uint8).reshape(5, 2, 2, 3)


def make(ids, labels, question=(), crops=None):
    labels = None if labels is None else np.array(labels, np.int32)
    return Example(np.array(ids, np.int32), labels, np.array(question, np.int32), crops, "data.json, record 3")


#                 s   v  L  v   v  I  v   q   q   e   a   a   e   v  L  v   q   e   a   e
TWO_ROUNDS_IDS = [1, 20, L, 21, 20, I, 21, 50, 51, 30, 60, 61, 31, 20, L, 21, 52, 30, 62, 31]
TWO_ROUNDS_LABELS = [X, X, X, X, X, X, X, X, X, A, 60, 61, 31, X, X, X, X, A, 62, 31]


def row(example, spec=SPEC, latents=3):
    batch = lay_out([example], spec, latents)
    return jax.tree.map(lambda a: a[0], batch)


def test_image_and_two_rounds():
    found = row(make(TWO_ROUNDS_IDS, TWO_ROUNDS_LABELS, (1, 50, 51, 52), CROPS[-1:]))
    # position  0   1   2..5       6   7   8..10    11  12  13  14  15  16  17  18  19..21    22  23  24  25  26
    tokens = [1, 20, *[0] * 4, 21, 20, *[0] * 3, 21, 50, 51, 30, 60, 61, 31, 20, *[0] * 3, 21, 52, 30, 62, 31]
    visual = [-1, -1, 0, 1, 2, 3, -1, -1, 4, 5, 6, *[-1] * 8, 7, 8, 9, *[-1] * 5]
    rest = 40 - len(tokens)
    assert len(tokens) == len(visual) == 27
    np.testing.assert_array_equal(found.tokens, tokens + [0] * rest)
    np.testing.assert_array_equal(found.visual_index, visual + [-1] * rest)
    np.testing.assert_array_equal(found.segment_ids, [1] * 27 + [0] * rest)
    np.testing.assert_array_equal(found.positions, [*range(27)] + [0] * rest)
    # Each position predicts the next: the question's last token (14) the answer's first.
    expected = {14: 60, 15: 61, 16: 31, 24: 62, 25: 31}
    np.testing.assert_array_equal(np.flatnonzero(found.loss_weights), list(expected))
    assert (found.loss_weights[list(expected)] == 1).all()
    np.testing.assert_array_equal(found.targets, [expected.get(i, 0) for i in range(40)])
    np.testing.assert_array_equal(found.round_end, [14, 24])
    np.testing.assert_array_equal(found.latent_start, [8, 19])
    np.testing.assert_array_equal(found.round_crop, [0, 0])
    np.testing.assert_array_equal(found.crop_kind, [PIXELS])
    np.testing.assert_array_equal(found.crops[0], CROPS[-1])
    np.testing.assert_array_equal(found.crop_text, [[1, 50, 51, 52]])
    assert found.crop_text_mask.all() and found.quadrants.shape == (1, 0, 2, 2, 3)


def test_targets_never_lie_on_the_token_that_they_name():
    found = row(make(TWO_ROUNDS_IDS, TWO_ROUNDS_LABELS, (1,), CROPS[-1:]))
    for i in np.flatnonzero(found.loss_weights):
        assert found.tokens[i + 1] == found.targets[i]


def test_latents_before_the_image_are_swapped_within_their_round_only():
    # The image comes with the second question: the first round keeps its latents in place.
    found = row(make([1, L, 50, 30, 60, L, I, 51, 30, 61], [X, X, X, A, 60, X, X, X, A, 61], (1,), CROPS[-1:]))
    visual = [-1, 4, 5, 6, -1, -1, -1, 0, 1, 2, 3, 7, 8, 9, -1, -1, -1]
    np.testing.assert_array_equal(found.visual_index[:17], visual)
    np.testing.assert_array_equal(found.latent_start, [1, 11])
    np.testing.assert_array_equal(found.round_end, [5, 15])


def test_the_released_preset_puts_a_late_image_into_the_first_place():
    """As the published code: the row's first visual place takes the image, each later one latents, round by round."""
    assert layout_spec(tiny("released"), 40, 4, 2).image_first and not layout_spec(tiny("paper"), 40, 4, 2).image_first
    example = make([1, L, 50, 30, 60, L, I, 51, 30, 61], [X, X, X, A, 60, X, X, X, A, 61], (1,), CROPS[-1:])
    found = row(example, dataclasses.replace(SPEC, image_first=True))
    visual = [-1, 0, 1, 2, 3, -1, -1, -1, 4, 5, 6, 7, 8, 9, -1, -1, -1]
    np.testing.assert_array_equal(found.visual_index[:17], visual)
    np.testing.assert_array_equal(found.latent_start, [8, 11])
    np.testing.assert_array_equal(found.round_end, [6, 15])
    np.testing.assert_array_equal(found.round_crop, [0, 0])
    # Three rounds, the image in the second; and in the first round both arrangements are one.
    ids, labels = [1, L, 50, 60, L, I, 51, 61, L, 52, 62], [X, X, A, 60, X, X, A, 61, X, A, 62]
    spec = dataclasses.replace(SPEC, image_first=True, rounds=3)
    np.testing.assert_array_equal(row(make(ids, labels, (1,), CROPS[-1:]), spec, 1).latent_start, [7, 8, 11])
    early = make([1, L, I, 50, 60, L, 51, 61], [X, X, X, A, 60, X, A, 61], (1,), CROPS[-1:])
    here, there = row(early), row(early, dataclasses.replace(SPEC, image_first=True))
    np.testing.assert_array_equal(here.visual_index, there.visual_index)


def test_a_question_may_be_empty():
    """Of an image alone, by a tokenizer without BOS: there is still room for one token, which no mask shows."""
    assert layout_spec(tiny(), 40, 0, 1).question_length == 1
    found = row(make([1, I, 50, 60], [X, X, A, 60], (), CROPS[-1:]), dataclasses.replace(SPEC, question_length=1))
    assert found.crop_kind[0] == PIXELS and not found.crop_text_mask.any()


def test_order_of_the_template_does_not_matter():
    swapped = list(TWO_ROUNDS_IDS)
    swapped[2], swapped[5] = I, L
    a, b = (row(make(ids, TWO_ROUNDS_LABELS, (1,), CROPS[-1:])) for ids in (TWO_ROUNDS_IDS, swapped))
    np.testing.assert_array_equal(a.visual_index, b.visual_index)


def test_text_only_row_of_the_paper():
    found = row(make([1, 50, 30, 60, 61], [X, X, A, 60, 61]))
    assert (found.visual_index == -1).all()
    np.testing.assert_array_equal(found.tokens[:6], [1, 50, 30, 60, 61, 0])
    np.testing.assert_array_equal(found.round_end, [2, -1])
    np.testing.assert_array_equal(found.latent_start, [-1, -1])
    np.testing.assert_array_equal(found.round_crop, [-1, -1])
    assert found.crop_kind[0] == NO_CROP and not found.crop_text_mask.any() and not found.crops.any()


def test_text_only_row_of_the_released_weights():
    spec = dataclasses.replace(SPEC, zero_image_for_text=True, quadrants=4)
    found = row(make([1, 20, L, 21, 50, 30, 60], [X, X, X, X, X, A, 60]), spec)
    np.testing.assert_array_equal(found.visual_index[:9], [-1, -1, 4, 5, 6, -1, -1, -1, -1])
    assert found.crop_kind[0] == ZERO_IMAGE and not found.crop_text_mask.any()
    np.testing.assert_array_equal(found.latent_start, [2, -1])
    np.testing.assert_array_equal(found.round_crop, [0, -1])
    np.testing.assert_array_equal(found.round_end, [7, -1])


def test_row_without_latents():
    spec = dataclasses.replace(SPEC, rounds=0)
    found = row(make([1, I, 50, 30, 60, 51, 30, 61], [X, X, X, A, 60, X, A, 61], (1, 50), CROPS[-1:]), spec, latents=0)
    np.testing.assert_array_equal(found.visual_index[:11], [-1, 0, 1, 2, 3, -1, -1, -1, -1, -1, -1])
    np.testing.assert_array_equal(np.flatnonzero(found.loss_weights), [6, 9])
    assert found.round_end.shape == found.latent_start.shape == found.round_crop.shape == (0,)
    assert found.latent_count == 0


def test_prompt_ends_with_the_last_round():
    found = row(make([1, L, I, 50, 30], None, (1, 50), CROPS[-1:]))
    assert not found.loss_weights.any() and not found.targets.any()
    np.testing.assert_array_equal(found.round_end, [9, -1])


def test_quadrants_keep_their_order_and_the_whole_image_is_last():
    found = row(make(TWO_ROUNDS_IDS, TWO_ROUNDS_LABELS, (1,), CROPS), dataclasses.replace(SPEC, quadrants=4))
    np.testing.assert_array_equal(found.quadrants[0], CROPS[:4])
    np.testing.assert_array_equal(found.crops[0], CROPS[4])


def test_question_id_zero_counts_as_padding_only_where_asked():
    question = make(TWO_ROUNDS_IDS, TWO_ROUNDS_LABELS, (1, 0, 52), CROPS[-1:])
    np.testing.assert_array_equal(row(question).crop_text_mask, [[True, True, True, False]])
    hidden = row(question, dataclasses.replace(SPEC, hide_question_id_zero=True))
    np.testing.assert_array_equal(hidden.crop_text_mask, [[True, False, True, False]])


def test_without_text_guidance_there_is_no_question():
    found = row(
        make(TWO_ROUNDS_IDS, TWO_ROUNDS_LABELS, (1, 50), CROPS[-1:]), dataclasses.replace(SPEC, question_length=0)
    )
    assert found.crop_text.shape == found.crop_text_mask.shape == (1, 0)


def test_rows_do_not_touch_each_other():
    image, text = make(TWO_ROUNDS_IDS, TWO_ROUNDS_LABELS, (1,), CROPS[-1:]), make([1, 50, 30, 60], [X, X, A, 60])
    batch = lay_out([text, image, text], SPEC, 3)
    for i, e in enumerate((text, image, text)):
        alone = lay_out([e], SPEC, 3)
        for name, value in vars(batch).items():
            if name != "latent_count":
                np.testing.assert_array_equal(value[i], getattr(alone, name)[0], err_msg=name)


def test_dtypes_are_those_of_the_contract():
    batch = lay_out([make(TWO_ROUNDS_IDS, TWO_ROUNDS_LABELS, (1,), CROPS[-1:])], SPEC, 3)
    special = {"loss_weights": "float32", "crops": "uint8", "quadrants": "uint8", "crop_text_mask": "bool"}
    for name, value in vars(batch).items():
        if name != "latent_count":
            assert value.dtype == special.get(name, "int32"), name


def test_latent_count_is_static():
    batch = lay_out([make([1, 50, 30, 60], [X, X, A, 60])], SPEC, 3)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batch)) and len(jax.tree.leaves(batch)) == 15
    assert jax.tree.structure(batch) != jax.tree.structure(dataclasses.replace(batch, latent_count=4))


# Several images.

TWO_IMAGES = np.arange(2 * 5 * 2 * 2 * 3, dtype=np.uint8).reshape(2, 5, 2, 2, 3)
TWO = dataclasses.replace(SPEC, crops=3, images=3, quadrants=4, rounds=3)
#                    s  I  v   I  L  q   e   a   v   L  q   e   a
LEADING_IMAGES_IDS = [1, I, 40, I, L, 50, 30, 60, 41, L, 51, 30, 61]
LEADING_IMAGES_LABELS = [X, X, X, X, X, X, A, 60, X, X, X, A, 61]


def test_several_images_stay_where_they_stand():
    found = row(make(LEADING_IMAGES_IDS, LEADING_IMAGES_LABELS, (1, 50, 51), TWO_IMAGES), TWO)
    # position 0 1..4          5   6..9        10..12        13  14  15  16  17..19        20  21  22
    visual = [-1, 0, 1, 2, 3, -1, 4, 5, 6, 7, 12, 13, 14, -1, -1, -1, -1, 15, 16, 17, -1, -1, -1]
    np.testing.assert_array_equal(found.visual_index[:23], visual)
    np.testing.assert_array_equal(found.latent_start, [10, 17, -1])
    np.testing.assert_array_equal(found.round_end, [14, 21, -1])
    np.testing.assert_array_equal(found.round_crop, [1, 1, -1])
    np.testing.assert_array_equal(found.crop_kind, [PIXELS, PIXELS, NO_CROP])
    np.testing.assert_array_equal(found.crops[:2], TWO_IMAGES[:, 4])
    np.testing.assert_array_equal(found.quadrants[:2], TWO_IMAGES[:, :4])
    assert not found.crops[2].any() and not found.quadrants[2].any()
    # The questions guide every image.
    np.testing.assert_array_equal(found.crop_text, [[1, 50, 51, 0]] * 2 + [[0] * 4])
    np.testing.assert_array_equal(found.crop_text_mask, [[True, True, True, False]] * 2 + [[False] * 4])


def test_rounds_look_at_the_latest_image():
    #      s  L  q   e   a   L  q   I  q   e   a   L  I  q   e   a
    ids = [1, L, 50, 30, 60, L, 51, I, 52, 30, 61, L, I, 53, 30, 62]
    labels = [X, X, X, A, 60, X, X, X, X, A, 61, X, X, X, A, 62]
    found = row(make(ids, labels, (1,), TWO_IMAGES), dataclasses.replace(TWO, crops=2))
    # No image yet: the first. The latents keep their place although an image follows at once.
    np.testing.assert_array_equal(found.round_crop, [0, 0, 1])
    np.testing.assert_array_equal(found.latent_start, [1, 7, 18])
    assert found.visual_index[18] == 2 * 4 + 2 * 3 and found.visual_index[21] == 4


def test_one_image_may_come_with_or_without_its_axis():
    a, b = (row(make(TWO_ROUNDS_IDS, TWO_ROUNDS_LABELS, (1,), crops)) for crops in (CROPS, CROPS[None]))
    for name, value in vars(a).items():
        np.testing.assert_array_equal(value, getattr(b, name), err_msg=name)


# Several examples in a row.


def test_packed_row():
    image = make([1, L, I, 50, 30, 60], [X, X, X, X, A, 60], (1, 50), CROPS)
    text = make([1, 51, 30, 61], [X, X, A, 61])
    several = make(LEADING_IMAGES_IDS, LEADING_IMAGES_LABELS, (1, 50, 51), TWO_IMAGES)
    found = jax.tree.map(lambda a: a[0], lay_out_rows([[image, text, several]], TWO, 3))
    rest = [0] * 2
    np.testing.assert_array_equal(found.segment_ids, [1] * 11 + [2] * 4 + [3] * 23 + rest)
    np.testing.assert_array_equal(found.positions, [*range(11), *range(4), *range(23), *rest])
    first = [-1, 0, 1, 2, 3, 12, 13, 14, -1, -1, -1]
    third = [-1, 4, 5, 6, 7, -1, 8, 9, 10, 11, 15, 16, 17, -1, -1, -1, -1, 18, 19, 20, -1, -1, -1]
    np.testing.assert_array_equal(found.visual_index, first + [-1] * 4 + third + [-1, -1])
    np.testing.assert_array_equal(found.latent_start, [5, 25, 32])
    np.testing.assert_array_equal(found.round_end, [9, 29, 36])
    np.testing.assert_array_equal(found.round_crop, [0, 2, 2])
    expected = {9: 60, 13: 61, 29: 60, 36: 61}
    np.testing.assert_array_equal(np.flatnonzero(found.loss_weights), list(expected))
    np.testing.assert_array_equal(found.targets, [expected.get(i, 0) for i in range(40)])
    np.testing.assert_array_equal(found.tokens[11:15], [1, 51, 30, 61])
    np.testing.assert_array_equal(found.crop_kind, [PIXELS] * 3)
    np.testing.assert_array_equal(found.crops, [CROPS[4], *TWO_IMAGES[:, 4]])
    np.testing.assert_array_equal(found.quadrants, [CROPS[:4], *TWO_IMAGES[:, :4]])
    np.testing.assert_array_equal(found.crop_text, [[1, 50, 0, 0], [1, 50, 51, 0], [1, 50, 51, 0]])


def test_packed_text_has_a_zero_image_each_only_for_the_released_weights():
    text = make([1, L, 50, 30, 60], [X, X, X, A, 60])
    spec = dataclasses.replace(SPEC, zero_image_for_text=True, crops=2)
    found = jax.tree.map(lambda a: a[0], lay_out_rows([[text, text]], spec, 3))
    np.testing.assert_array_equal(found.crop_kind, [ZERO_IMAGE] * 2)
    np.testing.assert_array_equal(found.round_crop, [0, 1])
    plain = make([1, 50, 30, 60], [X, X, A, 60])
    found = jax.tree.map(lambda a: a[0], lay_out_rows([[plain] * 10], dataclasses.replace(SPEC, crops=0), 3))
    assert found.crop_kind.shape == (0,) and found.segment_ids.max() == 10
    assert (found.round_end == -1).all() and (found.latent_start == -1).all()


def test_an_empty_row_is_padding():
    batch = lay_out_rows([[make([1, 50, 30, 60], [X, X, A, 60])], []], SPEC, 3)
    for name, value in vars(batch).items():
        if name != "latent_count":
            free = -1 if name in ("visual_index", "round_crop", "round_end", "latent_start", "windows") else 0
            assert value.shape[0] == 2 and (value[1] == free).all(), name


def test_nothing_predicts_the_first_token_of_an_example():
    odd = make([60, 30, 61], [60, A, 61])
    batch = lay_out_rows([[odd, odd]], SPEC, 3)
    np.testing.assert_array_equal(np.flatnonzero(batch.loss_weights[0]), [1, 4])


@pytest.mark.parametrize("changes", [{"length": 53}, {"crops": 1}, {"rounds": 3}])
def test_a_row_too_small_for_its_examples_is_refused(changes):
    spec = dataclasses.replace(SPEC, length=54, crops=2, rounds=4)
    e = make(TWO_ROUNDS_IDS, TWO_ROUNDS_LABELS, (1,), CROPS[-1:])
    assert lay_out_rows([[e, e]], spec, 3).segment_ids.min() == 1
    with pytest.raises(ValueError, match="no room"):
        lay_out_rows([[e, e]], dataclasses.replace(spec, **changes), 3)


@pytest.mark.parametrize(
    ("ids", "crops"), [([1, I, I, 50], CROPS), ([1, 50, 30], CROPS), ([1, I], None), ([1, L], None)]
)
def test_crops_must_be_those_of_the_placeholders(ids, crops):
    with pytest.raises(ValueError, match="record 3"):
        lay_out([make(ids, None, (), crops)], dataclasses.replace(SPEC, crops=2), 3)


# What does not fit.


def test_what_an_example_takes():
    example = make(LEADING_IMAGES_IDS, LEADING_IMAGES_LABELS, (), TWO_IMAGES)
    assert measure(example, TWO, 3, number=7) == Measured(7, 23, 2, 2) and example.images == 2
    text = make([1, L, 50, 30], None)
    assert measure(text, SPEC, 3).crops == 0
    assert measure(text, dataclasses.replace(SPEC, zero_image_for_text=True), 3).crops == 1 and text.images == 0


def test_too_many_images_are_a_bad_record():
    e = make(LEADING_IMAGES_IDS, LEADING_IMAGES_LABELS, (), TWO_IMAGES)
    check_fits(e, dataclasses.replace(SPEC, images=2), 3)
    with pytest.raises(BadRecord, match="has 2 images; max_images is 1") as error:
        check_fits(e, SPEC, 3)
    assert error.value.reason == "too_many_images"


def test_length_counts_visual_tokens():
    e = make(TWO_ROUNDS_IDS, TWO_ROUNDS_LABELS, (1,), CROPS[-1:])
    assert measure(e, SPEC, 3).length == 27 and measure(e, SPEC, 16).length == 27 + 2 * 13
    check_fits(e, dataclasses.replace(SPEC, length=27), 3)
    lay_out([e], dataclasses.replace(SPEC, length=27), 3)


@pytest.mark.parametrize(
    ("changes", "question", "reason", "words"),
    [
        ({"length": 26}, (1,), "too_long", ("27", "max_length is 26")),
        ({}, (1, 2, 3, 4, 5), "question_too_long", ("5 question tokens", "max_question_length is 4")),
        ({"rounds": 1}, (1,), "too_many_rounds", ("2 rounds", "max_rounds is 1")),
    ],
)
def test_what_does_not_fit_is_a_bad_record(changes, question, reason, words):
    e = make(TWO_ROUNDS_IDS, TWO_ROUNDS_LABELS, question, CROPS[-1:])
    check_fits(dataclasses.replace(e, question_ids=e.question_ids[:1]), SPEC, 3)
    with pytest.raises(BadRecord) as error:
        check_fits(e, dataclasses.replace(SPEC, **changes), 3)
    assert error.value.reason == reason and error.value.where == "data.json, record 3"
    for word in ("data.json, record 3", *words):
        assert word in str(error.value)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_spec_follows_the_model(preset):
    config = tiny(preset)
    spec = layout_spec(config, 50, QUESTION_LENGTH, 3)
    assert (spec.length, spec.question_length, spec.rounds) == (50, QUESTION_LENGTH, 3)
    assert (spec.image_tokens, spec.image_size) == (9, 24)
    released = preset == "released"
    assert spec.quadrants == 4 * released
    assert spec.zero_image_for_text == spec.hide_question_id_zero == released
    off = layout_spec(tiny(preset, text_guided=False, semantic_exchange=False, image_tokens=4), 50, 6, 3)
    assert (off.question_length, off.rounds, off.quadrants, off.image_tokens) == (0, 0, 0, 4)
    check_fits(example(config, 0), spec, 4)
