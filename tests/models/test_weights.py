"""Weights as a model that only answers stores them: cast once, or as int8, with the results of casting at each use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers.fixtures import example, lay, params, random_array, tiny

from fusion_jax.inference import generate
from fusion_jax.models import weights
from fusion_jax.models.fusion import Fusion

QUANTISED = ("vision/layers/layer/query/kernel", "vision_to_text/in/kernel", "llm/stack_0/layer_0/down/kernel")


def config(**changes):
    return tiny(**{"llm.width": 32, "llm.mlp_dim": 64} | changes)


def prompts(c):
    return lay(c, [example(c, 0, answer=0), example(c, 1, rounds=2, answer=0), example(c, 2, image=False, answer=0)])


def answers(c, parameters, dtype):
    """Tokens and logits of the prompts' answers."""
    return generate.greedy(Fusion(c, jnp.dtype(dtype)), parameters, prompts(c), 2, (), keep_logits=True)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_casting_once_gives_the_bits_of_casting_at_each_use(preset):
    c = config(preset=preset)
    cast = weights.as_read(params(c), jnp.bfloat16)
    before, after = answers(c, params(c), "bfloat16"), answers(c, cast, "bfloat16")
    np.testing.assert_array_equal(after.logits, before.logits)
    np.testing.assert_array_equal(after.tokens, before.tokens)


def test_norms_stay_in_float32_and_all_else_is_cast():
    flat = flatten_dict(weights.as_read(params(config(preset="released")), jnp.bfloat16), sep="/")
    norms = {path for path, x in flat.items() if x.dtype == jnp.float32}
    assert norms == {path for path in flat if "norm" in path}
    assert {x.dtype for path, x in flat.items() if path not in norms} == {jnp.dtype(jnp.bfloat16)}


def test_what_is_cast_already_is_not_copied():
    cast = weights.as_read(params(config()), jnp.bfloat16)
    assert weights.as_read(cast, jnp.bfloat16) is cast
    assert weights.as_read(params(config()), jnp.float32) is params(config())


def test_int8_rounds_each_output_channel_to_its_own_steps():
    w = random_array(3, 40, 5) * np.array([1.0, 10.0, 0.1, 1e-4, 0.0], np.float32)
    integers, scales = weights.to_int8(w)
    assert integers.dtype == jnp.int8 and integers.shape == w.shape and scales.shape == (3, 5)
    np.testing.assert_array_equal(np.abs(np.asarray(integers, np.int32)).max(1)[:, :4], 127)
    restored = np.asarray(integers, np.float32) * np.asarray(scales)[:, None]
    assert np.all(np.abs(restored - w) <= np.asarray(scales)[:, None] * 0.5001)
    assert np.all(np.asarray(scales)[:, 4] == 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_with_int8_is_that_with_the_restored_matrix(dtype):
    x, w = jnp.asarray(random_array(4, 40), dtype), random_array(40, 5, seed=1)
    integers, scales = weights.to_int8(w)
    y = weights.scaled_product(x, integers, scales)
    assert y.dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ (np.asarray(integers, np.float64) * np.asarray(scales, np.float64))
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=1e-5, atol=1e-5)


def quantised(c):
    """All matrices of the random model as int8, and the float32 matrices that these stand for."""

    def walk(tree, path, restore):
        out = {}
        for name, x in tree.items():
            here = f"{path}/{name}" if path else name
            if isinstance(x, dict):
                out[name] = walk(x, here, restore)
            elif weights.becomes_int8(here):
                integers, scales = weights.to_int8(x)
                if restore:
                    out[name] = integers * scales[..., None, :]
                else:
                    out[name], out[weights.scale_name(name)] = integers, scales
            else:
                out[name] = x
        return out

    return walk(params(c), "", False), walk(params(c), "", True)


@pytest.mark.parametrize(("preset", "tied"), [("paper", False), ("released", True)])
def test_model_with_int8_weights_computes_with_what_they_stand_for(preset, tied):
    c = config(preset=preset, **{"llm.tied_head": tied})
    stored, restored = quantised(c)
    assert {path for path in QUANTISED if flatten_dict(stored, sep="/")[path].dtype == jnp.int8} == set(QUANTISED)
    assert ("head_scale" in stored["llm"]) != tied
    ours, theirs = (answers(c, tree, "float32") for tree in (stored, restored))
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=2e-4)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def test_int8_changes_the_logits_of_random_weights_by_few_percent():
    c = config()
    hidden = jax.jit(Fusion(c).apply)
    full, _, _ = hidden({"params": params(c)}, prompts(c))
    ours, _, _ = hidden({"params": quantised(c)[0]}, prompts(c))
    error = np.linalg.norm(ours - full) / np.linalg.norm(full)
    assert 0 < error < 0.05


def test_int8_takes_a_quarter_of_float32():
    c = config(**{"llm.width": 128, "llm.mlp_dim": 256})
    assert weights.size(quantised(c)[0]) < 0.45 * weights.size(params(c))
