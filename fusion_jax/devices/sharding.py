"""Defines the device mesh, and the mesh axes over which each logical axis is sharded.

No other file knows mesh axes:

    data     shards rows of a batch and copies parameters. It joins the slices of a TPU, over the slow network.
    fsdp     shards rows of a batch, and parameters too: gathered for each layer, gradients scattered back.
    tensor   shards heads, hidden units of MLPs and the vocabulary; devices along it hold the same rows.

Parameters declare logical axes beside their shapes (`models.layers`), activations through `models.partition`. An
optimizer moment is sharded like its parameter. On one device nothing is annotated at all.
"""

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from fusion_jax.config import MeshConfig
from fusion_jax.errors import check
from fusion_jax.models import partition
from fusion_jax.models.config import FusionConfig

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)
ROWS = (DATA, FSDP)

# Logical axis -> mesh axes. An axis that is not listed is not sharded.
RULES = (
    ("batch", ROWS),
    ("rows", DATA),
    ("embed", FSDP),
    ("heads", TENSOR),
    ("mlp", TENSOR),
    ("vocab", TENSOR),
)
# The same among the devices that hold one copy of the parameters, see `summed_over_copies`.
_RULES_OF_A_COPY = (("batch", FSDP), *((name, axis) for name, axis in RULES if axis in (FSDP, TENSOR)))


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Returns (data, fsdp, tensor) with -1 filled in. Raises UserError if they do not multiply to `devices`."""
    sizes = {name: getattr(config, name) for name in AXES}
    fixed = int(np.prod([size for size in sizes.values() if size > 0]))
    written = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if -1 in sizes.values():
        check(devices % fixed == 0, f"config.mesh ({written}): {fixed} does not divide the {devices} device(s).")
        return tuple(devices // fixed if size == -1 else size for size in sizes.values())
    check(
        fixed == devices,
        f"config.mesh ({written}) needs {fixed} device(s), but there are {devices}; set one size to -1, the rest.",
    )
    return tuple(sizes.values())


def make_mesh(config: MeshConfig | None = None, devices: list | None = None) -> Mesh:
    """Makes the mesh over `devices`, by default all; neighbours in the network become neighbours on the mesh.

    Without a config the rows of a batch are sharded over all of them.

    Raises:
      UserError: the sizes do not fit the number of devices or slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config or MeshConfig(), len(devices))
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    if slices > 1 and sizes[0] % slices == 0:
        inner = (sizes[0] // slices, *sizes[1:])
        places = mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        check(
            slices == 1 or devices[0].platform != "tpu",
            f"config.mesh: data={sizes[0]} must be a multiple of the {slices} slices, which only data may span.",
        )
        places = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(places, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of shards of a batch's rows."""
    return mesh.shape[DATA] * mesh.shape[FSDP]


# Checks before anything is compiled.


def check_rows(rows: int, mesh: Mesh, where: str) -> None:
    """Raises UserError if that many rows of a microbatch cannot be sharded evenly. `where` is for the message."""
    shards = batch_shards(mesh)
    check(
        rows % shards == 0,
        f"{where}: {rows} row(s) a microbatch do not divide over {shards} devices "
        f"(mesh data={mesh.shape[DATA]} x fsdp={mesh.shape[FSDP]}).",
    )


def check_model(config: FusionConfig, mesh: Mesh) -> None:
    """Raises UserError, which names the sizes, if the mesh does not divide sizes of the model."""
    fields = {
        TENSOR: (
            ("vision.heads", config.vision.heads),
            ("vision.mlp_dim", config.vision.mlp_dim),
            ("llm.heads", config.llm.heads),
            ("llm.kv_heads", config.llm.kv_heads),
            ("llm.width", config.llm.width),
            ("llm.mlp_dim", config.llm.mlp_dim),
            ("exchange.heads", config.exchange.heads if config.exchange_layers else 0),
            ("llm's padded vocabulary", config.llm.padded_vocab),
        ),
        FSDP: (("vision.width", config.vision.width), ("llm.width", config.llm.width)),
    }
    for axis, sizes in fields.items():
        wrong = [f"{name}={size}" for name, size in sizes if size % mesh.shape[axis]]
        check(not wrong, f"config.mesh: {axis}={mesh.shape[axis]} does not divide the model's {', '.join(wrong)}.")


# Shardings.


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def of_rows(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of axis 0 over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def of_parameters(boxed, mesh: Mesh):
    """Returns the shardings of a tree of parameters, which may be abstract, that still carry their logical axes."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)


def of_optimizer(tx: optax.GradientTransformation, params, shardings, mesh: Mesh):
    """Returns the shardings of `tx`'s state: those of the parameters for their moments, copies for everything else.

    Moments of another shape (Adafactor keeps one of rows and one of columns) are sharded as far as they have the
    parameter's axes.

    Args:
      params: abstract parameters. shardings: their shardings, the same tree.
    """

    def place(moments, parameter, sharding):
        # Mostly one array; several with some optimizers, none for a frozen parameter.
        return jax.tree.map(lambda moment: _of_moment(moment.shape, parameter.shape, sharding), moments)

    return optax.tree_utils.tree_map_params(
        tx,
        place,
        jax.eval_shape(tx.init, params),
        params,
        shardings,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=lambda x: not isinstance(x, dict),  # parameters are nested dicts
    )


def _of_moment(shape: tuple[int, ...], parameter: tuple[int, ...], sharding: NamedSharding) -> NamedSharding:
    """Shards each axis of a moment like the axis of its parameter that it corresponds to, and no other axis.

    With as many dimensions as the parameter, an axis corresponds to the one in the same place, if the sizes are equal;
    with fewer, to the next one of equal size: (R, C) has moments (R,) and (C,), or (R, 1) and (1, C). If several
    sizes are equal any choice is valid.
    """
    if shape == parameter:
        return sharding
    spec = tuple(sharding.spec) + (None,) * (len(parameter) - len(sharding.spec))
    places, start = [], 0
    for i, size in enumerate(shape):
        candidates = [i] if len(shape) == len(parameter) else range(start, len(parameter))
        axis = next((axis for axis in candidates if parameter[axis] == size), None)
        places.append(None if axis is None else spec[axis])
        start = start if axis is None else axis + 1
    return NamedSharding(sharding.mesh, PartitionSpec(*places))


def constrain(tree, shardings):
    """Shards `tree` by these shardings inside a jitted function. Does nothing on one device."""
    leaves = jax.tree.leaves(shardings)
    # Specs alone, so that they also hold where `data` is manual: no parameter is sharded over it.
    specs = jax.tree.map(lambda x: x.spec, shardings)
    return jax.lax.with_sharding_constraint(tree, specs) if leaves[0].mesh.size > 1 else tree


def gather(params, shardings):
    """Gathers parameters along `fsdp` inside a jitted function; what is sharded along `tensor` stays so."""

    def whole(one: NamedSharding) -> NamedSharding:
        return NamedSharding(one.mesh, PartitionSpec(*(None if axis == FSDP else axis for axis in one.spec)))

    return constrain(params, jax.tree.map(whole, shardings))


def summed_over_copies(function, mesh: Mesh):
    """Makes a function of (parameters, scalars, slices) sum its results over `data` after, not within, it.

    Inside, devices along `data` know nothing of each other: each has the rows of the slices that are its own, and no
    gradient is added up over these devices before the function returns. With `tensor` the function stays as it is, and
    gradients are added up in each microbatch: there the compiler fails (jax 0.10.2) at collectives along `tensor`.

    Args:
      function: it returns sums over all rows of the slices, (count, B / count, ...) as from `microbatches`. Sums of
        fewer bits are added up, and returned, in float32: on CPU the compiler aborts at collectives of bfloat16.
    """
    if mesh.shape[DATA] == 1 or mesh.shape[TENSOR] > 1:
        return function

    def local(*arguments):
        with nn.logical_axis_rules(_RULES_OF_A_COPY):
            return jax.lax.psum(jax.tree.map(lambda x: x.astype(jnp.float32), function(*arguments)), DATA)

    everywhere, rows = PartitionSpec(), PartitionSpec(None, DATA)
    return jax.shard_map(
        local, in_specs=(everywhere, everywhere, rows), out_specs=everywhere, axis_names={DATA}, check_vma=False
    )


# Running.


@contextlib.contextmanager
def use(mesh: Mesh):
    """Makes functions traced or called inside use `mesh`: kernels for its devices, logical constraints for its axes.

    On one device constraints do nothing.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(partition.compiled_for(mesh.devices.flat[0].platform))
        if mesh.size > 1:
            # Linen's constraints silently do nothing unless the mesh is set like this.
            stack.enter_context(jax.set_mesh(mesh))
            stack.enter_context(nn.logical_axis_rules(RULES))
        yield


def lower(function, mesh: Mesh, *arguments):
    """Lowers a jitted function for the devices of `mesh`, which this machine need not have: see `devices.chips`.

    Args:
      arguments: arrays, or shapes with shardings on `mesh`.
    """
    device = mesh.devices.flat[0]
    with _described(device) if mesh.size == 1 else contextlib.nullcontext(), use(mesh):
        # Without a platform JAX looks for a client of it, which a device that is only described does not have.
        return function.trace(*arguments).lower(lowering_platforms=(_program_for(device.platform),))


def _program_for(platform: str) -> str:
    """Returns the name of a platform's programs: JAX calls NVIDIA's devices gpu and programs for them cuda."""
    return "cuda" if platform == "gpu" else platform


def _described(device):
    """Tells Triton kernels which GPU they are for, if that is a single device that is only described.

    They ask this machine's GPU or, with several devices, the mesh; a single device has no mesh.
    """
    if device.platform != "gpu" or jax.default_backend() == "gpu":
        return contextlib.nullcontext()
    kind = AbstractDevice(device_kind=device.device_kind, num_cores=device.core_count, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind))


@dataclass(frozen=True)
class OnMesh:
    """A jitted function that is always traced, lowered and called under its mesh."""

    function: Any
    mesh: Mesh

    def __call__(self, *arguments):
        with use(self.mesh):
            return self.function(*arguments)

    def lower(self, *arguments):
        return lower(self.function, self.mesh, *arguments)


# Batches.


def microbatches(batch, count: int, mesh: Mesh):
    """Reshapes every (B, ...) of a batch to (count, B / count, ...): each device cuts its own rows, nothing moves."""
    shards = batch_shards(mesh)

    def cut(x):
        own = x.shape[0] // shards // count
        parts = x.reshape(shards, count, own, *x.shape[1:]).swapaxes(0, 1).reshape(count, shards * own, *x.shape[1:])
        return constrain(parts, NamedSharding(mesh, PartitionSpec(None, ROWS)))

    return jax.tree.map(cut, batch)


@functools.cache
def held_shards(mesh: Mesh) -> tuple[int, ...]:
    """Returns the numbers of the row shards that are, at least in part, on this process's devices; ascending.

    A process feeds all rows of these, and processes that share a `tensor` group feed the same rows. The numbers need
    not be consecutive: the mesh follows the network, in which the chips of a host form a square.
    """
    places = mesh.devices.reshape(batch_shards(mesh), -1)
    here = jax.process_index()
    return tuple(i for i, devices in enumerate(places) if any(device.process_index == here for device in devices))


def local_rows(batch, mesh: Mesh):
    """Returns the rows of a whole batch that this process feeds, shard by shard."""
    shards, held = batch_shards(mesh), held_shards(mesh)
    if len(held) == shards:
        return batch

    def cut(x):
        size = len(x) // shards
        return np.concatenate([x[shard * size : (shard + 1) * size] for shard in held])

    return jax.tree.map(cut, batch)


def put_batch(rows, mesh: Mesh):
    """Puts this process's rows (`local_rows`) on its devices, as its part of a global batch sharded by `of_rows`."""
    sharding, shards, held = of_rows(mesh), batch_shards(mesh), held_shards(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(rows, sharding)

    def put(x):
        size = len(x) // len(held)
        first = {shard * size: i * size for i, shard in enumerate(held)}  # row of the batch: row of this process

        def part(index):
            start = first[index[0].start or 0]
            return x[start : start + size]

        return jax.make_array_from_callback((shards * size, *x.shape[1:]), sharding, part)

    return jax.tree.map(put, rows)
