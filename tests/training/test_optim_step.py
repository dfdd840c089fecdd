"""Schedule, rates by path, freezing, decay, clipping, accumulation, skipped steps: against optax and by hand."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from helpers.fixtures import QUESTION_LENGTH, assert_trees_close, example, flat, grad_fn, mixed_batch, params, tiny

from fusion_jax.config import StageConfig
from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import lay_out
from fusion_jax.devices import sharding
from fusion_jax.errors import UserError
from fusion_jax.models.fusion import Fusion
from fusion_jax.training import optim, optimizers, state
from fusion_jax.training.losses import PARTS
from fusion_jax.training.step import compile_step

# As few layers as there can be.
CONFIG = tiny(**{"llm.layers": 1, "exchange.layers": 1, "vision.layers": 2})
STEPS = 10
STAGE = StageConfig("s", "d.json", batch_size=4, learning_rate=1e-2, warmup_ratio=0.2, clip_norm=0.0)


# Schedule.


def published(step, steps, warmup_ratio):
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


@pytest.mark.parametrize(("steps", "ratio"), [(100, 0.03), (10, 0.25), (7, 0.0), (1, 0.03), (250, 0.5)])
def test_schedule_is_the_published_cosine(steps, ratio):
    for step in range(steps + 1):
        expected = published(step, steps, ratio)
        np.testing.assert_allclose(optim.cosine(step, steps, ratio), expected, atol=1e-6)


def test_schedule_begins_at_0_peaks_after_the_warm_up_and_ends_at_0():
    values = [float(optim.cosine(s, 100, 0.03)) for s in range(101)]
    assert values[0] == 0 and values[3] == 1 and values[100] < 1e-7
    np.testing.assert_allclose(values[1:3], [1 / 3, 2 / 3], rtol=1e-6)
    # 0.07 * 100 is 7.000000000000001 in floating point and still means 7 steps.
    assert float(optim.cosine(7, 100, 0.07)) == 1


@pytest.mark.parametrize(
    ("changes", "steps", "words"),
    [
        ({}, 1, "it has 1 step, and the warm-up begins at a learning rate of 0; raise its epochs or steps, lower "
                "batch_size=4, or set warmup_ratio=0"),
        ({"freeze": (".",)}, 9, r"freeze=\['.'\] matches all of them"),
        ({"learning_rate": 0.0}, 9, "learning_rate is 0 for all that are not frozen"),
        ({"learning_rate": 1e-60}, 9, "learning_rate is 0 for all that are not frozen"),
        ({"freeze": ("^llm/",), "learning_rate": 0.0, "learning_rate_by_path": {"^llm/": 1.0}}, 9, "rate is 0"),
        ({"learning_rate": 0.0, "learning_rate_by_path": {"^llm/": 1.0}}, 9, None),
        ({"freeze": ("^vision/",)}, 9, None),
        ({}, 2, None),
        ({"warmup_ratio": 0.0}, 1, None),
    ],
)  # fmt: skip
def test_a_stage_that_would_change_nothing_is_refused(changes, steps, words):
    stage = StageConfig("s", "d", **{"batch_size": 4, "warmup_ratio": 0.03, **changes})
    if words is None:
        optim.check_changes_parameters(stage, steps, params(CONFIG))
        rates = [optim.learning_rates(stage, step, steps) for step in range(steps)]
        assert any(rate > 0 for of_step in rates for rate in of_step.values())
    else:
        with pytest.raises(UserError, match=f"stage 's' would change no parameter: .*{words}"):
            optim.check_changes_parameters(stage, steps, params(CONFIG))


# Labels.


def test_labels_are_by_path_and_the_first_match_wins():
    stage = dataclasses.replace(
        STAGE, freeze=("^vision/",), learning_rate_by_path={"llm/.*embedding$": 1e-3, "^llm/": 2e-3, "embedding": 3e-3}
    )
    chosen = flat(optim.labels(stage, params(CONFIG)))
    for path, label in chosen.items():
        expected = "default"
        if path.startswith("vision/"):
            expected = "frozen"
        elif path == "llm/embedding":
            expected = "llm/.*embedding$"
        elif path.startswith("llm/"):
            expected = "^llm/"
        assert label == expected, path
    assert {str(label) for label in chosen.values()} == {"default", "frozen", "llm/.*embedding$", "^llm/"}
    rates = optim.learning_rates(stage, 2, STEPS)  # the end of the warm-up
    assert {name: round(float(rate), 9) for name, rate in rates.items()} == {
        "default": 1e-2, "llm/.*embedding$": 1e-3, "^llm/": 2e-3, "embedding": 3e-3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"freeze": ("visoin",)}, ("'s'", "'visoin'", "matches no parameter", "vision")),
        ({"learning_rate_by_path": {"lm_head": 1.0}}, ("'s'", "'lm_head'", "matches no parameter", "llm")),
        ({"freeze": ("(",)}, ("'s'", "'('", "regular expression")),
        ({"learning_rate_by_path": {"[": 1.0}}, ("'s'", "'['", "regular expression")),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(changes, words):
    with pytest.raises(UserError) as error:
        optim.labels(dataclasses.replace(STAGE, **changes), params(CONFIG))
    for word in words:
        assert word in str(error.value)


# Steps.


def host(tree):
    """A copy that no donation can take away."""
    return jax.tree.map(np.array, tree)


@functools.cache
def _compiled(accumulation, freeze, rates, decay, clip):
    stage = dataclasses.replace(
        STAGE,
        accumulation=accumulation,
        freeze=freeze,
        learning_rate_by_path=dict(rates),
        weight_decay=decay,
        clip_norm=clip,
        b1=0.8,
        b2=0.9,
        eps=1e-6,
    )
    weights = params(CONFIG)
    labels, tx = optim.labels(stage, weights), optim.optimizer(stage, weights)
    step = compile_step(Fusion(CONFIG), stage, tx, labels, sharding.make_mesh())
    kept = jax.jit(lambda s, b, r: step(s, b, r))  # inside another jit nothing is donated
    return stage, tx, lambda s, b: kept(s, b, optim.learning_rates(stage, int(s.step), STEPS))


def start(stage_of_compiled, at=2):
    """A fresh state at the end of the warm-up, where the factor is 1."""
    fresh = state.create(params(CONFIG), stage_of_compiled[1])
    return dataclasses.replace(fresh, step=jnp.int32(at))


def compiled(accumulation=1, freeze=(), rates=(), decay=0.0, clip=0.0):
    return _compiled(accumulation, freeze, rates, decay, clip)


FANCY = {"freeze": ("^vision/layers", "llm/embedding"), "rates": (("^llm/", 3e-3),), "decay": 0.1, "clip": 0.5}


@functools.cache
def plain_gradients():
    return host(grad_fn(CONFIG)(params(CONFIG), mixed_batch(CONFIG)))


def test_step_equals_optax_adamw():
    """Two steps without options: the same numbers as optax's own AdamW at the same rates."""
    step = compiled()
    current = start(step)
    rates = [published(s, STEPS, STAGE.warmup_ratio) * 1e-2 for s in (2, 3)]
    reference = optax.adamw(lambda count: jnp.asarray(rates)[count], b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.0)
    expected, opt_state = params(CONFIG), reference.init(params(CONFIG))
    for _ in range(2):
        _, grads = grad_fn(CONFIG)(expected, mixed_batch(CONFIG))
        updates, opt_state = jax.jit(reference.update)(grads, opt_state, expected)
        expected = optax.apply_updates(expected, updates)
        current, metrics = step[2](current, mixed_batch(CONFIG))
        np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(grads), rtol=1e-4)
    moved = max(np.abs(a - b).max() for a, b in zip(flat(expected).values(), flat(params(CONFIG)).values()))
    assert moved > 1e-2
    # Biases of keys have gradients of rounding size, which Adam blows up.
    for path, value in flat(current.params).items():
        if not path.endswith(("key/bias", "key_norm/bias")):
            np.testing.assert_allclose(value, flat(expected)[path], atol=2e-4, err_msg=path)


