"""Best-fit packing: what goes where and how full rows become; packed examples lose and learn as they do alone."""

import dataclasses
import functools
import time

import jax
import numpy as np
import pytest
from helpers.fixtures import QUESTION_LENGTH, assert_trees_close, params, tiny

from fusion_jax.batch import NO_CROP
from fusion_jax.data import packing
from fusion_jax.data.conversation import ANSWER_START, IGNORE, IMAGE, LATENTS
from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import Example, lay_out, lay_out_rows, measure
from fusion_jax.models.config import QUADRANTS, RopeConfig
from fusion_jax.models.fusion import Fusion, head_kernel
from fusion_jax.training import losses
from fusion_jax.training.step import losses_of

# Which row.


def test_the_example_of_the_docstring():
    assert packing.best_fit([7, 5, 4, 3, 3, 2], 8) == [[0], [1, 3], [2, 4], [5]]


@pytest.mark.parametrize(
    ("lengths", "capacity", "rows"),
    [
        ([], 8, []),
        ([8], 8, [[0]]),
        ([8, 8], 8, [[0], [1]]),
        ([1] * 8, 8, [list(range(8))]),
        ([2, 6], 8, [[0, 1]]),
        ([3, 5, 6, 2], 8, [[0, 1], [2, 3]]),  # not [3 2], which is what comes first
        (np.array([3, 5]), 8, [[0, 1]]),
    ],
)
def test_small_packings(lengths, capacity, rows):
    assert packing.best_fit(lengths, capacity) == rows


def test_every_index_once_within_the_capacity_and_always_the_same():
    rng = np.random.default_rng(0)
    for capacity in (1, 7, 64):
        lengths = rng.integers(1, capacity + 1, 300)
        rows = packing.best_fit(lengths, capacity)
        assert sorted(i for row in rows for i in row) == list(range(300))
        assert all(lengths[row].sum() <= capacity for row in rows)
        assert rows == packing.best_fit(lengths.tolist(), capacity)
        assert all(row == sorted(row) for row in rows) and rows == sorted(rows)
        # No row could have been poured into another: at most one is not more than half full.
        assert sum(2 * lengths[row].sum() <= capacity for row in rows) <= 1


def test_other_capacities_hold_too():
    rng = np.random.default_rng(1)
    lengths, images, rounds = rng.integers(1, 20, 400), rng.integers(0, 3, 400), rng.integers(0, 4, 400)
    rows = packing.best_fit(lengths, 64, [(images, 3), (rounds, 5)])
    assert sorted(i for row in rows for i in row) == list(range(400))
    for sizes, limit in ((lengths, 64), (images, 3), (rounds, 5)):
        assert max(sizes[row].sum() for row in rows) <= limit
    assert len(rows) > len(packing.best_fit(lengths, 64))
    # A row that is closed for one kind of example stays open for another.
    assert packing.best_fit([6, 5, 5], 16, [([1, 1, 0], 1)]) == [[0, 2], [1]]


def test_full_rows_go_first_but_the_oldest_example_never_waits():
    lengths, rows = [1, 2, 100, 95, 94, 99], [[0], [1], [2], [3], [4], [5]]
    assert packing.preferred(rows, lengths, 100) == [[0], [2], [3], [5], [1], [4]]
    assert packing.preferred([], [], 100) == []


def test_packing_from_a_stream_stays_full():
    """As the pipeline does it: four batches wait, l^2 changes at every step."""
    lengths = iter(packing.length_mix(12_000, 5, window=128).tolist())
    waiting, used, steps = [], 0, 60
    for _ in range(steps):
        waiting += [next(lengths) for _ in range(512 - len(waiting))]
        rows = packing.preferred(packing.best_fit(waiting, 4096), waiting, 4096)[:32]
        taken = {i for row in rows for i in row}
        used += sum(waiting[i] for i in taken)
        waiting = [length for i, length in enumerate(waiting) if i not in taken]
    assert used / (steps * 32 * 4096) >= 0.98


def test_what_fits_no_row_is_refused():
    with pytest.raises(ValueError, match="example 1 has size 9; a row holds 8"):
        packing.best_fit([8, 9], 8)
    with pytest.raises(ValueError, match="example 0 has size 3; a row holds 2"):
        packing.best_fit([1, 1], 8, [([3, 0], 2)])


