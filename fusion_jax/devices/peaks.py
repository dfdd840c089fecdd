"""Gives the peak FLOP/s of devices, from datasheets or, for kinds without one (CPUs), measured."""

import functools
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

# Dense bfloat16 peak of one JAX device by its kind, FLOP/s. NVIDIA: each one's datasheet, for B200 and GB200 those of
# the DGX B200 and the GB200 NVL72 divided by their GPUs; most print it with sparsity, which is twice as much. TPUs:
# docs.cloud.google.com/tpu/docs; a chip of TPU7x has 2,307 TFLOP/s and is two devices.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "TPU v7x": 1153.5e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}


def datasheet_peak(kind: str) -> float | None:
    """Returns the FLOP/s in bfloat16 of one device of a kind, as JAX names it; None for kinds that are not in PEAKS.

    The longest name with which the kind begins counts, up to the end of a word: an L40S is not an L4.
    """
    if " MIG " in kind:  # a part of a GPU
        return None
    matches = [name for name in PEAKS if re.match(rf"{re.escape(name)}(?!\w)", kind)]
    return PEAKS[max(matches, key=len)] if matches else None


def measured_rate(device: jax.Device, dtype: DTypeLike) -> float:
    """Measures the FLOP/s of square matrix products on one device, of the size from which larger ones are not faster.

    It takes about a second at most. The values are random: with zeros or ones hardware needs less power, and is faster.
    """
    memory = device.memory_stats() or {}
    room = memory["bytes_limit"] - memory.get("bytes_in_use", 0) if "bytes_limit" in memory else math.inf
    product = jax.jit(lambda a: a @ a)
    block = np.random.default_rng(0).standard_normal((256, 256), np.float32)
    size, best = 512, 0.0
    with jax.default_device(device):
        block = jnp.asarray(block, dtype)
        while True:
            a = jnp.tile(block, (size // len(block),) * 2)
            product(a).block_until_ready()
            seconds = min(_seconds(product, a) for _ in range(3))
            rate, before = 2 * size**3 / seconds, best
            best = max(best, rate)
            # Short products measure how fast work is started.
            if seconds > 1e-3 and rate < 1.05 * before:
                return best
            size *= 2
            if 8 * seconds > _LONGEST or 4 * size * size * a.dtype.itemsize > room:
                return best


_LONGEST = 0.1  # seconds of a product that `measured_rate` still tries


def _seconds(function, argument) -> float:
    start = time.perf_counter()
    function(argument).block_until_ready()
    return time.perf_counter() - start


@functools.cache
def peak(dtype: DTypeLike = jnp.bfloat16) -> float:
    """Returns the peak FLOP/s of all devices of all processes: the datasheets', or measured for kinds not in PEAKS.

    Only one device is measured, by the first process, so that all have the same number. A collective: all must call it.
    """
    one = datasheet_peak(jax.devices()[0].device_kind)
    if one is None:
        one = measured_rate(jax.local_devices()[0], dtype)
        if jax.process_count() > 1:
            one = float(multihost_utils.broadcast_one_to_all(np.float32(one)))
    return one * jax.device_count()