@functools.cache
def fancy_step():
    step = compiled(**FANCY)
    before = start(step)
    after, metrics = step[2](before, mixed_batch(CONFIG))
    return host(before), host(after), host(metrics)


def test_first_step_by_hand_with_freezing_rates_decay_and_clipping():
    before, after, metrics = fancy_step()
    (total, parts), grads = plain_gradients()
    grads, old, new = flat(grads), flat(before.params), flat(after.params)
    frozen = {path for path in grads if path.startswith("vision/layers") or path == "llm/embedding"}
    assert 0 < len(frozen) < len(grads)
    # The norm is that of trained parameters only: nothing is computed for frozen ones.
    norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for p, g in grads.items() if p not in frozen))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    assert norm > 0.5
    for path, g in grads.items():
        if path in frozen:
            np.testing.assert_array_equal(new[path], old[path], err_msg=path)
            continue
        if path.endswith(("key/bias", "key_norm/bias")):
            continue  # no gradient but rounding
        g = g * 0.5 / norm
        # After one step both moments, bias-corrected, are the gradient itself.
        update = g / (np.abs(g) + 1e-6)
        if path.split("/")[-1] not in ("scale", "bias"):
            update = update + 0.1 * old[path]
        rate = 3e-3 if path.startswith("llm/") else 1e-2
        certain = np.abs(g) > 1e-5
        np.testing.assert_allclose(
            (new[path] - old[path])[certain], (-rate * update)[certain], rtol=0.02, atol=2e-5, err_msg=path
        )
    change = math.sqrt(sum(float(((new[p] - old[p]).astype(np.float64) ** 2).sum()) for p in grads))
    np.testing.assert_allclose(metrics["update_norm"], change, rtol=1e-3)
    np.testing.assert_allclose(metrics["total"], total, rtol=1e-5)
    for name, part in parts.items():
        np.testing.assert_allclose(metrics[name], part, rtol=1e-5)


