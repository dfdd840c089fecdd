"""State in fewer bits: roundings without bias, the same everywhere; the step, checkpoints and what is counted."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from flax.traverse_util import flatten_dict
from helpers.fixtures import flat, mixed_batch, params, tiny

from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.devices import sharding
from fusion_jax.errors import UserError
from fusion_jax.models.fusion import Fusion
from fusion_jax.planning import program
from fusion_jax.training import checkpoint, loading, optim, resume, rounding, state
from fusion_jax.training.about import describe_run
from fusion_jax.training.config_check import state_bytes
from fusion_jax.training.step import compile_step

CONFIG = tiny(**{"llm.layers": 1, "exchange.layers": 1, "vision.layers": 2})
FEW_BITS = {"first_moment": "int8", "second_moment": "int8", "master_weights": "bfloat16", "gradient_sums": "bfloat16"}
STAGE = StageConfig("s", "d.json", batch_size=4, accumulation=2, learning_rate=1e-2, warmup_ratio=0.0, **FEW_BITS)
FORMS = {"bfloat16": ("bfloat16", True), "signed": ("int8", True), "unsigned": ("int8", False)}

# Six powers of ten in every row.
SIZES = np.float32(10) ** -np.linspace(0, 6, 24, dtype=np.float32)


def copy(tree):
    """A copy of arrays that `with_masters` or a donation would delete."""
    return jax.tree.map(jnp.copy, tree)


def numbers(form):
    signs = np.where(np.arange(24) % 3 == 0, -1, 1) if form != "unsigned" else 1
    return jnp.asarray(np.stack([SIZES * signs, 300 * SIZES[::-1] * signs]))


def stored(form):
    return rounding.zeros(numbers(form), *FORMS[form])


@functools.cache
def rounded(form, count=2000):
    """The numbers as they are after rounding with that many keys, stacked; on the host."""
    values, like = numbers(form), stored(form)
    keys = jnp.arange(count)
    return np.asarray(
        jax.jit(jax.vmap(lambda i: rounding.read(rounding.write(values, like, rounding.key_of("x", i)))))(keys)
    )


@pytest.mark.parametrize("form", FORMS)
def test_the_mean_of_many_roundings_is_the_number(form):
    results, values = rounded(form), np.asarray(numbers(form))
    least = (
        np.abs(values).max(1, keepdims=True)
        * {"bfloat16": 0, "signed": 1.25 * 2.0**-16, "unsigned": 1.25 * 2.0**-32}[form]
    )
    spread = results.std(0) / np.sqrt(len(results))
    assert (spread > 0).mean() > 0.8
    np.testing.assert_array_less(np.abs(results.mean(0) - values), 5 * spread + 1e-6 * np.abs(values))
    # Neighbouring values: at most a step of 1/128 or 1/8, or that of the least magnitude.
    step = 2.0 ** (-7 if form == "bfloat16" else -3) * np.abs(values) * 1.0001
    assert (np.abs(results - values) <= np.maximum(step, least)).all()


@pytest.mark.parametrize("form", FORMS)
def test_what_is_stored_is_written_again_without_a_change(form):
    once = rounding.write(numbers(form), stored(form), rounding.key_of("x", 1))
    again = rounding.write(rounding.read(once), once, rounding.key_of("x", 2))
    jax.tree.map(np.testing.assert_array_equal, once, again)


def test_zeros_stay_and_a_second_moment_above_zero_never_becomes_zero():
    values = jnp.asarray([[1.0, 0.0, 1e-12, 1e-20], [0.0, 0.0, 0.0, 0.0]])
    for i in range(20):
        read = rounding.read(rounding.write(values, stored("unsigned"), rounding.key_of("x", i)))
        assert (np.asarray(read) > 0).tolist() == (np.asarray(values) > 0).tolist()
        read = rounding.read(rounding.write(-values, stored("signed"), rounding.key_of("x", i)))
        assert read[0, 0] == -1 and read[0, 1] == 0 and not read[1].any()


def test_bits_are_a_function_of_name_step_and_position_and_look_random():
    key = rounding.key_of("a", 3)
    bits = np.asarray(rounding.random_bits((64, 64), key))
    np.testing.assert_array_equal(bits, rounding.random_bits((64, 64), rounding.key_of("a", jnp.int32(3))))
    np.testing.assert_array_equal(bits.ravel(), rounding.random_bits((64 * 64,), key))
    others = [rounding.key_of("b", 3), rounding.key_of("a", 4), rounding.key_of("a", 3, 0)]
    for other in [np.asarray(rounding.random_bits((64, 64), key)) for key in others] + [bits[:, ::-1], bits[::-1]]:
        different = np.unpackbits((bits ^ other).view(np.uint8)).mean()
        assert 0.48 < different < 0.52
    for bit in range(32):
        assert 0.45 < (bits >> bit & 1).mean() < 0.55


def test_small_changes_add_up_in_bfloat16():
    """A thousand steps of 1e-4 from 1.0, where bfloat16's next value is 0.0039 away."""
    weights = {"kernel": jnp.ones((8, 64), jnp.bfloat16)}
    change, labels = {"kernel": jnp.full((8, 64), 1e-4)}, {"kernel": optim.DEFAULT}

    def step(weights, number):
        return optim.apply_changes(weights, change, labels, step=number), None

    after = jax.jit(lambda w: jax.lax.scan(step, w, jnp.arange(1000))[0])(weights)["kernel"]
    assert after.dtype == jnp.bfloat16
    np.testing.assert_allclose(after.astype(jnp.float32).mean(), 0.9, atol=2e-3)


