"""Generation: padding on either side, mixed batches, sampling, streaming, stop texts, several devices."""

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_run
from helpers.fixtures import example, lay, params, tiny
from helpers.generation import MIXED, answerer, config, make_tokenizer, weights

from fusion_jax.data.conversation import TEMPLATES
from fusion_jax.data.sources import Record
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.inference import generate, sampling
from fusion_jax.inference.decoding import decode, first_state
from fusion_jax.inference.prompts import Buckets, Prompts, Steps, drawn_latents
from fusion_jax.inference.sampling import Sampling
from fusion_jax.inference.streaming import TextStream
from fusion_jax.models.fusion import Fusion

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("t"))


def padded_left(batch):
    """The same prompts with their padding in front."""
    moved = {}
    free = np.asarray((batch.segment_ids == 0).sum(1))
    for name in ("tokens", "segment_ids", "positions", "visual_index"):
        array = np.asarray(getattr(batch, name))
        moved[name] = np.stack([np.roll(row, n) for row, n in zip(array, free)])
    for name in ("round_end", "latent_start"):
        array = np.asarray(getattr(batch, name))
        moved[name] = np.where(array >= 0, array + free[:, None], -1)
    return dataclasses.replace(batch, **moved)


def test_padding_on_either_side_gives_the_same_answers():
    prompts = []
    for seed, question in ((0, 5), (1, 2)):
        e = example(tiny(), seed, question=question, answer=1)
        prompts.append(type(e)(e.input_ids[:-1], None, e.question_ids, e.crops))
    batch = lay(tiny(), prompts, rounds=1)
    assert (batch.segment_ids == 0).any()
    right, left = (
        generate.greedy(Fusion(tiny()), params(tiny()), b, 3, (), keep_logits=True) for b in (batch, padded_left(batch))
    )
    np.testing.assert_array_equal(left.tokens, right.tokens)
    np.testing.assert_allclose(left.logits, right.logits, atol=1e-4)


def test_a_mixed_batch_equals_one_by_one(tokenizer):
    together = answerer(tokenizer, rows=5, max_tokens=6).answer(MIXED)
    alone = answerer(tokenizer, rows=1, max_tokens=6)
    assert together == [alone.answer([prompt])[0] for prompt in MIXED]
    assert len(set(together)) > 1


def test_empty_rows_fill_a_batch_up_and_change_nothing(tokenizer):
    filled, full = answerer(tokenizer, rows=6, max_tokens=6), answerer(tokenizer, rows=4, max_tokens=6)
    for how in (None, Sampling(max_tokens=6, temperature=1.0, seed=3)):
        assert filled.answer(MIXED[:4], how) == full.answer(MIXED[:4], how)
    assert "".join(filled.stream(MIXED[0])) == full.answer(MIXED[:1])[0]


def test_empty_rows_are_done_before_they_begin(tokenizer):
    prompts = answerer(tokenizer).prompts
    batch = prompts.batch([prompts.example(prompt) for prompt in MIXED[:1]], 3)
    state = first_state(Fusion(tiny_run.MODEL), weights(), batch, [Sampling(max_tokens=2)])
    assert state.done.tolist() == [False, True, True] and state.positions.tolist()[1:] == [1, 1]
    assert np.isfinite(state.logits).all() and np.isfinite(state.cache.values).all()
    _, kept, state = decode(Fusion(tiny_run.MODEL), weights(), state, 9, (), False, True)
    assert state.length.tolist() == [2, 0, 0]
    assert kept[:, :2].any() and not kept[:, 2:].any(), "went on although every row was done"


def test_streamed_pieces_are_the_answer(tokenizer):
    one = answerer(tokenizer, rows=1, max_tokens=12)
    pieces = list(one.stream(MIXED[0]))
    assert len(pieces) > 1
    assert "".join(pieces) == one.answer([MIXED[0]])[0]