def test_frozen_parameters_have_no_moments():
    before, _, _ = fancy_step()
    adam = before.opt_state[1].inner_state[0]
    moments = [leaf.shape for leaf in jax.tree.leaves((adam.mu, adam.nu))]
    frozen = ("vision/layers", "llm/embedding")
    trained = [value.shape for path, value in flat(before.params).items() if not path.startswith(frozen)]
    assert sorted(moments) == sorted(2 * trained) and adam.count.shape == (len(trained),)


def test_frozen_parameters_get_zero_gradients():
    labels = optim.labels(dataclasses.replace(STAGE, freeze=FANCY["freeze"]), params(CONFIG))

    # A loss that every parameter enters: half of the squares.
    def loss(p):
        return sum(jnp.sum(a * a) / 2 for a in jax.tree.leaves(optim.freeze(p, labels)))

    grads = flat(jax.jit(jax.grad(loss))(params(CONFIG)))
    for path, label in flat(labels).items():
        expected = 0 * grads[path] if label == "frozen" else flat(params(CONFIG))[path]
        np.testing.assert_allclose(grads[path], expected, rtol=1e-6)


def norms(grads):
    """What the optimizer takes besides the gradients."""
    squares = optim.squares(grads)
    return {"norm": optim.norm(squares), "squares": squares}


