"""Measures the memory that a run uses, and explains the error of one that does not fit into a device."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from fusion_jax.errors import UserError


def memory_in_use() -> dict[str, float]:
    """Returns the GiB in use: on the fullest local device, now and at its peak, if known; and by the host process."""
    values = {}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    for name, key in (("hbm_gib", "bytes_in_use"), ("hbm_peak_gib", "peak_bytes_in_use")):
        used = [stat[key] for stat in stats if key in stat]
        if used:
            values[name] = max(used) / 2**30
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        values["host_gib"] = pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    except OSError:  # not Linux
        pass
    return values


@contextmanager
def explain_memory_errors(remat: str) -> Iterator[None]:
    """Replaces the runtime's report that something does not fit into a device by a UserError that says what helps."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        match = re.search(r"RESOURCE_EXHAUSTED:?\s*([^\n]*)", str(error))
        if not match:
            raise
        raise UserError(
            f"The run does not fit into a device's memory ({match[1][:200].strip()}); what helps, the cheapest first: "
            f"a higher accumulation of the stage, remat=full (now {remat}), a shorter max_length, more devices to "
            "share the parameters (mesh.fsdp), a state in fewer bits (docs/training.md). "
            "python -m fusion_jax.plan says beforehand what fits."
        ) from error