# How full.


def test_the_length_mix():
    lengths = packing.length_mix(20_000, 3)
    assert lengths.shape == (20_000,) and np.array_equal(lengths, packing.length_mix(20_000, 3))
    assert not np.array_equal(lengths, packing.length_mix(20_000, 4))
    assert lengths.min() >= 15 and lengths.max() <= 4096
    assert 0.08 < (lengths < 576).mean() < 0.1  # text only, but for those of many rounds
    # By hand: 0.9 x 576 of image; 2.125 rounds of 35 + 127 tokens and, in 0.9 of them, 52.8 latents.
    assert abs(packing.length_mix(20_000, 3, window=1).mean() - (518.4 + 2.125 * (35 + 127 + 47.5))) < 30
    assert packing.length_mix(5000, 3, longest=1200).max() <= 1280  # a first round is never cut


def test_packing_fills_rows_where_padding_does_not(capsys):
    found = packing.measure(20_000)
    with capsys.disabled():
        print({name: round(value, 4) for name, value in found.items()})
    assert found["packing_efficiency"] >= 0.93
    assert found["padding_efficiency"] < 0.6


def test_efficiencies_by_hand():
    assert packing.efficiency([[0, 1], [2]], [3, 4, 5], 8) == 12 / 16
    assert packing.padding_efficiency([3, 4, 5], 2) == 12 / (4 + 4 + 5)


def test_a_hundred_thousand_lengths_take_seconds_at_most():
    lengths = packing.length_mix(100_000, 0)
    start = time.perf_counter()
    rows = packing.best_fit(lengths, 4096)
    assert time.perf_counter() - start < 5
    assert packing.efficiency(rows, lengths, 4096) > 0.95


# The model: packed against unpacked.


def drawn(config, seed: int, picture: str) -> Example:
    """An example by its drawing: `t` text, `i` image, `l` latents, `a` answer; random ids and pixels."""
    rng = np.random.default_rng(seed)
    picture = picture if config.semantic_exchange else picture.replace("l", "")
    ids = rng.integers(3, config.llm.vocab_size, len(picture)).astype(np.int32)
    labels = np.full(len(ids), IGNORE, np.int32)
    for i, kind in enumerate(picture):
        if kind == "a":
            labels[i] = ids[i]
            if picture[i - 1] != "a":
                labels[i - 1] = ANSWER_START
    for kind, marker in (("i", IMAGE), ("l", LATENTS)):
        ids[[i for i, what in enumerate(picture) if what == kind]] = marker
    images, side = picture.count("i"), config.vision.image_size
    crops = rng.integers(0, 256, (images, QUADRANTS + 1 if config.uses_quadrants else 1, side, side, 3))
    question = rng.integers(3, config.llm.vocab_size, QUESTION_LENGTH - seed % 3).astype(np.int32)
    return Example(ids, labels, question if images else question[:0], crops.astype(np.uint8) if images else None)


def examples_of(config) -> list[Example]:
    latents = "l" if config.text_only == "zero_image" else ""
    return [
        drawn(config, 0, "ttlittaaa"),
        drawn(config, 1, "titilttaatltaaa"),  # two images, then a round without any
        drawn(config, 2, f"t{latents}ttaaat{latents}ttaa"),  # text only
        drawn(config, 3, "tltitttaatiltaaatltitaa"),  # three images in three rounds
        drawn(config, 4, "tltaatlitaatlttaaa"),  # its only image comes with the second round
        drawn(config, 5, f"t{latents}ttta"),
    ]


PACKED = [[0, 1, 2], [3, 5], [], [4]]
# Rows of 128 take the other attention kernel on CPU. Some examples pass LongRoPE's border, others do not.
LENGTH = 128
LONGROPE = RopeConfig("longrope", original_length=40, max_length=160, short_factors=(1.0, 2.0), long_factors=(3.0, 9.0))
CASES = {
    "paper": {},
    "released": {"llm.rope": LONGROPE},
    "without exchange": {"semantic_exchange": False},
}


def config_of(case: str):
    return tiny(case if case in ("paper", "released") else "paper", **CASES[case])