def test_a_draw_depends_on_its_seed_and_not_on_its_neighbours(tokenizer):
    how = Sampling(max_tokens=6, temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.1, seed=7)
    three, one = answerer(tokenizer, rows=3), answerer(tokenizer, rows=1)
    together = three.answer([MIXED[0], MIXED[3], MIXED[0]], how)
    assert together[0] == together[2] == one.answer([MIXED[0]], how)[0]
    assert one.answer([MIXED[0]], dataclasses.replace(how, seed=8))[0] != together[0]


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(tokenizer):
    one = answerer(tokenizer, rows=1, max_tokens=12)
    whole = one.answer([MIXED[0]])[0]
    stop = whole[4:6]
    assert one.answer([MIXED[0]], Sampling(max_tokens=12, stop=(stop,)))[0] == whole[: whole.index(stop)].rstrip()


def test_latent_counts_are_chosen_drawn_or_refused(tokenizer):
    assert drawn_latents(tiny_run.MODEL, 3) == drawn_latents(tiny_run.MODEL, 3)
    assert {drawn_latents(tiny_run.MODEL, seed) for seed in range(20)} == set(tiny_run.MODEL.latent_counts)
    prompts = answerer(tokenizer, latents=1).prompts
    assert prompts.batch([prompts.example(MIXED[0])]).latent_count == 1
    with pytest.raises(UserError, match="allowed: 1, 4"):
        answerer(tokenizer, latents=9)


def test_buckets_are_the_only_shapes_and_nothing_is_cut(tokenizer):
    buckets = Buckets(lengths=(64, 144), questions=(48,), rounds=(2,), images=(0, 1))
    prompts = Prompts(config(), tokenizer, buckets)
    shapes = {(b.tokens.shape, b.crops.shape[1]) for b in (prompts.batch([prompts.example(m)]) for m in MIXED[:2])}
    assert all(tokens[1] in buckets.lengths and crops in (0, 1) for tokens, crops in shapes)
    with pytest.raises(BadRecord, match="max_images is 1"):
        prompts.example(MIXED[2])
    with pytest.raises(BadRecord, match="max_length is 144"):
        prompts.example(Record("long", None, [{"from": "human", "value": "far too long " * 80}], "prompt"))


@pytest.mark.parametrize("place", [True, False])
def test_a_callers_system_text_has_the_templates_place_or_joins_the_first_question(tokenizer, monkeypatch, place):
    template = dataclasses.replace(TEMPLATES["phi3"], system_frame=("S: ", ".\n") if place else None)
    monkeypatch.setitem(TEMPLATES, "phi3", template)
    prompts = Prompts(config(), tokenizer, Steps())
    turns = [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": "Describe it."}]
    system_record = Record("0", None, turns, "prompt", literal=True, system="A blue <image>")
    ids = prompts.example(system_record).input_ids
    decoded = tokenizer.decode(ids[ids >= 0], skip_special=False)
    assert ("S: A blue <image>.\n" in decoded) == place
    assert ("A blue <image>\n\nDescribe it." in decoded) != place
    assert (template.default_system in decoded) != place
    with pytest.raises(BadRecord, match="no place for a system text") if not place else contextlib.nullcontext():
        prompts.example(dataclasses.replace(system_record, literal=False))  # a data set's is no part of a question


def test_a_callers_system_text_counts_among_the_texts(tokenizer):
    buckets = Buckets(lengths=(64,), questions=(48,))
    system_record = Record(
        "0", None, [{"from": "human", "value": "Hi"}], "prompt", literal=True, system="far too long " * 9999
    )
    with pytest.raises(BadRecord, match="the texts have 129989 bytes, and no prompt has over"):
        Prompts(config(), tokenizer, buckets).example(system_record)


def test_bfloat16_answers(tokenizer):
    answers = answerer(tokenizer, rows=2, max_tokens=4, dtype=jnp.bfloat16).answer(MIXED[:2])
    assert all(isinstance(answer, str) for answer in answers) and any(answers)


def test_importing_generation_loads_neither_grain_nor_orbax():
    script = "import sys, fusion_jax.inference.generate; print({'grain', 'orbax'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Choosing a token.


def chosen(logits, draws=400, seen=None, **how):
    """Tokens drawn with seeds 0, 1, ..."""
    rows = sampling.settings([Sampling(seed=seed, **how) for seed in range(draws)])
    logits = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, len(logits)))
    seen = jnp.zeros(logits.shape, bool) if seen is None else jnp.broadcast_to(jnp.asarray(seen), logits.shape)
    return np.asarray(jax.jit(sampling.choose)(logits, rows, seen, jnp.zeros(draws, jnp.int32)))


