"""Chips to plan for, TPUs (`tpus.py`) and GPUs (`gpus.py`), by the name of their topology."""

from fusion_jax.devices import gpus, tpus
from fusion_jax.errors import UserError, check

Topology = tpus.TpuTopology | gpus.GpuTopology


def topology(name: str, slices: int = 1) -> Topology:
    """v5p:4x4x8: a slice of TPU chips, or several; h100:8x4: GPUs of a node and nodes. `devices()` describes them.

    A program is lowered for them by `sharding.lower` on a mesh of these devices.

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
