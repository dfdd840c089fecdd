"""The doctor's checks of the devices: which there are, whether they compute correctly, and how fast.

They are tried in a process of their own, so that a driver that hangs, or an unknown compiler flag, which ends the
process that reads it, becomes a line of the report.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Fact:
    """A line of the report: a name and its value, under the heading `section`."""

    section: str
    name: str
    value: str


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that would not work, and what to do. `stops`: training would not start, rather than be slow or fail."""

    stops: bool
    what: str
    do: str


Findings = Iterator[Fact | Problem]


def probe() -> None:
    """Prints one JSON line about the devices; run in a process of its own.

    `devices`: platform, kind, HBM bytes (0 where unknown) and bfloat16 (CPU: float32) matrix rate of each local one;
    `sum`: whether adding over all of them gave the right number.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from fusion_jax.devices import peaks

    local = jax.local_devices()
    accelerator = local[0].platform != "cpu"
    size, dtype = (8192, jnp.bfloat16) if accelerator else (1024, jnp.float32)
    answers = []
    for device in local:
        a = jax.device_put(jnp.ones((size, size), dtype), device)
        right = bool((jax.jit(lambda x: x @ x)(a) == size).all())
        answers.append(
            {
                "platform": device.platform,
                "kind": device.device_kind,
                "memory": (device.memory_stats() or {}).get("bytes_limit", 0) if accelerator else 0,
                "flops": peaks.measured_rate(device, dtype),
                "right": right,
            }
        )
    mesh = jax.make_mesh((len(local),), ("all",), axis_types=(AxisType.Auto,), devices=local)
    ones = jax.device_put(jnp.ones(len(local) * 1024), NamedSharding(mesh, PartitionSpec("all")))
    added = float(jax.jit(jnp.sum)(ones)) == len(local) * 1024
    print(json.dumps({"devices": answers, "count": jax.device_count(), "sum": added}))


def ask_devices(patience: float) -> dict | Problem:
    """Runs `probe` in another process and returns its answer, or the problem that kept it from answering.

    Args:
      patience: seconds that it may take.
    """
    code = "from fusion_jax.devices.device_check import probe; probe()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=patience, env=environment
        )
    except subprocess.TimeoutExpired:
        return Problem(
            True,
            f"The devices did not answer within {patience:g} s.",
            "On a pod all hosts must ask at once (launch/tpu_vm.sh doctor); else a driver hangs: restart the machine.",
        )
    if run.returncode == 0:
        return json.loads(run.stdout.splitlines()[-1])
    return explain(run.stderr, os.environ.get("JAX_PLATFORMS", ""))


def explain(stderr: str, platforms: str) -> Problem:
    """Explains in plain words what ended a process that could not use its devices.

    Args:
      stderr: what it wrote. platforms: JAX_PLATFORMS, empty if it is not set.
    """
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["it ended without a word"]
    for line in lines:
        if "Unknown flag in XLA_FLAGS" in line or "Unknown command line flag" in line:
            variable = "XLA_FLAGS" if "XLA_FLAGS" in line else "LIBTPU_INIT_ARGS"
            flag = line.split(":")[-1] if variable == "XLA_FLAGS" else line.split("flag")[-1]
            return Problem(
                True,
                f"{variable} has a flag that this version does not know: {flag.strip()}.",
                "Take it out; launch/xla_flags.sh prints flags that fit.",
            )
    if "already in use" in stderr or "libtpu_lockfile" in stderr:
        return Problem(True, "The TPU is in use by another process.", "End it (sudo lsof /dev/accel* /dev/vfio/*).")
    if platforms and ("Unable to initialize backend" in stderr or "AssertionError" in lines[-1]):
        return Problem(
            True,
            f"JAX_PLATFORMS={platforms} asks for devices that this machine or installation does not have "
            f"({lines[-1][:200]}).",
            "Unset JAX_PLATFORMS, or install support (pip install -e '.[tpu]' or '.[gpu]').",
        )
    if "out of memory" in stderr.lower() or "RESOURCE_EXHAUSTED" in stderr:
        return Problem(True, "The device's memory is taken.", "End the other process that uses it (nvidia-smi).")
    if "ModuleNotFoundError" in lines[-1]:
        return Problem(True, f"JAX cannot be loaded: {lines[-1][:300]}", "pip install -r requirements.txt")
    return Problem(True, f"JAX cannot use the devices: {lines[-1][:300]}", "Repair it, or set JAX_PLATFORMS=cpu.")


def check_devices(answer: dict | Problem) -> Findings:
    """Checks the answer of `ask_devices`: correct results, and rates against those of the datasheets."""
    if isinstance(answer, Problem):
        yield answer
        return
    from fusion_jax.devices.peaks import datasheet_peak  # needs JAX, which works: it has answered

    for i, device in enumerate(answer["devices"]):
        kind = device["kind"]
        peak = datasheet_peak(kind)
        rate, hbm = device["flops"], device["memory"]
        share = f", {rate / peak:.0%} of the datasheet's {peak / 1e12:.0f}" if peak else ""
        room = f"{hbm / GIB:.1f} GiB, " if hbm else ""
        yield Fact("devices", f"{device['platform']} {i}", f"{kind}: {room}{rate / 1e12:.2f} TFLOP/s{share}")
        if not device["right"]:
            yield Problem(True, f"Device {i} ({kind}) multiplied two matrices of ones wrongly.", "Replace the device.")
        if peak and rate < 0.4 * peak:
            yield Problem(
                False,
                f"Device {i} ({kind}) reaches only {rate / peak:.0%} of its matrix rate.",
                "See whether another process uses it or it is throttled (nvidia-smi -q -d PERFORMANCE).",
            )
    yield Fact("devices", "in all", f"{answer['count']}, {len(answer['devices'])} of them in this process")
    if not answer["sum"]:
        yield Problem(True, "A sum over this machine's devices is wrong.", "Check the links between them (NCCL, ICI).")
    if answer["devices"][0]["platform"] == "cpu" and os.environ.get("JAX_PLATFORMS") != "cpu":
        yield from check_unused_accelerators()


def check_unused_accelerators() -> Findings:
    """Looks for accelerators of this machine that JAX does not use."""
    if Path("/proc/driver/nvidia/version").exists():
        yield Problem(
            False,
            "This machine has an NVIDIA GPU, but JAX computes on the processor.",
            "pip install -e '.[gpu]' (CUDA 13 needs driver 580 or newer; nvidia-smi shows it).",
        )
    if list(Path("/dev").glob("accel[0-9]*")):
        yield Problem(False, "This machine has a TPU, but JAX computes on the processor.", "pip install -e '.[tpu]'.")
