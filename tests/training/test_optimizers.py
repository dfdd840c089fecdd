"""Muon: against optax layer by layer, what it leaves to Adam, its state in memory and in checkpoints, whole steps."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from helpers.fixtures import flat, mixed_batch, params, tiny

from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.devices import sharding
from fusion_jax.errors import UserError
from fusion_jax.models.fusion import Fusion
from fusion_jax.planning import program
from fusion_jax.training import checkpoint, optim, orthogonal, state
from fusion_jax.training.config_check import state_bytes
from fusion_jax.training.step import compile_step

CONFIG = tiny()  # stacks of two layers, in the encoder of three
MUON = StageConfig("s", "d.json", batch_size=4, learning_rate=1e-2, warmup_ratio=0.0, optimizer="muon")
FEW_BITS = {"first_moment": "int8", "second_moment": "int8", "master_weights": "bfloat16", "gradient_sums": "bfloat16"}
# The beginnings of the paths of all parameters that are not matrices between hidden states, but for norms and biases.
ADAMS = ("llm/embedding", "llm/head", "latents_4", "vision/position_embedding", "vision/patch_embedding/kernel")


def test_the_name_of_an_optimizer_is_checked():
    for name in ("Muon", "", "sgd", None, 3):
        with pytest.raises(UserError, match=r"stage 's': optimizer=.* is unknown; allowed: adamw, muon"):
            StageConfig("s", "d", optimizer=name)


# Updates.


def gradients(rng, weights):
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), weights)


def updated(tx, grads, opt_state, weights):
    squares = optim.squares(grads)
    return jax.jit(tx.update)(grads, opt_state, weights, norm=optim.norm(squares), squares=squares)


def second_moments(opt_state) -> set[str]:
    moments = flatten_dict(opt_state[1].inner_state[0].nu, sep="/")
    return {path for path, moment in moments.items() if jax.tree.leaves(moment)}


def split(path, x):
    """The matrices of a parameter, those of each layer apart, and everything else whole."""
    stacked = path.endswith(("kernel", "exchange/in")) and x.ndim == 3
    return {(path, i): one for i, one in enumerate(x)} if stacked else {(path, 0): x}


def test_three_steps_equal_optax_on_each_layer_alone():
    """Matrices of layers get optax's Muon, one call for each layer, and everything else optax's AdamW."""
    stage = dataclasses.replace(MUON, weight_decay=0.1, b1=0.8, b2=0.9, eps=1e-6, clip_norm=0.5)
    current, rng, rate = params(CONFIG), np.random.default_rng(0), 1e-2
    tx, labels = optim.optimizer(stage, current), optim.labels(stage, current)
    opt_state = tx.init(current)
    adam = second_moments(opt_state)
    muons = optax.contrib.muon(rate, weight_decay=0.1, consistent_rms=0.2)
    adams, spared = (optax.adamw(rate, b1=0.8, b2=0.9, eps=1e-6, weight_decay=decay) for decay in (0.1, 0.0))

    def alone(path):
        return muons if path not in adam else spared if path.endswith(("scale", "bias")) else adams

    parts = {key: x for path, whole in flat(current).items() for key, x in split(path, whole).items()}
    assert max(i for _, i in parts) == 2
    states = {(path, i): alone(path).init(x) for (path, i), x in parts.items()}

    @jax.jit
    def expected_step(grads, states, parts):
        found = {key: alone(key[0]).update(g, states[key], parts[key]) for key, g in grads.items()}
        return {key: one[1] for key, one in found.items()}, {key: parts[key] + one[0] for key, one in found.items()}

    for _ in range(3):
        grads = gradients(rng, current)
        clipped, _ = optax.clip_by_global_norm(0.5).update(grads, optax.EmptyState())
        clipped = {key: x for path, whole in flat(clipped).items() for key, x in split(path, whole).items()}
        states, parts = expected_step(clipped, states, parts)
        updates, opt_state = updated(tx, grads, opt_state, current)
        current = optim.apply_changes(current, optim.changes(updates, {"default": rate}, labels), labels)
    for path, whole in flat(current).items():
        for key, x in split(path, whole).items():
            np.testing.assert_allclose(x, parts[key], atol=1e-6, err_msg=str(key))


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_embeddings_head_latents_norms_and_biases_are_adams(preset):
    config = tiny(preset)
    adam = second_moments(optim.optimizer(MUON, params(config)).init(params(config)))
    paths = flat(params(config))
    assert adam == {path for path in paths if path in ADAMS or path.endswith(("/scale", "/bias"))}
    matrices = set(paths) - adam
    assert {"llm/stack_0/exchange/in", "llm/stack_0/layer_0/down/kernel", "vision_to_text/in/kernel"} < matrices
    assert "vision/layers/layer/mlp/out/kernel" in matrices and "llm/head" in adam


def test_updates_are_as_large_as_adams():
    """The root mean square of a matrix's update is about 0.2, whatever its shape."""
    weights = {"a": {"kernel": jnp.zeros((3, 64, 256))}, "b": {"kernel": jnp.zeros((128, 32))}}
    tx = optim.optimizer(MUON, weights)
    updates, _ = updated(tx, gradients(np.random.default_rng(0), weights), tx.init(weights), weights)
    for path, x in flat(updates).items():
        per_matrix = np.sqrt(np.square(np.asarray(x)).reshape(-1, *x.shape[-2:]).mean((1, 2)))
        assert np.all((per_matrix > 0.14) & (per_matrix < 0.24)), (path, per_matrix)