def test_rows_of_a_frozen_embedding_learn_as_if_nothing_were_frozen():
    """Two rows get Adam's step of the whole table, decay included; the other rows have no moments and no norm."""
    rows = (7, 9)
    stage = dataclasses.replace(STAGE, freeze=("^llm/(?!.*/exchange/)",), learn_rows=rows, weight_decay=0.1)
    weights, (_, grads) = params(CONFIG), plain_gradients()
    labels, tx = optim.labels(stage, weights), optim.optimizer(stage, weights)
    assert labels["llm"]["embedding"] == "rows" and labels["llm"]["head"] == "frozen"
    assert labels["llm"]["stack_0"]["exchange"]["out"]["kernel"] == "default"
    rates = optim.learning_rates(stage, 2, STEPS)
    table = np.asarray(weights["llm"]["embedding"])

    def masked(p):
        return jnp.vdot(optim.freeze(p, labels, rows)["llm"]["embedding"], grads["llm"]["embedding"])

    masked_grads = {**grads, "llm": {**grads["llm"], "embedding": jax.grad(masked)(weights)["llm"]["embedding"]}}
    seen = np.asarray(masked_grads["llm"]["embedding"])
    np.testing.assert_array_equal(seen[list(rows)], np.asarray(grads["llm"]["embedding"])[list(rows)])
    assert np.abs(seen).sum(1).nonzero()[0].tolist() == list(rows)
    updates, opt_state = tx.update(masked_grads, tx.init(weights), weights, **norms(masked_grads))
    changes = optim.changes(updates, rates, labels)
    new = np.asarray(optim.apply_changes(weights, changes, labels, rows)["llm"]["embedding"])
    whole = dataclasses.replace(stage, freeze=(), learn_rows=())
    plain = optim.optimizer(whole, weights)
    expected, _ = plain.update(grads, plain.init(weights), weights, **norms(grads))
    expected = table - 1e-2 * np.asarray(expected["llm"]["embedding"])
    np.testing.assert_allclose(new[list(rows)], expected[list(rows)], rtol=1e-6)
    assert (new != table).any(1).nonzero()[0].tolist() == list(rows)
    shapes = {leaf.shape for leaf in jax.tree.leaves(opt_state)}
    assert (2, CONFIG.llm.width) in shapes and table.shape not in shapes


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"learn_rows": (3,)}, "needs a freeze"), ({"learn_rows": (128,), "freeze": ("^llm/",)}, "has 128 rows, from 0")],
)
def test_rows_that_cannot_be_meant_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        optim.labels(dataclasses.replace(STAGE, **changes), params(CONFIG))


def test_weight_decay_spares_norms_and_biases():
    decayed = flat(optimizers.decays(params(CONFIG)))
    spared = {path for path, decays in decayed.items() if not decays}
    assert spared == {path for path in decayed if path.endswith(("/scale", "/bias"))} and spared
    assert {"llm/embedding", "latents_4", "llm/stack_0/exchange/in"} <= {p for p, decays in decayed.items() if decays}


