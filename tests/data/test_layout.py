"""Rows drawn by hand: where image, latents, text, targets and round marks land, and what does not fit."""

import dataclasses

import jax
import numpy as np
import pytest
from fixtures import QUESTION_LENGTH, example, tiny

from fusion_jax.data.conversation import ANSWER_START, IGNORE, IMAGE, LATENTS
from fusion_jax.data.layout import (
    NO_CROP,
    PIXELS,
    ZERO_IMAGE,
    Example,
    LayoutSpec,
    check_fits,
    laid_out_length,
    lay_out,
)
from fusion_jax.data.pipeline import layout_spec
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
    np.testing.assert_array_equal(found.round_image, [0, 0])
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
    np.testing.assert_array_equal(found.round_image, [-1, -1])
    assert found.crop_kind[0] == NO_CROP and not found.crop_text_mask.any() and not found.crops.any()


def test_text_only_row_of_the_released_weights():
    spec = dataclasses.replace(SPEC, zero_image_for_text=True, quadrants=4)
    found = row(make([1, 20, L, 21, 50, 30, 60], [X, X, X, X, X, A, 60]), spec)
    np.testing.assert_array_equal(found.visual_index[:9], [-1, -1, 4, 5, 6, -1, -1, -1, -1])
    assert found.crop_kind[0] == ZERO_IMAGE and not found.crop_text_mask.any()
    np.testing.assert_array_equal(found.latent_start, [2, -1])
    np.testing.assert_array_equal(found.round_image, [0, -1])
    np.testing.assert_array_equal(found.round_end, [7, -1])


def test_row_without_latents():
    spec = dataclasses.replace(SPEC, rounds=0)
    found = row(make([1, I, 50, 30, 60, 51, 30, 61], [X, X, X, A, 60, X, A, 61], (1, 50), CROPS[-1:]), spec, latents=0)
    np.testing.assert_array_equal(found.visual_index[:11], [-1, 0, 1, 2, 3, -1, -1, -1, -1, -1, -1])
    np.testing.assert_array_equal(np.flatnonzero(found.loss_weights), [6, 9])
    assert found.round_end.shape == found.latent_start.shape == found.round_image.shape == (0,)
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
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batch)) and len(jax.tree.leaves(batch)) == 14
    assert jax.tree.structure(batch) != jax.tree.structure(dataclasses.replace(batch, latent_count=4))


# What does not fit.


def test_length_counts_visual_tokens():
    e = make(TWO_ROUNDS_IDS, TWO_ROUNDS_LABELS, (1,), CROPS[-1:])
    assert laid_out_length(e, SPEC, 3) == 27 and laid_out_length(e, SPEC, 16) == 27 + 2 * 13
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