def test_what_had_no_part_in_a_step_stays_and_has_its_own_count():
    stage = dataclasses.replace(MUON, weight_decay=0.1)
    weights = {name: {"kernel": jnp.full((2, 4, 3), 0.5)} for name in "ab"} | {"c": {"bias": jnp.ones(3)}}
    tx, rng = optim.optimizer(stage, weights), np.random.default_rng(0)
    grads = gradients(rng, weights)
    _, first = updated(tx, grads, tx.init(weights), weights)
    updates, second = updated(tx, grads | {"b": {"kernel": jnp.zeros((2, 4, 3))}}, first, weights)
    before, after = (x[1].inner_state[0] for x in (first, second))
    assert after.count.tolist() == [2, 1, 2]
    np.testing.assert_array_equal(after.mu["b"]["kernel"], before.mu["b"]["kernel"])
    assert not np.any(updates["b"]["kernel"]) and np.all(updates["a"]["kernel"] != 0)


def test_a_layer_without_gradient_in_a_stack_stays_finite():
    weights = {"kernel": jnp.zeros((2, 4, 3))}
    grads = {"kernel": jnp.ones((2, 4, 3)).at[0].set(0)}
    tx = optim.optimizer(MUON, weights)
    updates, _ = updated(tx, grads, tx.init(weights), weights)
    assert not np.any(updates["kernel"][0]) and np.all(np.isfinite(updates["kernel"])) and np.any(updates["kernel"][1])


def test_stacks_of_one_size_are_joined_until_devices_have_equally_many_matrices_or_enough():
    shapes = [(2, 4, 8), (8, 4), (3, 4, 4), (2, 8, 4), (4, 4), (2, 8, 4)]
    assert orthogonal.groups(shapes, 1) == [[0], [1], [2], [3], [4], [5]]
    assert orthogonal.groups(shapes, 2) == [[0], [1, 3, 5], [2, 4]]
    assert orthogonal.groups(shapes, 64) == [[0, 1, 3, 5], [2, 4]]
    assert orthogonal.groups([(13, 4, 4), (2, 4, 4), (1, 4, 4)], 3) == [[0], [1, 2]]


# Whole steps, with everything that stands around the optimizer.


FANCY = dataclasses.replace(
    MUON, **FEW_BITS, accumulation=2, freeze=("^vision/layers", "^llm/embedding"), learn_rows=(7, 9),
    learning_rate_by_path={"^vision_to_text/": 3e-3}, weight_decay=0.1,
)  # fmt: skip


@functools.cache
def begun():
    stage, mesh = FANCY, sharding.make_mesh(devices=jax.devices()[:1])
    places = jax.tree.map(lambda x: x.sharding, state.abstract_parameters(CONFIG, mesh))
    weights = jax.device_put(jax.tree.map(jnp.copy, params(CONFIG)), places)
    weights = state.with_masters(weights, stage.master_weights)
    tx, labels = optim.optimizer(stage, weights), optim.labels(stage, weights)
    step = compile_step(Fusion(CONFIG), stage, tx, labels, mesh)
    kept = jax.jit(lambda s, b, r: step(s, b, r))  # inside another jit nothing is donated
    return state.begin(weights, tx, mesh), lambda s, b: kept(s, b, optim.learning_rates(stage, 0, 10))


