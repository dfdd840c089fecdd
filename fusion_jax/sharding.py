"""Where arrays live: the device mesh and its axis names. The only file that knows them.

One axis so far: `data`. Parameters are replicated; every device computes the rows of the batch that it holds, and
losses and gradients, which are sums, are added up.
"""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fusion_jax.errors import UserError

DATA = "data"


def make_mesh() -> Mesh:
    """All devices in one row along `data`."""
    return jax.make_mesh((jax.device_count(),), (DATA,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch, mesh: Mesh):
    """The batch on the mesh, rows dealt over `data`."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(DATA)))


def check_rows(rows: int, where: str) -> None:
    """UserError where that many rows cannot be dealt evenly."""
    devices = jax.device_count()
    if rows % devices:
        raise UserError(f"{where}: {rows} rows a microbatch do not divide over {devices} devices.")


def sum_over_rows(function, mesh: Mesh):
    """`function(params, batch, totals)`, whose results are sums over rows, run on every device's rows and added up."""

    def local(params, batch, totals):
        return jax.tree.map(lambda x: jax.lax.psum(x, DATA), function(params, batch, totals))

    if mesh.size == 1:
        return function
    specs = (PartitionSpec(), PartitionSpec(DATA), PartitionSpec())
    # The custom VJPs inside are not annotated for replication checking.
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
