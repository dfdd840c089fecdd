"""Later turns that continue a kept prompt, against prefills of the whole conversation."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import tiny_run
from helpers.fixtures import params
from helpers.generation import config, make_tokenizer, picture

from fusion_jax.data.sources import Record
from fusion_jax.inference.decoding import begin, decode, prefill
from fusion_jax.inference.prefixes import Prefix, extend, rest_of
from fusion_jax.inference.prompts import Prompts, Steps
from fusion_jax.inference.sampling import Sampling, settings
from fusion_jax.models import weights
from fusion_jax.models.config import PAPER, RELEASED, RopeConfig, replace
from fusion_jax.models.fusion import Fusion

FIRST = {"guide": "first_round"}
LONGROPE = RopeConfig("longrope", original_length=40, max_length=512, short_factors=(1.0,) * 4, long_factors=(9.0,) * 4)
MODELS = {
    "paper": {**PAPER},
    "released": {**RELEASED},
    "learned latents": {**PAPER, "latent_init": "learned", "exchange.layers": 2, "exchange.stride": 1},
    "window": {**PAPER, "llm.sliding_window": 20},
    "longrope": {**RELEASED, "llm.rope": LONGROPE},
    "tiles": {**PAPER, "tile_grids": ((1, 1), (1, 2), (2, 2)), "tile_tokens": 4},
    "no exchange": {**PAPER, "semantic_exchange": False},
    "no guidance": {**PAPER, "text_guided": False},
}
CAPACITY, LIMIT = 260, 6


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("t"))


def turns(*values):
    return [{"from": ("human", "gpt")[k % 2], "value": value} for k, value in enumerate(values)]


CHAT = ("What is in the picture?", "A red circle and a blue star.", "Which colour?", "A red star.", "Describe it.")


def conversation(rounds, images=1, apart=False):
    """Its images are in the first turn, or (`apart`) in the first and the second."""
    said = turns(*CHAT[: 2 * rounds - 1])
    for k in range(images if images > 1 else 0):
        said[2 * k * apart]["value"] = "<image>\n" + said[2 * k * apart]["value"]
    return Record("0", None, said, "prompt", tuple(picture(k, (24, 60)[k % 2]) for k in range(images)))


def run(make_prompts, model, params, first, second, rest_length=64):
    """(logits, position, cache) of the second prompt: prefilled whole, and as the continuation of the first."""
    limit = np.array([LIMIT], np.int32)
    batch = make_prompts.batch([make_prompts.example(first)])
    *_, cache, encoding = prefill(model, params, batch, CAPACITY, limit, keep=True)
    slots, length = batch.tokens.shape[1], int((batch.segment_ids > 0).sum())
    prefix = Prefix(cache.keys[..., :slots], cache.values[..., :slots, :], np.int32(length), encoding)
    batch = make_prompts.batch([make_prompts.example(second)])
    rest = rest_of(batch, length, rest_length)
    return prefill(model, params, batch, CAPACITY, limit), extend(model, params, rest, prefix, CAPACITY, limit), batch


def assert_equal(whole, extended, **tolerance):
    np.testing.assert_allclose(extended[0], whole[0], **tolerance)
    np.testing.assert_array_equal(extended[1], whole[1])
    one, other = extended[2], whole[2]
    np.testing.assert_array_equal(one.segments, other.segments)
    np.testing.assert_array_equal(one.positions, other.positions)
    np.testing.assert_array_equal(one.reach, other.reach)
    real = np.asarray(one.segments[0]) > 0
    for name, axis in (("keys", -1), ("values", -2)):
        kept = (np.compress(real, getattr(cache, name), axis) for cache in (one, other))
        np.testing.assert_allclose(*kept, err_msg=name, **tolerance)


def prompts_of(model, tokenizer):
    return Prompts(dataclasses.replace(config(), model=model), tokenizer, Steps())


CASES = [
    *[(name, 1, 2, False) for name in MODELS],
    ("paper", 1, 3, False),
    ("paper", 2, 2, False),
    ("tiles", 2, 2, False),
    ("released", 2, 3, True),
    ("paper", 0, 2, False),
    ("released", 0, 2, False),
    ("window", 0, 3, False),
]


@pytest.mark.parametrize(("name", "images", "rounds", "apart"), CASES)
def test_a_later_turn_equals_the_prefill_of_the_whole(tokenizer, name, images, rounds, apart):
    model = replace(tiny_run.MODEL, **MODELS[name], **FIRST)
    make_prompts = prompts_of(model, tokenizer)
    first, second = (conversation(count, images, apart) for count in (rounds - 1, rounds))
    whole, extended, batch = run(make_prompts, Fusion(model), params(model), first, second)
    assert_equal(whole, extended, atol=2e-4, rtol=2e-4)
    limit, how = np.array([LIMIT], np.int32), settings([Sampling(max_tokens=LIMIT)])
    answers = [
        np.asarray(decode(Fusion(model), params(model), begin(*results, batch, limit, how), LIMIT, (), False)[0])
        for results in (whole, extended)
    ]
    np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize("kind", weights.KINDS)
def test_stored_weights_extend_as_they_prefill(tokenizer, kind):
    """As `load_model` stores them: bfloat16, each block by itself, matrices as int8 or not."""
    model = replace(tiny_run.MODEL, **RELEASED, **FIRST)
    stored = flatten_dict(weights.as_read(params(model), jnp.bfloat16), sep="/")
    if kind == "int8":
        for path in [path for path in stored if weights.becomes_int8(path)]:
            stored[path], stored[weights.scale_name(path)] = weights.to_int8(stored[path])
    stored = weights.unstack(unflatten_dict(stored, sep="/"))
    records = conversation(1), conversation(2)
    whole, extended, _ = run(prompts_of(model, tokenizer), Fusion(model, jnp.bfloat16), stored, *records)
    assert extended[2].keys.dtype == jnp.bfloat16
    gap = np.abs(extended[0] - whole[0])
    assert gap.max() < 0.05 * np.std(whole[0])


def test_a_rest_may_be_padded_beyond_the_end_of_the_cache(tokenizer):
    model = replace(tiny_run.MODEL, **FIRST)
    records = conversation(1), conversation(2)
    whole, extended, batch = run(prompts_of(model, tokenizer), Fusion(model), params(model), *records, rest_length=250)
    assert batch.tokens.shape[1] < CAPACITY < 250 + int((batch.segment_ids > 0).sum())
    assert_equal(whole, extended, atol=2e-4, rtol=2e-4)
