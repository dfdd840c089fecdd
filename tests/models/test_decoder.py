"""The decoder: rotary formulas, layer plans, one layer against numpy, cache, padding, packing, head."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.fixtures import example, image_windows, lay, params, random_array, tiny

from fusion_jax.inference import generate
from fusion_jax.models import layers, llm
from fusion_jax.models.config import RopeConfig, Stack, replace
from fusion_jax.models.exchange import ExchangePlan
from fusion_jax.models.fusion import Fusion, head_kernel

# Rotary embedding.

PER_HEAD = 8
LLAMA3 = RopeConfig("llama3", 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
LONG = RopeConfig(
    "longrope", 10000.0, original_length=4096, max_length=131072,
    short_factors=(1.0, 1.1, 1.2, 1.5), long_factors=(1.0, 2.0, 8.0, 40.0),
)  # fmt: skip


def angles(rope, positions, per_head=PER_HEAD, length=None):
    length = max(positions) + 1 if length is None else length
    cos, sin = layers.rotary(rope, per_head, jnp.asarray([positions], jnp.int32), jnp.full((1, 1), length))
    return np.asarray(cos)[0], np.asarray(sin)[0]


def assert_rotary(rope, positions, frequencies, scale=1.0, per_head=PER_HEAD):
    cos, sin = angles(rope, positions, per_head)
    for row, position in enumerate(positions):
        for i, frequency in enumerate(frequencies):
            # float32 angles near 5000 are good to 5e-4.
            atol = 1e-6 + 2e-7 * position * frequency
            assert abs(cos[row, i] - scale * math.cos(position * frequency)) < atol * scale + 1e-6
            assert abs(sin[row, i] - scale * math.sin(position * frequency)) < atol * scale + 1e-6


def test_default_rotary():
    assert_rotary(RopeConfig(theta=10000.0), [0, 1, 7, 300], [10000.0 ** (-2 * i / PER_HEAD) for i in range(4)])


def test_llama3_rotary():
    per_head, frequencies, kinds = 128, [], set()
    for i in range(per_head // 2):
        frequency = 500000.0 ** (-2 * i / per_head)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:  # high frequency: kept
            kinds.add("high")
        elif wavelength > 8192 / 1:  # low frequency: slowed down
            kinds.add("low")
            frequency /= 8
        else:
            kinds.add("between")
            smooth = (8192 / wavelength - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / 8 + smooth * frequency
        frequencies.append(frequency)
    assert kinds == {"high", "between", "low"}
    assert_rotary(LLAMA3, [0, 1, 50, 4000], frequencies, per_head=per_head)


@pytest.mark.parametrize(("last", "factors"), [(4095, LONG.short_factors), (4096, LONG.long_factors)])
def test_longrope_switches_for_all_positions_at_the_original_length(last, factors):
    frequencies = [10000.0 ** (-2 * i / PER_HEAD) / factor for i, factor in enumerate(factors)]
    assert_rotary(LONG, [0, 3, last], frequencies, 1.190238)


def test_longrope_goes_by_each_examples_own_length():
    alone = {length: angles(LONG, range(3), length=length) for length in (4096, 4097)}
    assert np.abs(alone[4096][0] - alone[4097][0]).max() > 0.01
    together = layers.rotary(LONG, PER_HEAD, jnp.tile(jnp.arange(3), (2, 1)), jnp.asarray([[4097], [4096]]))
    packed = layers.rotary(
        LONG, PER_HEAD, jnp.tile(jnp.arange(3), 2)[None], jnp.repeat(jnp.asarray([[4097, 4096]]), 3, 1)
    )
    for i in (0, 1):
        expected = np.stack([alone[4097][i], alone[4096][i]])
        np.testing.assert_array_equal(together[i], expected)
        np.testing.assert_array_equal(packed[i][0], np.concatenate(expected))


def test_lengths_of_the_examples_in_a_row():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 3, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 2, 2, 2, 2]])
    positions = jnp.asarray([[0, 1, 2, 0, 1, 0, 0, 0], [0, 0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 1, 2, 3]])
    lengths = np.asarray(layers.example_lengths(segments, positions))
    expected = [[3, 3, 3, 2, 2, 1, 0, 0], [0, 0, 6, 6, 6, 6, 6, 6], [4] * 8]
    np.testing.assert_array_equal(np.where(segments > 0, lengths, 0), expected)


def test_longrope_scale_is_the_published_one_at_any_length():
    cos, _ = angles(LONG, [0])
    np.testing.assert_allclose(cos, math.sqrt(1 + math.log(131072 / 4096) / math.log(4096)), rtol=1e-6)
    np.testing.assert_allclose(cos, 1.190238, atol=1e-6)


def test_rotation_is_a_complex_product_of_the_two_halves():
    x, angle = random_array(1, 3, 2, 8), random_array(1, 3, 4, seed=1)
    out = np.asarray(layers.apply_rotary(jnp.asarray(x), jnp.cos(angle), jnp.sin(angle)))
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[:, :, None]
    np.testing.assert_allclose(out[..., :4], turned.real, atol=1e-5)
    np.testing.assert_allclose(out[..., 4:], turned.imag, atol=1e-5)


# Plans: (layers, start, stride, count) to stacks.


def planned(depth, start, stride, count):
    return tiny(
        **{"llm.layers": depth, "exchange.start": start, "exchange.stride": stride, "exchange.layers": count}
    ).stacks()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((32, 0, 3, 10), (Stack(10, 3, True), Stack(2, 1, False))),
        ((4, 0, 2, 2), (Stack(2, 2, True),)),
        ((5, 0, 1, 0), (Stack(5, 1, False),)),
        ((3, 0, 2, 2), (Stack(1, 2, True), Stack(1, 1, True))),
        ((6, 2, 2, 1), (Stack(2, 1, False), Stack(1, 2, True), Stack(2, 1, False))),
        ((4, 3, 1, 1), (Stack(3, 1, False), Stack(1, 1, True))),
    ],
)
def test_stacks_of_a_plan(arguments, expected):
    assert planned(*arguments) == expected


def test_every_plan_puts_each_exchange_behind_its_layer():
    plans = 0
    for depth in range(1, 9):
        for start in range(depth):
            for stride in range(1, 5):
                for count in range(0, (depth - 1 - start) // stride + 2):
                    behind = [
                        j == 0 and stack.exchange
                        for stack in planned(depth, start, stride, count)
                        for _ in range(stack.blocks)
                        for j in range(stack.layers)
                    ]
                    wanted = {start + k * stride for k in range(count)}
                    assert behind == [i in wanted for i in range(depth)], (depth, start, stride, count)
                    plans += 1
    assert plans > 100


# One layer against numpy.


def test_layer_equals_numpy_with_biases_and_grouped_heads():
    config = tiny(**{"llm.qkv_bias": True})
    c = config.llm
    weights = jax.tree.map(lambda a: a[1], params(config)["llm"]["stack_0"]["layer_0"])
    assert {name for name, part in weights.items() if "bias" in part} == {"query", "key", "value"}
    x, length = random_array(1, 5, c.width), 5
    cos, sin = angles(c.rope, range(length), c.per_head)
    segments = jnp.ones((1, length), jnp.int32)
    shared = llm._Shared(jnp.asarray(cos[None]), jnp.asarray(sin[None]), segments, None, None, None)
    out, _ = llm.DecoderLayer(c, jnp.float32).apply({"params": weights}, jnp.asarray(x), None, jnp.int32(0), shared)

    w = jax.tree.map(lambda a: np.asarray(a, np.float64), weights)
    h = x[0].astype(np.float64)

    def norm(y, p):
        return y / np.sqrt((y * y).mean(-1, keepdims=True) + c.norm_eps) * p["scale"]

    def turn(y):
        first, second = y[:, : c.per_head // 2], y[:, c.per_head // 2 :]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    y = norm(h, w["attention_norm"])
    q, k, v = (y @ w[n]["kernel"] + w[n]["bias"] for n in ("query", "key", "value"))
    heads = []
    for head in range(c.heads):
        own = slice(head * c.per_head, (head + 1) * c.per_head)
        group = head // (c.heads // c.kv_heads)
        theirs = slice(group * c.per_head, (group + 1) * c.per_head)
        scores = turn(q[:, own]) @ turn(k[:, theirs]).T / math.sqrt(c.per_head)
        weight = np.exp(scores) * np.tri(length)
        heads.append(weight / weight.sum(-1, keepdims=True) @ v[:, theirs])
    h = h + np.concatenate(heads, -1) @ w["out"]["kernel"]
    y = norm(h, w["mlp_norm"])
    gate = y @ w["gate"]["kernel"]
    h = h + (gate / (1 + np.exp(-gate)) * (y @ w["up"]["kernel"])) @ w["down"]["kernel"]
    np.testing.assert_allclose(np.asarray(out)[0], h, atol=2e-5)


# The whole decoder, in several stacks: [layer] [layer exchange layer] [layer exchange].

STACKED = tiny(**{"llm.layers": 4, "exchange.start": 1, "exchange.stride": 2, "exchange.layers": 2})
LATENTS, SIDE = 4, 3


@functools.cache
def decoder_fn(config=STACKED, cached=False):
    def run(weights, x, segments, positions, plan, cache):
        return llm.Decoder(config).apply({"params": weights["llm"]}, x, segments, positions, plan, cache)

    return jax.jit(run)


def decode(x, segments, positions, plan=None, cache=None, config=STACKED):
    x, segments, positions = jnp.asarray(x), jnp.asarray(segments, jnp.int32), jnp.asarray(positions, jnp.int32)
    hidden, cache = decoder_fn(config)(params(config), x, segments, positions, plan, cache)
    return np.asarray(hidden), cache


def exchange_plan(context, round_image, round_end, latent_start):
    rounds = (np.array(a, np.int32) for a in (round_image, round_end, latent_start))
    windows = image_windows(np.array(round_image), SIDE, 2)
    return ExchangePlan(*map(jnp.asarray, (context.reshape(len(context), -1, context.shape[-1]), windows, *rounds)))


# Two rows of 9 and 7 tokens; latents at 1 to 4, the question ends at 5; the second row is padded on the right.
LENGTHS, TOTAL = np.array([9, 7]), 11
ROWS = random_array(2, TOTAL, 16)
CONTEXT = random_array(2, 1, SIDE**2, 16, seed=1)
PLAN = exchange_plan(CONTEXT, [[0], [0]], [[5], [5]], [[1], [1]])


def counted(lengths, size):
    segments = np.arange(size)[None] < np.asarray(lengths)[:, None]
    return segments, np.where(segments, np.arange(size), 0)


@functools.cache
def full():
    """Hidden states of both rows at full length, in one pass without a cache."""
    return decode(ROWS, *counted([TOTAL, TOTAL], TOTAL), PLAN)[0]


def test_exchange_takes_part():
    without = decode(ROWS, *counted([TOTAL, TOTAL], TOTAL))[0]
    moved = np.abs(full() - without).max(-1) > 1e-4
    assert not moved[:, 0].any() and moved[:, 1:].all()


def test_cached_decode_of_a_padded_batch_equals_the_full_pass_at_every_step():
    segments, positions = counted(LENGTHS, 9)
    cache = llm.empty_cache(STACKED.llm, jnp.full(2, TOTAL), 12, jnp.float32)
    hidden, cache = decode(ROWS[:, :9], segments, positions, PLAN, cache)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(hidden[row, :length], full()[row, :length], atol=1e-5)
    assert int(cache.length) == 9
    for step in range(2):
        places = LENGTHS + step
        x = ROWS[np.arange(2), places][:, None]
        hidden, cache = decode(x, np.ones((2, 1)), places[:, None], None, cache)
        np.testing.assert_allclose(hidden[:, 0], full()[np.arange(2), places], atol=1e-5)
    assert int(cache.length) == 11
    np.testing.assert_array_equal(np.asarray(cache.segments)[1], [1] * 7 + [0, 0, 1, 1, 0])


def test_cached_decode_keeps_to_the_sliding_window_of_positions():
    config = tiny(**{"llm.sliding_window": 3, "semantic_exchange": False})
    decoder = llm.Decoder(config)
    variables = {"params": params(config)["llm"]}
    run = jax.jit(lambda *a: decoder.apply(variables, *a))

    def arrays(*values):
        return [jnp.asarray(a, jnp.int32) for a in values]

    whole, _ = run(jnp.asarray(ROWS), *arrays(*counted([TOTAL, TOTAL], TOTAL)))
    segments, positions = counted(LENGTHS, 9)
    cache = llm.empty_cache(config.llm, jnp.full(2, TOTAL), 12, jnp.float32)
    _, cache = run(jnp.asarray(ROWS[:, :9]), *arrays(segments, positions), None, cache)
    for step in range(2):  # the second row's padding is inside a window of slots
        places = LENGTHS + step
        x = jnp.asarray(ROWS[np.arange(2), places][:, None])
        hidden, cache = run(x, *arrays(np.ones((2, 1)), places[:, None]), None, cache)
        np.testing.assert_allclose(hidden[:, 0], whole[np.arange(2), places], atol=1e-5)
    assert np.abs(whole - full()).max() > 0.01


def test_padding_has_no_influence():
    segments, positions = counted(LENGTHS, TOTAL)
    noisy = np.where(segments[..., None], ROWS, 7.0).astype(np.float32)
    hidden = decode(noisy, segments, positions, PLAN)[0]
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(hidden[row, :length], full()[row, :length], atol=1e-5)


def test_packed_rows_equal_separate_rows():
    first, second = 7, 9
    packed = np.concatenate([ROWS[0, :first], ROWS[1, :second], np.ones((2, 16))]).astype(np.float32)[None]
    segments = [[1] * first + [2] * second + [0, 0]]
    positions = [[*range(first), *range(second), 0, 0]]
    context = CONTEXT.transpose(1, 0, 2, 3)  # both images in the one row
    plan = exchange_plan(context, [[0, 1]], [[5, first + 5]], [[1, first + 1]])
    hidden = decode(packed, segments, positions, plan)[0][0]
    np.testing.assert_allclose(hidden[:first], full()[0, :first], atol=1e-5)
    np.testing.assert_allclose(hidden[first : first + second], full()[1, :second], atol=1e-5)


# Head and generation.


def test_head_is_the_embedding_where_tied():
    hidden = jnp.asarray(random_array(2, 16))
    for tied in (False, True):
        config = tiny(**{"llm.tied_head": tied})
        weights = params(config)
        assert ("head" in weights["llm"]) is not tied
        assert weights["llm"]["embedding"].shape == (128, 16)  # 61 rows, padded
        kernel = np.asarray(weights["llm"]["embedding"]).T if tied else np.asarray(weights["llm"]["head"])
        np.testing.assert_array_equal(head_kernel(config, weights), kernel)
        logits = Fusion(config).apply({"params": weights}, hidden, method="logits")
        assert logits.shape == (2, 61) and logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, np.asarray(hidden) @ kernel[:, :61], atol=1e-5)


@functools.cache
def prompts():
    """Two prompts of different lengths; each with an image."""
    unanswered = []
    for seed, question in ((0, 5), (1, 2)):
        e = example(tiny(), seed, question=question, answer=1)
        unanswered.append(type(e)(e.input_ids[:-1], None, e.question_ids, e.crops))
    return unanswered


@functools.cache
def greedily(stops=()):
    batch = lay(tiny(), prompts(), rounds=1)
    return generate.greedy(Fusion(tiny()), params(tiny()), batch, 3, stops, keep_logits=True)


def test_greedy_in_a_padded_batch_equals_one_by_one():
    together = greedily()
    for row, prompt in enumerate(prompts()):
        # The prompt alone with the answer so far, in one pass: no cache, no neighbours.
        ids = np.concatenate([prompt.input_ids, together.tokens[row]])
        alone = lay(tiny(), [type(prompt)(ids, None, prompt.question_ids, prompt.crops)], length=30, rounds=1)
        end = len(prompt.input_ids) - 2 + 9 + 4
        alone.round_end[0, 0] = end - 1
        hidden = np.asarray(_forward()(params(tiny()), alone))[0]
        logits = hidden[end - 1 : end + 2] @ np.asarray(params(tiny())["llm"]["head"])[:, :61]
        np.testing.assert_allclose(together.logits[row], logits, atol=1e-4)
        np.testing.assert_array_equal(together.tokens[row], logits.argmax(-1))


@functools.cache
def _forward():
    return jax.jit(lambda p, batch: Fusion(tiny()).apply({"params": p}, batch)[0])


def test_decoding_across_longropes_original_length_equals_one_pass_over_all_of_it():
    """Row by row: the first one's answer passes the length, that of the second, shorter one ends right before it."""
    factors = {"short_factors": (1.0, 1.0), "long_factors": (4.0, 9.0)}
    rope = RopeConfig("longrope", original_length=12, max_length=48, **factors)
    config = tiny(**{"llm.rope": rope, "llm.layers": 1, "semantic_exchange": False})
    questions = [example(config, seed, image=False, question=question, answer=0) for seed, question in ((0, 8), (1, 5))]
    questions = [dataclasses.replace(one, labels=None) for one in questions]
    assert [len(one.input_ids) for one in questions] == [10, 7]
    generated = generate.greedy(Fusion(config), params(config), lay(config, questions), 6, (), keep_logits=True)
    always_short = replace(config, **{"llm.rope.long_factors": (1.0, 1.0)})
    # Nothing is read after the last token.
    wholes = [
        dataclasses.replace(prompt, input_ids=np.concatenate([prompt.input_ids, generated.tokens[row, :-1]]))
        for row, prompt in enumerate(questions)
    ]
    together = _logits(config, lay(config, wholes))
    for row, (prompt, whole) in enumerate(zip(questions, wholes)):
        assert len(whole.input_ids) == (15, 12)[row]
        for with_long, equal in ((config, True), (always_short, row == 1)):
            logits = _logits(with_long, lay(config, [whole]))[0, len(prompt.input_ids) - 1 :]
            assert np.allclose(generated.logits[row], logits, atol=1e-4) == equal
        answers = together[row, len(prompt.input_ids) - 1 : len(whole.input_ids)]
        np.testing.assert_allclose(generated.logits[row], answers, atol=1e-4)  # without a cache rows are as independent


def _logits(config, batch):
    model = Fusion(config)
    hidden, _, _ = jax.jit(lambda p, b: model.apply({"params": p}, b))(params(config), batch)
    return np.asarray(hidden) @ np.asarray(params(config)["llm"]["head"])[:, : config.llm.vocab_size]


def test_a_stopped_row_is_filled_while_the_other_goes_on():
    free = greedily().tokens
    place = next(i for i, token in enumerate(free[0]) if token not in free[1])
    stop = int(free[0, place])
    stopped = greedily((stop,)).tokens
    np.testing.assert_array_equal(stopped, [[*free[0, :place], *[stop] * (len(free[0]) - place)], free[1]])