def test_adam_with_small_moments_learns_as_with_float32():
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal((256, 16)) * np.logspace(0, -2, 16), jnp.float32)
    targets = inputs @ jnp.asarray(rng.standard_normal((16, 8)) * np.logspace(0, 2, 16)[:, None], jnp.float32)

    def losses(**changes):
        stage = dataclasses.replace(StageConfig("s", "d", b2=0.99), **changes)
        weights = state.with_masters({"kernel": jnp.zeros((16, 8))}, stage.master_weights)
        tx, labels = optim.optimizer(stage, weights), {"kernel": optim.DEFAULT}

        def loss(weights):
            return jnp.mean((inputs @ weights["kernel"].astype(jnp.float32) - targets) ** 2)

        def step(carry, number):
            weights, opt_state = carry
            value, grads = jax.value_and_grad(loss)(weights)
            squares = optim.squares(grads)
            updates, opt_state = tx.update(grads, opt_state, weights, norm=optim.norm(squares), squares=squares)
            changes = optim.changes(updates, {optim.DEFAULT: 0.05}, labels)
            return (optim.apply_changes(weights, changes, labels, step=number), opt_state), value

        return np.asarray(jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(400))[1])((weights, tx.init(weights))))

    exact = losses()
    assert exact[-1] < exact[0] / 2
    for name in ("bfloat16", "int8"):
        np.testing.assert_allclose(losses(first_moment=name, second_moment=name)[-1], exact[-1], rtol=0.02)
    np.testing.assert_allclose(losses(**FEW_BITS)[-1], exact[-1], rtol=0.05)


def test_every_mesh_gives_the_bits_of_one_device(tmp_path):
    """Codes, scales and bfloat16 weights after three updates; four devices, in a process of their own."""
    worker = Path(__file__).parents[1] / "helpers" / "rounding_worker.py"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (worker.parents[2], worker.parents[1]))),
        "JAX_NUM_CPU_DEVICES": "4",
    }
    file = tmp_path / "arrays.npz"
    done = subprocess.run([sys.executable, worker, file], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    arrays = dict(np.load(file))
    assert len(arrays) == 3 * 14
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, arrays["one" + name[name.index("|") :]], err_msg=name)


# In the step.


@functools.cache
def begun(**changes):
    stage, mesh = dataclasses.replace(STAGE, **changes), sharding.make_mesh()
    places = jax.tree.map(lambda x: x.sharding, state.abstract_parameters(CONFIG, mesh))
    weights = state.with_masters(jax.device_put(copy(params(CONFIG)), places), stage.master_weights)
    tx, labels = optim.optimizer(stage, weights), optim.labels(stage, weights)
    step = compile_step(Fusion(CONFIG), stage, tx, labels, mesh)
    kept = jax.jit(lambda s, b, r: step(s, b, r))  # inside another jit nothing is donated
    return state.begin(weights, tx, mesh), kept


@functools.cache
def after_a_step():
    current, step = begun()
    return step(current, mixed_batch(CONFIG), optim.learning_rates(STAGE, 0, 10))


def test_a_step_keeps_the_forms_of_its_state_and_is_the_same_again():
    current, step = begun()
    after, metrics = after_a_step()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), current)
    for path, x in flat(after.params).items():
        assert x.dtype == (jnp.bfloat16 if path.split("/")[-1] in state.PRODUCTS else jnp.float32), path
    adam = after.opt_state[1].inner_state[0]
    norms = {x.dtype for path, x in flatten_dict(adam.mu).items() if path[-1] in ("scale", "bias")}
    assert norms == {np.dtype(np.float32)}
    kernels = [flatten_dict(moment)[("vision_to_text", "in", "kernel")] for moment in (adam.mu, adam.nu)]
    assert [x.codes.dtype for x in kernels] == [np.int8, np.uint8]
    assert metrics["skipped"] == 0
    again, _ = step(current, mixed_batch(CONFIG), optim.learning_rates(STAGE, 0, 10))
    jax.tree.map(np.testing.assert_array_equal, after, again)


def test_a_step_moves_weights_as_in_float32_but_for_the_rounding():
    current, step = begun(**dict.fromkeys(FEW_BITS, "float32"))
    expected, wanted = step(current, mixed_batch(CONFIG), optim.learning_rates(STAGE, 0, 10))
    after, metrics = after_a_step()
    np.testing.assert_allclose(metrics["total"], wanted["total"], rtol=1e-2)
    np.testing.assert_allclose(metrics["grad_norm"], wanted["grad_norm"], rtol=2e-2)
    np.testing.assert_allclose(metrics["update_norm"], wanted["update_norm"], rtol=5e-2)
    for path, x in flat(expected.params).items():
        moved, ours = (np.asarray(y - flat(params(CONFIG))[path], np.float32) for y in (x, flat(after.params)[path]))
        if np.abs(moved).max() > 5e-3 and not path.endswith("bias"):
            similar = (moved * ours).sum() / np.sqrt((moved**2).sum() * (ours**2).sum())
            assert similar > 0.9, path


