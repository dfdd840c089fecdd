"""Defines the pure training step (loss, accumulation, update, metrics) and evaluates the losses."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from fusion_jax.batch import Batch
from fusion_jax.config import StageConfig
from fusion_jax.devices import compiler, sharding
from fusion_jax.models.fusion import Fusion, head_kernel
from fusion_jax.training import losses, optim, optimizers, rounding, state
from fusion_jax.training.state import TrainState


def loss_and_parts(model: Fusion, params, batch: Batch, totals=None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the total loss (float32 scalar) and its parts by name (`losses.PARTS`), from a forward pass.

    Each part is a sum over this batch divided by its count in `totals`, by default the counts of this batch.
    """
    hidden, visual, _ = model.apply({"params": params}, batch)
    return losses_of(model, params, batch, hidden, visual, totals)


def losses_of(model: Fusion, params, batch: Batch, hidden, visual, totals=None):
    """Computes `loss_and_parts` from the results of a forward pass."""
    totals = losses.counts(model.config, batch) if totals is None else totals
    kernel = head_kernel(model.config, params).astype(model.dtype)
    return losses.total_and_parts(model.config, losses.Outputs(batch, hidden, visual, kernel), totals)


def _cast_products(params, places, gather: str, dtype):
    """Casts weights of matrix products as the layers would, but once per step, not at each use in each microbatch.

    Their gradients have the same dtype, and keep it until they are summed. If `gather` is `step`, each device has all
    of these weights from here on; otherwise XLA gathers those of a layer where it is computed.
    """
    flat = flatten_dict(params)
    products = {path: x.astype(dtype) for path, x in flat.items() if path[-1] in state.PRODUCTS}
    if gather == "step":
        flat_places = flatten_dict(places)
        products = sharding.gather(products, {path: flat_places[path] for path in products})
    return unflatten_dict(flat | products)


def _accumulate(grad_fn, params, batch: Batch, totals, stage: StageConfig, mesh: Mesh, step: jax.Array):
    """Sums (loss, parts) and gradients over equal slices of the batch, one at a time.

    The sums are float32, those of gradients of products `stage.gradient_sums`. Gradients of a single slice keep their
    dtype. Devices with copies of the parameters sum their own gradients over the slices, and these sums are added up
    once.
    """
    if stage.accumulation == 1:
        return grad_fn(params, batch, totals)

    def zeros(path, x):
        return jnp.zeros(x.shape, stage.gradient_sums if path[-1].key in state.PRODUCTS else jnp.float32)

    def add(path, total, x, step, number):
        key = rounding.key_of(f"gradient of {jax.tree_util.keystr(path)}", step, number)
        return rounding.write(total.astype(jnp.float32) + x, total, key)

    def run(params, scalars, slices):
        totals, step = scalars
        values, grads = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], slices), totals)
        first = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), values), jax.tree.map_with_path(zeros, grads)

        def body(sums, numbered):
            number, part = numbered
            values, grads = grad_fn(params, part, totals)
            added = jax.tree.map_with_path(functools.partial(add, step=step, number=number), sums[1], grads)
            return (jax.tree.map(jnp.add, sums[0], values), added), None

        return jax.lax.scan(body, first, (jnp.arange(stage.accumulation), slices))[0]

    slices = sharding.microbatches(batch, stage.accumulation, mesh)
    return sharding.summed_over_copies(run, mesh)(params, (totals, step), slices)


