"""Several processes that train as one: how they find each other, and what only the first of them does.

All run the same program on the same flags. Each feeds its own rows (`sharding.held_shards`) and takes part in every
compiled step; process 0 alone writes what people read (log, metrics, plots). They share the workdir.
"""

import contextlib
import glob
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from fusion_jax.errors import AGAIN, UserError, check, first_line

log = logging.getLogger("fusion_jax")

# In the error texts of collectives (gloo, NCCL, TPU) and of JAX's coordination service when a process is gone.
_LOST = ("Gloo", "gloo", "onnection", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "barrier", "heartbeat", "ABORTED")


def start(address: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the other processes, before anything touches a device. Alone where there are none.

    Args:
      address: host:port of process 0. processes: how many there are. process: which this one is, from 0. All three or
        none: then a Cloud TPU, SLURM or Open MPI says it.

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
        except ValueError:  # a TPU that tells of no other machines, as in a notebook
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
    """Whether SLURM (srun) or Open MPI (mpirun) started several of us."""
    slurm = "SLURM_PROCID" in os.environ and "SLURM_STEP_NODELIST" in os.environ
    return any(
        int(os.environ.get(name, "1")) > 1
        for name, present in (("SLURM_NTASKS", slurm), ("OMPI_COMM_WORLD_SIZE", True))
        if present
    )


def _slurm_devices() -> list[int] | None:
    """This process's devices where SLURM runs one on each machine; JAX itself assumes one process a device."""
    tasks, nodes = os.environ.get("SLURM_NTASKS"), os.environ.get("SLURM_STEP_NUM_NODES")
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(gpus))) if tasks is not None and tasks == nodes and gpus.isdigit() else None


def _on_tpu() -> bool:
    wanted = os.environ.get("JAX_PLATFORMS", "")
    return (not wanted or "tpu" in wanted) and bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


@contextlib.contextmanager
def ends_with_the_others() -> Iterator[None]:
    """Ends this process with a sentence and the exit code AGAIN where another one of the run has died.

    It ends at once: the usual way out waits for the dead.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = first_line(error)
        if jax.process_count() == 1 or not any(word in str(error) for word in _LOST):
            raise
        with contextlib.suppress(OSError):  # of a log on a full disk
            print(
                f"Another process of this run has ended or cannot be reached ({reason[:200]}); start all of them "
                "again: training goes on from the newest checkpoint.",
                file=sys.stderr,
                flush=True,
            )
            sys.stdout.flush()
        os._exit(AGAIN)


def is_first() -> bool:
    """Whether this is the process that writes what people read."""
    return jax.process_index() == 0


def own_folder(folder: Path) -> Path:
    """Where this process writes its metrics and lists: the folder itself for the first, one beside for each other."""
    return folder if is_first() else folder / "processes" / str(jax.process_index())


def whole(x: jax.Array) -> np.ndarray:
    """A global array on the host, in every process, its rows in their own order wherever its parts lie."""
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)


def wait_for_all(where: str) -> None:
    """Returns once every process has come here; `where` is a word for logs, the same in all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def of_first(value: bool | int) -> int:
    """The value that process 0 has, in every process: for what all must decide alike."""
    if jax.process_count() == 1:
        return int(value)
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def table_of_first(rows: Sequence[Sequence[int]], columns: int) -> list[list[int]]:
    """The rows of whole numbers, below 2^31, that process 0 has, in every process."""
    table = np.zeros((of_first(len(rows)), columns), np.int32)
    if is_first():
        table[:] = np.reshape(rows, table.shape)
    if jax.process_count() > 1:
        table = multihost_utils.broadcast_one_to_all(table)
    return table.tolist()


def everywhere(value: bool) -> bool:
    """Whether it is true in every process."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.array(value)).all())