def test_metrics_count_tokens():
    _, _, metrics = fancy_step()
    batch = mixed_batch(CONFIG)
    visual = int((batch.visual_index >= 0).sum())
    assert visual == 3 * 9 + 4 * 4
    assert metrics["visual_tokens"] == visual
    assert metrics["text_tokens"] == int((batch.segment_ids > 0).sum()) - visual
    assert metrics["skipped"] == 0
    named = {name for name in metrics if not name.startswith("grad_norm/")}
    others = {"total", "grad_norm", "update_norm", "skipped", "text_tokens", "visual_tokens"}
    assert named == others | set(PARTS)
    groups = [metrics[name] for name in set(metrics) - named]
    assert len(groups) >= 4
    np.testing.assert_allclose(np.sqrt(np.sum(np.square(groups))), metrics["grad_norm"], rtol=1e-5)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_changes_nothing(accumulation):
    # The rows supervise 5, 6, 2 and 1 tokens and one has no image: a mean of means would differ.
    results = []
    for parts in (1, accumulation):
        step = compiled(parts)
        results.append(host(step[2](start(step), mixed_batch(CONFIG))))
    (one, metrics), (several, metrics_several) = results
    for name, value in metrics.items():
        np.testing.assert_allclose(metrics_several[name], value, rtol=1e-5, err_msg=name)
    # Moments are the gradients times constants; parameters follow where the gradient is more than rounding.
    for a, b in zip(jax.tree.leaves(several.opt_state), jax.tree.leaves(one.opt_state)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
    for path, value in flat(one.params).items():
        if not path.endswith(("key/bias", "key_norm/bias")):
            np.testing.assert_allclose(flat(several.params)[path], value, atol=1e-4, err_msg=path)


def test_weights_of_products_are_cast_once_for_all_microbatches():
    """The loop over microbatches gets them in bfloat16; everything else, and the sums of gradients, stay float32."""
    model, stage = Fusion(CONFIG, jnp.bfloat16), dataclasses.replace(STAGE, accumulation=2)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    weights = state.abstract_parameters(CONFIG, mesh)
    tx, labels = optim.optimizer(stage, weights), optim.labels(stage, weights)
    step = compile_step(model, stage, tx, labels, mesh)
    rates = optim.learning_rates(stage, 0, STEPS)
    with sharding.use(mesh):
        jaxpr = jax.make_jaxpr(step.function)(state.abstract(weights, tx, mesh), mixed_batch(CONFIG), rates)
    (loop,) = [e for e in jaxpr.eqns[0].params["jaxpr"].eqns if e.primitive.name == "scan" and e.params["length"] == 2]
    inside = {(v.aval.shape, v.aval.dtype) for v in loop.invars if v.aval.ndim > 1}
    expected = {path: x.shape for path, x in flatten_dict(weights, sep="/").items()}
    products = {shape for path, shape in expected.items() if path.split("/")[-1] in ("kernel", "in", "head")}
    assert {shape for shape, dtype in inside if dtype == jnp.bfloat16} >= products
    assert (expected["llm/embedding"], jnp.dtype(jnp.float32)) in inside
    assert {v.aval.dtype for v in loop.outvars} == {jnp.dtype(jnp.float32)}


def test_step_that_is_not_finite_changes_only_the_counters():
    step = compiled()
    good = mixed_batch(CONFIG)
    infinite = np.where(good.loss_weights > 0, np.inf, 0).astype(np.float32)
    bad = dataclasses.replace(good, loss_weights=infinite)
    current = host(step[2](start(step), good)[0])  # moments that are not zero
    after, metrics = current, None
    for count in (1, 2):
        previous, (after, metrics) = after, host(step[2](after, bad))
        assert not np.isfinite(metrics["grad_norm"]) or not np.isfinite(metrics["total"])
        untouched = jax.tree.map(np.array_equal, (after.params, after.opt_state), (current.params, current.opt_state))
        assert jax.tree.all(untouched)
        assert (after.step, after.skipped, after.skipped_in_row) == (previous.step + 1, count, count)
        assert metrics["skipped"] == count
    after, metrics = host(step[2](after, good))
    assert (after.step, after.skipped, after.skipped_in_row) == (6, 2, 0) and metrics["skipped"] == 2
    assert not np.array_equal(after.params["llm"]["embedding"], current.params["llm"]["embedding"])


def test_update_that_is_not_finite_changes_only_the_counters():
    """Loss and gradient may be finite all the same: here a first moment is so large that it overflows."""
    step = compiled()
    current = host(step[2](start(step), mixed_batch(CONFIG))[0])
    adam, *rest = current.opt_state[1].inner_state
    large = jax.tree.map(lambda x: np.full_like(x, 3e38), adam.mu["vision_to_text"])
    adam = adam._replace(mu=adam.mu | {"vision_to_text": large})
    clipping, masked = current.opt_state
    bad = dataclasses.replace(current, opt_state=(clipping, masked._replace(inner_state=(adam, *rest))))
    after, metrics = host(step[2](bad, mixed_batch(CONFIG)))
    assert np.isfinite(metrics["total"]) and np.isfinite(metrics["grad_norm"])
    assert not np.isfinite(metrics["update_norm"])
    untouched = jax.tree.map(np.array_equal, (after.params, after.opt_state), (bad.params, bad.opt_state))
    assert jax.tree.all(untouched)
    assert (after.step, after.skipped, after.skipped_in_row) == (bad.step + 1, 1, 1)


# What had no part in a step.


def test_parameters_without_gradient_stay_and_have_their_own_count_of_steps():
    """As in PyTorch: each parameter goes as if the steps without it had not been."""
    stage = dataclasses.replace(STAGE, weight_decay=0.1, first_moment="float32")
    begin = {"a": {"kernel": jnp.full((2, 3), 0.5)}, "b": {"kernel": jnp.full((3,), -0.3)}, "c": {"scale": jnp.ones(2)}}
    tx, labels = optim.optimizer(stage, begin), optim.labels(stage, begin)
    rates = {"default": 0.01}
    rng = np.random.default_rng(0)
    current, opt_state = begin, tx.init(begin)
    alone = optax.adamw(0.01, stage.b1, stage.b2, stage.eps, weight_decay=0.1, mask=optimizers.decays)
    expected = {name: (begin[name], alone.init(begin[name])) for name in begin}
    for number in range(6):
        grads = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), begin)
        if number not in (3, 5):
            grads["b"]["kernel"] *= 0
        updates, opt_state = tx.update(grads, opt_state, current, **norms(grads))
        current = optim.apply_changes(current, optim.changes(updates, rates, labels), labels)
        for name, (old, moments) in expected.items():
            if name != "b" or number in (3, 5):
                update, moments = alone.update(grads[name], moments, old)
                expected[name] = optax.apply_updates(old, update), moments
    assert opt_state[1].inner_state[0].count.tolist() == [6, 2, 6]
    for name, (value, _) in expected.items():
        assert_trees_close(current[name], value, rtol=1e-6)


