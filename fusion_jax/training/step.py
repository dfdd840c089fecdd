"""The pure training step: loss, accumulation, update, metrics."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from fusion_jax.batch import Batch
from fusion_jax.config import StageConfig
from fusion_jax.devices import sharding
from fusion_jax.models.fusion import Fusion, head_kernel
from fusion_jax.training import losses, optim, state
from fusion_jax.training.state import TrainState

# By default the TPU compiler cuts a product with a dealt weight into as many as there are parts, each a hop of the ring
# away: over 128 chips they are 32 wide, which idles the matrix unit, and take many minutes to compile.
TPU_OPTIONS = {
    "xla_tpu_enable_windowed_einsum_for_all_gather": "false",
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": "false",
}


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """What the compiler is told of a program for the mesh's devices."""
    return TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None


def loss_and_parts(model: Fusion, params, batch: Batch, totals=None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """CE + lambda (L_v2t + L_t2v), each a sum over this batch divided by `totals` (default: this batch's own counts).

    Returns:
      The total loss (float32 scalar) and its parts: `ce`, `v2t`, `t2v`.
    """
    hidden, visual, _ = model.apply({"params": params}, batch)
    return losses_of(model, params, batch, hidden, visual, totals)


def losses_of(model: Fusion, params, batch: Batch, hidden, visual, totals=None):
    """`loss_and_parts` from the results of a forward pass."""
    config = model.config
    totals = losses.counts(batch, config.vision.patches) if totals is None else totals
    kernel = head_kernel(config, params).astype(model.dtype)
    sums = {
        "ce": losses.cross_entropy_sum(hidden, kernel, batch.targets, batch.loss_weights, config.llm.vocab_size),
        "v2t": jnp.float32(0),
        "t2v": jnp.float32(0),
    }
    if visual is not None and config.mapping_loss_weight > 0:
        sums["v2t"], sums["t2v"] = losses.mapping_loss_sums(visual, batch.crop_kind, batch.crop_text_mask)
    parts = {name: value / jnp.maximum(totals[name], 1.0) for name, value in sums.items()}
    return parts["ce"] + config.mapping_loss_weight * (parts["v2t"] + parts["t2v"]), parts


# The last names of parameters that only matrix products read, in the dtype of the computation.
_PRODUCTS = ("kernel", "in", "head")


def _cast_products(params, dtype):
    """Weights of matrix products as the layers would cast them: once a step, not at every use in every microbatch.

    Gradients of them come out of the products in that dtype, and are held in it until they are summed.
    """
    flat = flatten_dict(params)
    return unflatten_dict({path: x.astype(dtype) if path[-1] in _PRODUCTS else x for path, x in flat.items()})


def _accumulate(grad_fn, params, batch: Batch, microbatches: int, mesh: Mesh):
    """Sum of (loss, parts) and gradients over equal slices of the batch, one at a time; all float32."""
    if microbatches == 1:
        return jax.tree.map(lambda x: x.astype(jnp.float32), grad_fn(params, batch))
    slices = sharding.microbatches(batch, microbatches, mesh)
    first = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], slices))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), first)

    def body(total, part):
        return jax.tree.map(jnp.add, total, grad_fn(params, part)), None

    return jax.lax.scan(body, zeros, slices)[0]


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
    """One optimizer step.

    A step whose loss, gradient norm or update norm is not finite changes nothing but the counters.

    Args:
      label_tree: `optim.labels` of the parameters. places: shardings of the state on `mesh`.
      batch: B must be divisible by `stage.accumulation` times the devices that rows are dealt over.
      rates: learning rate per label. Arguments, so that stages of equal shapes are one compiled program.

    Returns:
      The new state and float32 scalars: total, ce, v2t, t2v, grad_norm (also by module), update_norm (of what is
      subtracted from the parameters, rates and decay included), skipped, text_tokens, visual_tokens.
    """
    totals = losses.counts(batch, model.config.vision.patches)

    def loss(params, part):
        return loss_and_parts(model, optim.freeze(params, label_tree, stage.learn_rows), part, totals)

    def grad_fn(params, part):
        values, grads = jax.value_and_grad(loss, has_aux=True)(params, part)
        # Scattered as soon as they are made: no device ever holds all gradients.
        return values, sharding.constrain(grads, places.params)

    weights = _cast_products(old.params, model.dtype)
    (total, parts), grads = _accumulate(grad_fn, weights, batch, stage.accumulation, mesh)
    squares = optim.squares(grads)
    grad_norm = optim.norm(squares)

    def change(grads, opt_state, params):
        updates, opt_state = tx.update(grads, opt_state, params, norm=grad_norm, squares=squares)
        return optim.changes(updates, rates, label_tree), opt_state

    # Computed twice, the first time for its norm alone: kept for both it would be one more copy of all parameters.
    first, _ = change(*jax.lax.optimization_barrier((grads, old.opt_state, old.params)))
    update_norm = optim.norm(optim.squares(first))
    changes, opt_state = change(grads, old.opt_state, old.params)
    params = optim.apply_changes(old.params, changes, label_tree, stage.learn_rows)

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
    """The jitted step (state, batch, rates) -> (state, metrics); the old state's buffers are reused.

    The state lies as `state.abstract` says, the batch as `sharding.put_batch` puts it.
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
        compiler_options=compiler_options(mesh),
    )
    return sharding.OnMesh(jitted, mesh)