def test_a_skipped_step_changes_neither_codes_nor_weights():
    step, (after, _) = begun()[1], after_a_step()
    rates = {label: np.float32(np.inf) for label in optim.learning_rates(STAGE, 0, 10)}
    skipped, metrics = step(after, mixed_batch(CONFIG), rates)
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, (skipped.params, skipped.opt_state), (after.params, after.opt_state))


# In checkpoints.


def test_a_checkpoint_brings_every_bit_back(tmp_path):
    after, _ = after_a_step()
    checkpoints = checkpoint.Checkpoints(tmp_path, {"json": json.dumps({"config": {}})})
    checkpoints.save(1, after, {})
    checkpoints.close()
    _, restored, _ = checkpoints.restore(jax.eval_shape(lambda x: x, after))
    assert jax.tree.structure(restored) == jax.tree.structure(after)
    for got, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(after), strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)


def test_float_types_are_converted_when_a_checkpoint_is_restored(tmp_path):
    weights = {"kernel": jnp.linspace(0, 1, 64).reshape(8, 8), "scale": jnp.ones(3)}
    forms = {}
    for name in ("float32", "bfloat16"):
        stage = StageConfig("s", "d", first_moment=name, second_moment=name, master_weights=name)
        of_stage = state.with_masters(copy(weights), name)
        forms[name] = state.create(of_stage, optim.optimizer(stage, of_stage))
    checkpoints = checkpoint.Checkpoints(tmp_path, {"json": json.dumps({"config": {}})})
    checkpoints.save(1, forms["float32"], {})
    checkpoints.save(2, forms["bfloat16"], {})
    checkpoints.close()
    _, restored, _ = checkpoints.restore(jax.eval_shape(lambda: forms["float32"]))
    assert restored.params["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(restored.params["kernel"], forms["bfloat16"].params["kernel"])
    assert {x.dtype for x in jax.tree.leaves(restored.opt_state)} == {np.dtype(np.float32), np.dtype(np.int32)}


def test_commands_load_float32_from_the_masters_of_a_checkpoint(tmp_path):
    """As generation, evaluation and `init_from` do."""
    masters = state.with_masters(copy(params(CONFIG)), "bfloat16")
    ocp.save_checkpointables(tmp_path / "1", {"params": masters})
    loaded = loading.load_params(tmp_path / "1", state.abstract_parameters(CONFIG, sharding.make_mesh()))
    for path, x in flat(loaded).items():
        assert x.dtype == jnp.float32
        np.testing.assert_array_equal(x, np.asarray(flat(masters)[path], np.float32), err_msg=path)


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ({"first_moment": "int8"}, {}, r"s.first_moment='int8' \(checkpoint: 'float32'\); give another --workdir"),
        ({}, {"second_moment": "int8"}, r"s.second_moment='float32' \(checkpoint: 'int8'\)"),
        ({"first_moment": "bfloat16", "master_weights": "bfloat16", "gradient_sums": "bfloat16"}, {}, None),
        ({"first_moment": "int8"}, {"first_moment": "int8"}, None),
    ],
)
def test_eight_bit_moments_cannot_be_taken_up_or_left_within_a_stage(tmp_path, ours, theirs, words):
    runs = [RunConfig(CONFIG, (StageConfig("s", "d", **changes),), "") for changes in (ours, theirs)]
    about = json.loads(describe_run(runs[1], None)["json"])
    if words is None:
        resume.check(runs[0], runs[0].stages[0], about, tmp_path)
    else:
        with pytest.raises(UserError, match=words):
            resume.check(runs[0], runs[0].stages[0], about, tmp_path)


# What is counted.


def test_doctor_and_plan_count_the_bytes_of_the_arrays():
    current, _ = begun()
    held = sum(x.nbytes for x in jax.tree.leaves(current))
    run = RunConfig(CONFIG, (STAGE,), "")
    assert state_bytes(run) == held
    params_shapes = state.with_masters(state.abstract_parameters(CONFIG, sharding.make_mesh()), "bfloat16")
    planned = state.abstract(params_shapes, optim.optimizer(STAGE, params_shapes), sharding.make_mesh())
    assert program.bytes_per_chip(planned) == held
    # Norms, biases and latents keep four bytes and more, which matters in a model of this size only.
    count = sum(x.size for x in jax.tree.leaves(current.params))
    assert (
        held
        < 6 * count
        < 12 * count
        == state_bytes(RunConfig(CONFIG, (StageConfig("s", "d"),), ""))
        - 4 * 3
        - 4 * len(jax.tree.leaves(current.params))
    )