def test_a_batch_of_text_alone_moves_nothing_of_the_image_side():
    step = compiled()
    spec = layout_spec(CONFIG, 20, QUESTION_LENGTH, 1)
    texts = [example(CONFIG, seed, image=False) for seed in range(4)]
    batch = lay_out(texts, dataclasses.replace(spec, crops=0), 4)
    with_images = host(step[2](start(step), mixed_batch(CONFIG))[0])
    after, metrics = host(step[2](with_images, batch))
    assert metrics["grad_norm/vision"] == 0 < metrics["grad_norm/llm"]
    before, now = (x.opt_state[1].inner_state[0] for x in (with_images, after))
    language = {path for path in flat(now.mu) if path.startswith("llm/") and "exchange" not in path}
    assert 0 < len(language) < len(flat(now.mu))
    for old, new in ((with_images.params, after.params), (before.mu, now.mu), (before.nu, now.nu)):
        moved = {path for path, value in flat(new).items() if not np.array_equal(value, flat(old)[path])}
        assert moved == language
    counts = flat(jax.tree.unflatten(jax.tree.structure(now.mu), list(now.count)))
    # The only exchange stands behind the last layer: nothing reads it, so it has no part in any step.
    assert {path: int(count) for path, count in counts.items()} == {
        path: 2 if path in language else 0 if "exchange" in path else 1 for path in counts
    }


def test_state_begins_at_zero_with_separate_buffers():
    fresh = state.create(params(CONFIG), compiled()[1])
    assert (int(fresh.step), int(fresh.skipped), int(fresh.skipped_in_row)) == (0, 0, 0)
    pointers = {a.unsafe_buffer_pointer() for a in (fresh.step, fresh.skipped, fresh.skipped_in_row)}
    assert len(pointers) == 3
    assert_trees_close(fresh.params, params(CONFIG), rtol=0)