LOGITS = np.log([0.1, 0.5, 0.15, 0.25])


def test_draws_follow_the_probabilities():
    counts = np.bincount(chosen(LOGITS, 4000, temperature=1.0), minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.1, 0.5, 0.15, 0.25], atol=0.03)
    hot = np.bincount(chosen(LOGITS, 4000, temperature=0.5), minlength=4) / 4000
    squared = np.array([0.1, 0.5, 0.15, 0.25]) ** 2
    np.testing.assert_allclose(hot, squared / squared.sum(), atol=0.03)


def test_top_k_and_top_p_keep_the_likeliest():
    assert set(chosen(LOGITS, temperature=1.0, top_k=2)) == {1, 3}
    assert set(chosen(LOGITS, temperature=1.0, top_k=9)) == {0, 1, 2, 3}
    assert set(chosen(LOGITS, temperature=1.0, top_p=0.5)) == {1}
    assert set(chosen(LOGITS, temperature=1.0, top_p=0.8)) == {1, 2, 3}
    assert set(chosen(LOGITS, temperature=1.0, top_k=2, top_p=0.6)) == {1}  # 0.5 of 0.75 is two thirds
    assert set(chosen(LOGITS, temperature=0.0)) == {1}


@pytest.mark.parametrize("top_p", [1e-320, 1e-46, 1e-39, 5e-324])
def test_the_likeliest_stays_however_small_top_p_is(top_p):
    assert set(chosen(LOGITS, temperature=1.0, top_p=top_p)) == {1}


@pytest.mark.parametrize("temperature", [1e-320, 1e-46, 1e-39, 1e-37, 1e-7, 1e-6])
@pytest.mark.parametrize("more", [{}, {"top_p": 0.5}, {"top_k": 2}, {"repetition_penalty": 0.01}])
def test_the_likeliest_is_taken_however_low_the_temperature_is(temperature, more):
    logits = LOGITS - 5  # of both signs, or all below 0
    for shift in (0.0, 200.0, -200.0):
        assert set(chosen(logits + shift, temperature=temperature, **more)) == {1}


def test_the_penalty_falls_on_what_was_seen_whatever_its_sign():
    seen = [False, True, False, False]
    assert set(chosen([1.0, 2.0, 1.5, 0.0], seen=seen, repetition_penalty=2.0)) == {2}
    assert set(chosen([-1.0, -0.8, -0.9, -2.0], seen=seen, repetition_penalty=2.0)) == {2}


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"repetition_penalty": 0}]
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


# Text as it comes.


def test_half_a_character_is_never_shown(tokenizer):
    ids = tokenizer.encode("Ünï 猫!")
    stream = TextStream(tokenizer, (), (), 100)
    pieces = [stream.add([token]) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces) and "" in pieces
    assert "".join(pieces) == "Ünï 猫!"


def test_the_beginning_of_a_stop_text_is_held_back(tokenizer):
    stream = TextStream(tokenizer, (), ("circle!",), 100)
    shown = "".join(stream.add([token]) for token in tokenizer.encode("a circle? a circle! more"))
    assert shown == stream.text == "a circle? a" and stream.finish == "stop"
    ended = TextStream(tokenizer, (5,), ("circle!",), 100)
    assert ended.add([*tokenizer.encode("a circ"), 5, 9]) == "a circ" and ended.finish == "stop"
    full = TextStream(tokenizer, (), (), 3)
    full.add(tokenizer.encode("a circle and a star"))
    assert full.finish == "length" and full.length == 3


@pytest.mark.slow
def test_a_model_over_eight_devices_gives_the_same_answers(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "generate_on_mesh.py"), str(tmp_path / "tokenizer")],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = answerer(tokenizer, rows=4, max_tokens=6).answer(MIXED)
    assert len(set(expected)) > 1 and eval(done.stdout) == expected