def train_step(
    model: Fusion,
    stage: StageConfig,
    tx: optax.GradientTransformation,
    label_tree,
    places: TrainState,
    mesh: Mesh,
    old: TrainState,
    batch: Batch,
    rates: dict[str, jax.Array],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one optimizer step.

    A step whose loss, gradient norm or update norm is not finite changes nothing but the counters.

    Args:
      label_tree: `optim.labels` of the parameters. places: shardings of the state on `mesh`.
      batch: B must be divisible by `stage.accumulation` times the number of shards of its rows.
      rates: learning rate per label. They are arguments, so that stages of equal shapes share a compiled program.

    Returns:
      The new state and float32 scalars: total and its parts (`losses.PARTS`), grad_norm (also by module), update_norm
      (of what is subtracted from the parameters, rates and decay included), skipped, text_tokens, visual_tokens.
    """
    totals = losses.counts(model.config, batch)

    def loss(params, part, totals):
        return loss_and_parts(model, optim.freeze(params, label_tree, stage.learn_rows), part, totals)

    def grad_fn(params, part, totals):
        values, grads = jax.value_and_grad(loss, has_aux=True)(params, part, totals)
        # Scattered as soon as they are computed: no device ever holds all gradients.
        return values, sharding.constrain(grads, places.params)

    weights = _cast_products(old.params, places.params, stage.gather, model.dtype)
    (total, parts), grads = _accumulate(grad_fn, weights, batch, totals, stage, mesh, old.step)
    squares = optim.squares(grads)
    grad_norm = optim.norm(squares)

    def change(grads, opt_state, params):
        updates, opt_state = tx.update(grads, opt_state, params, norm=grad_norm, squares=squares)
        return optim.changes(updates, rates, label_tree), opt_state

    arguments = grads, old.opt_state, old.params
    if stage.optimizer in optimizers.ELEMENTWISE:
        # Computed twice, first for the norm alone: kept for both uses, it would take a copy of all parameters.
        measured, _ = change(*jax.lax.optimization_barrier(arguments))
        changes, opt_state = change(*arguments)
    else:
        changes, opt_state = change(*arguments)
        measured = changes
    update_norm = optim.norm(optim.squares(measured))
    params = optim.apply_changes(old.params, changes, label_tree, stage.learn_rows, old.step)

    finite = jnp.isfinite(total) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
    params, opt_state = jax.tree.map(
        functools.partial(jnp.where, finite), (params, opt_state), (old.params, old.opt_state)
    )
    bad = jnp.where(finite, 0, 1)
    new = TrainState(
        step=old.step + 1,
        params=params,
        opt_state=opt_state,
        skipped=old.skipped + bad,
        skipped_in_row=jnp.where(finite, 0, old.skipped_in_row + 1),
    )
    real = batch.segment_ids > 0
    visual = batch.visual_index >= 0
    metrics = {
        "total": total,
        **parts,
        "grad_norm": grad_norm,
        **{f"grad_norm/{name}": norm for name, norm in optim.group_norms(squares).items()},
        "update_norm": update_norm,
        "skipped": new.skipped.astype(jnp.float32),
        "text_tokens": jnp.sum(real & ~visual).astype(jnp.float32),
        "visual_tokens": jnp.sum(real & visual).astype(jnp.float32),
    }
    return new, metrics


def compile_step(model: Fusion, stage: StageConfig, tx, label_tree, mesh: Mesh) -> sharding.OnMesh:
    """Returns the jitted step (state, batch, rates) -> (state, metrics), which reuses the buffers of the old state.

    The state is sharded as in `state.abstract`, the batch as by `sharding.put_batch`.
    """
    params = state.abstract_parameters(model.config, mesh)
    places = jax.tree.map(lambda x: x.sharding, state.abstract(params, tx, mesh))
    everywhere = sharding.replicated(mesh)
    step = functools.partial(train_step, model, stage, tx, label_tree, places, mesh)
    jitted = jax.jit(
        step,
        in_shardings=(places, sharding.of_rows(mesh), everywhere),
        out_shardings=(places, everywhere),
        donate_argnums=0,
        compiler_options=compiler.options(mesh.devices.flat[0].platform),
    )
    return sharding.OnMesh(jitted, mesh)


def evaluate(model: Fusion, params, batch: Batch):
    """Computes sums of the losses and their counts, float32 scalars by name; the counts include that of `samples`."""
    totals = losses.counts(model.config, batch)
    _, means = loss_and_parts(model, params, batch, totals)
    samples = batch.segment_ids.max(axis=1).sum().astype(jnp.float32)
    return {name: mean * totals[name] for name, mean in means.items()}, totals | {"samples": samples}


def compile_evaluation(model: Fusion, mesh: Mesh) -> sharding.OnMesh:
    """Returns the jitted `evaluate` (params, batch) -> (sums, counts); arguments are sharded as in `compile_step`."""
    places = jax.tree.map(lambda x: x.sharding, state.abstract_parameters(model.config, mesh))
    jitted = jax.jit(
        functools.partial(evaluate, model),
        in_shardings=(places, sharding.of_rows(mesh)),
        out_shardings=sharding.replicated(mesh),
        compiler_options=compiler.options(mesh.devices.flat[0].platform),
    )
    return sharding.OnMesh(jitted, mesh)
