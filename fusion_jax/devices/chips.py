"""Finds the chips to plan for, TPUs (`tpus.py`) or GPUs (`gpus.py`), by the name of their topology."""

from fusion_jax.devices import gpus, tpus
from fusion_jax.errors import UserError, check

Topology = tpus.TpuTopology | gpus.GpuTopology


def topology(name: str, slices: int = 1) -> Topology:
    """Returns the topology of a name: v5p:4x4x8 is a slice of TPU chips, h100:8x4 means 8 GPUs in each of 4 nodes.

    Its `devices()` describes the chips, and `sharding.lower` lowers a program for a mesh of them.

    Args:
      slices: number of TPU slices, which the data centre's network joins.

    Raises:
      UserError: there is no such topology.
    """
    kind = name.partition(":")[0]
    if kind in gpus.CARDS:
        check(
            slices == 1,
            f"--slices={slices} is for TPUs; write the number of nodes into --topology={name}, as in h100:8x4.",
        )
        return gpus.GpuTopology(name)
    if kind in tpus.CHIPS:
        return tpus.TpuTopology(name, slices)
    raise UserError(
        f"--topology={name} is unknown; known ones are, as generation:shape, {tpus.shapes()}; "
        f"as kind:GPUS or kind:GPUSxNODES, {gpus.KNOWN}."
    )