@functools.cache
def run_fn(config):
    """Compiled (params, batch) -> ((loss, (parts, hidden, visual)), gradients)."""
    model = Fusion(config)

    def loss(p, batch):
        hidden, visual, _ = model.apply({"params": p}, batch)
        total, parts = losses_of(model, p, batch, hidden, visual)
        return total, (parts, hidden, visual)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def losses_by_example(config, rows, batch, hidden, visual, spec) -> dict[int, np.ndarray]:
    """Sums of (ce, v2t, t2v) of each example, by its number; `rows` says which lie where."""
    kernel = np.asarray(head_kernel(config, params(config)), np.float64)[:, : config.llm.vocab_size]
    logits = np.asarray(hidden, np.float64) @ kernel
    ce = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    v2t = distance(visual.question, visual.question_features) * batch.crop_text_mask
    t2v = distance(visual.patches, visual.patch_features)
    found = {}
    for r, row in enumerate(rows):
        slot = 0
        for number, example in enumerate(row, 1):
            weights = batch.loss_weights[r] * (batch.segment_ids[r] == number)
            assert weights.sum() >= 1
            mine = slice(slot, slot + measure(examples_of(config)[example], spec, batch.latent_count).crops)
            slot = mine.stop
            found[example] = np.array([(ce[r] * weights).sum(), v2t[r, mine].sum(), t2v[r, mine].sum()])
        assert (batch.crop_kind[r, slot:] == NO_CROP).all()
    return found


def distance(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return 1 - (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


@pytest.mark.parametrize("case", CASES)
def test_packed_losses_and_gradients_are_those_of_the_examples_alone(case):
    config = config_of(case)
    examples, count = examples_of(config), config.latent_counts[0] if config.semantic_exchange else 0
    narrow = dataclasses.replace(layout_spec(config, 80, QUESTION_LENGTH, 3), crops=3)
    wide = dataclasses.replace(layout_spec(config, LENGTH, QUESTION_LENGTH, 7), crops=5)
    alone = [[i] for i in range(len(examples))]
    results = []
    for rows, spec in ((alone, narrow), (PACKED, wide)):
        batch = lay_out_rows([[examples[i] for i in row] for row in rows], spec, count)
        if "longrope" in config.llm.rope.kind:
            lengths = {measure(example, spec, count).length for example in examples}
            assert min(lengths) <= 40 < max(lengths)
        (total, (parts, hidden, visual)), grads = run_fn(config)(params(config), batch)
        by_example = losses_by_example(config, rows, batch, hidden, visual, spec)
        results.append((float(total), parts, by_example, grads, losses.counts(config, batch)))
    (total, parts, by_example, grads, totals), (total_p, parts_p, by_example_p, grads_p, totals_p) = results
    assert by_example.keys() == by_example_p.keys() == set(range(len(examples)))
    for i, expected in by_example.items():
        np.testing.assert_allclose(by_example_p[i], expected, rtol=1e-5, atol=1e-5, err_msg=f"example {i}")
        image = examples[i].crops is not None
        assert (expected[1] > 0.1) == image and (expected[2] > 0.1) == (image or config.text_only == "zero_image")
    for name in parts:
        assert float(totals_p[name]) == float(totals[name])
        np.testing.assert_allclose(parts_p[name], parts[name], rtol=1e-5)
    np.testing.assert_allclose(total_p, total, rtol=1e-5)
    assert_trees_close(grads_p, grads, rtol=1e-5, atol=1e-5)


def test_text_rows_need_no_image_slots():
    config = config_of("paper")
    examples = [drawn(config, seed, "t" * (2 + seed) + "aa") for seed in range(3)]
    spec = layout_spec(config, 30, QUESTION_LENGTH, 3)
    batch = lay_out_rows([examples[:2], examples[2:]], dataclasses.replace(spec, crops=0), 4)
    assert batch.crops.shape[1] == batch.crop_text.shape[1] == 0
    (total, (parts, _, visual)), _ = run_fn(config)(params(config), batch)
    assert visual is None and float(parts["v2t"]) == float(parts["t2v"]) == 0
    (expected, _), _ = run_fn(config)(params(config), lay_out(examples, spec, 4))
    np.testing.assert_allclose(total, expected, rtol=1e-5)
