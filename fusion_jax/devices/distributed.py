"""Several processes that train as one: how they find each other, and what only the first of them does.

All run the same program with the same flags. Each feeds its own rows (`sharding.held_shards`) and takes part in every
compiled step; process 0 alone writes what people read (log, metrics, plots). They share the workdir.
"""

import glob
import json
import logging
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fusion_jax.devices import board
from fusion_jax.errors import UserError, check, first_line

log = logging.getLogger("fusion_jax")

_PIECE = 256  # bytes: texts are gathered in multiples of them, so that few sizes are compiled


def start(address: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the other processes, if there are any, before anything touches a device.

    Args:
      address: host:port of process 0. processes: how many there are. process: the number of this one, from 0. Either
        all three are given, or none, and a Cloud TPU, SLURM or Open MPI knows them.

    Raises:
      UserError: the arguments make no sense, or the others do not answer.
    """
    given = {"coordinator_address": address, "num_processes": processes, "process_id": process}
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        check(processes >= 1, f"--num_processes={processes} must be at least 1.")
        check(0 <= process < processes, f"--process_id={process} must be from 0 to {processes - 1}.")
        _join(address, **given, cluster_detection_method="deactivate")
    elif len(missing) < len(given):
        raise UserError(f"Give --{', --'.join(missing)} as well: several processes need all of {', '.join(given)}.")
    elif _scheduled():
        _join("the cluster's coordinator", local_device_ids=_slurm_devices())
    elif _on_tpu():
        try:
            jax.distributed.initialize()
        except ValueError:  # a TPU that knows of no other machines, as in a notebook
            log.info("no other TPU workers are known; training alone")
    if not is_first():
        log.setLevel(logging.WARNING)


def _join(where: str, **arguments) -> None:
    try:
        jax.distributed.initialize(**arguments)
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"Could not join the other processes at {where}: {reason}") from error


def _scheduled() -> bool:
    """Returns whether SLURM (srun) or Open MPI (mpirun) started several processes."""
    slurm = "SLURM_PROCID" in os.environ and "SLURM_STEP_NODELIST" in os.environ
    return any(
        int(os.environ.get(name, "1")) > 1
        for name, present in (("SLURM_NTASKS", slurm), ("OMPI_COMM_WORLD_SIZE", True))
        if present
    )


def _slurm_devices() -> list[int] | None:
    """Returns this process's devices if SLURM runs one process per machine; JAX itself assumes one per device."""
    tasks, nodes = os.environ.get("SLURM_NTASKS"), os.environ.get("SLURM_STEP_NUM_NODES")
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(gpus))) if tasks is not None and tasks == nodes and gpus.isdigit() else None


def _on_tpu() -> bool:
    wanted = os.environ.get("JAX_PLATFORMS", "")
    return (not wanted or "tpu" in wanted) and bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def is_first() -> bool:
    """Returns whether this is process 0, which writes what people read."""
    return jax.process_index() == 0


def own_folder(folder: Path) -> Path:
    """Returns the folder for this process's metrics and lists: `folder` for the first, one below it for the others."""
    return folder if is_first() else folder / "processes" / str(jax.process_index())


def whole(x: jax.Array) -> np.ndarray:
    """Copies a global array to the host, in every process, with its rows in order wherever its shards are."""
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)


def gather(value: Any) -> list[Any]:
    """Gathers one value, which JSON can hold, from each process, in their order. A collective: all must call it."""
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(-(-int(lengths.max()) // _PIECE) * _PIECE, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths)]


def meet(where: str, patience: float) -> bool:
    """Waits until every process is here. Returns whether all came within `patience` seconds of the first.

    It is not a collective, so that no process waits for ever for one that is inside a collective.

    Args:
      where: a name for this meeting, new each time.

    Raises:
      JaxRuntimeError: another process has ended.
    """
    if jax.process_count() == 1:
        return True
    try:
        board.client().wait_at_barrier(f"fusion_jax/{where}", round(patience * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return False
    return True