@functools.cache
def after_two_steps():
    current, step = begun()
    after, first = step(current, mixed_batch(CONFIG))
    return after, *step(after, mixed_batch(CONFIG)), first


def test_steps_lower_the_loss_and_spare_what_is_frozen():
    before, (_, after, last, first) = begun()[0], after_two_steps()
    assert last["total"] < first["total"] - 0.1 and last["skipped"] == 0 and np.isfinite(last["update_norm"])
    old, new = flat(before.params), flat(after.params)
    for path, x in old.items():
        moved = np.abs(np.asarray(new[path] - x, np.float32)).reshape(len(x), -1).max(1)
        if path == "llm/embedding":
            assert moved.nonzero()[0].tolist() == [7, 9]
        elif path.startswith("vision/layers"):
            assert moved.max() == 0, path
    moved = {path: np.abs(np.asarray(new[path] - old[path], np.float32)).mean() for path in old}
    assert moved["vision_to_text/in/kernel"] < 0.5 * moved["text_to_vision/in/kernel"]


def test_the_mean_gradient_is_stored_as_first_moment_says():
    mu = begun()[0].opt_state[1].inner_state[0].mu
    assert mu["vision_to_text"]["in"]["kernel"].codes.dtype == np.int8
    weights = {"kernel": jnp.ones((8, 8))}
    forms = {}
    for name in ("float32", "bfloat16", "int8"):
        tx = optim.optimizer(dataclasses.replace(MUON, first_moment=name), weights)
        opt_state, rng = tx.init(weights), np.random.default_rng(0)
        for _ in range(4):
            updates, opt_state = updated(tx, gradients(rng, weights), opt_state, weights)
        forms[name] = np.asarray(updates["kernel"])
    for name, least in {"bfloat16": 0.999, "int8": 0.98}.items():
        a, b = forms["float32"], forms[name]
        assert not np.array_equal(a, b)
        assert (a * b).sum() > least * np.sqrt((a**2).sum() * (b**2).sum()), name


def test_a_step_that_is_not_finite_changes_only_the_counters():
    step, (_, current, *_) = begun()[1], after_two_steps()
    good = mixed_batch(CONFIG)
    infinite = np.where(good.loss_weights > 0, np.inf, 0).astype(np.float32)
    after, metrics = step(current, dataclasses.replace(good, loss_weights=infinite))
    assert metrics["skipped"] == 1 and after.step == current.step + 1
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (current.params, current.opt_state))


def test_a_run_resumes_with_every_bit(tmp_path):
    first, second, *_ = after_two_steps()
    checkpoints = checkpoint.Checkpoints(tmp_path, {"json": json.dumps({"config": {}})})
    checkpoints.save(1, first, {})
    checkpoints.close()
    _, restored, _ = checkpoints.restore(jax.eval_shape(lambda x: x, first))
    restored = jax.device_put(restored, jax.tree.map(lambda x: x.sharding, first))
    again, _ = begun()[1](restored, mixed_batch(CONFIG))
    assert jax.tree.structure(again) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, again, second)


def test_doctor_and_plan_count_one_moment_for_matrices():
    mesh = sharding.make_mesh()
    sizes = {name: state_bytes(RunConfig(CONFIG, (dataclasses.replace(MUON, optimizer=name),), ""))
             for name in ("adamw", "muon")}  # fmt: skip
    weights = state.abstract_parameters(CONFIG, mesh)
    adam = second_moments(optim.optimizer(MUON, weights).init(params(CONFIG)))
    matrices = sum(x.size for path, x in flat(params(CONFIG)).items() if path not in adam)
    assert sizes["adamw"] - sizes["muon"] == 4 * matrices > 0.3 * sizes["muon"] / 4
    planned = state.abstract(weights, optim.optimizer(MUON, weights), mesh)
    assert program.bytes_per_chip(planned) == sizes["muon"]
