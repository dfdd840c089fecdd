"""The card: what it is, and what it can do at most."""

import shutil
import statistics
import subprocess
import time

import jax
import jax.numpy as jnp
from gpu_check.parts import arguments, note, say


def seconds(run, repeats: int = 10) -> float:
    """The median of a function's time; its result is waited for."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def nvidia(field: str) -> str:
    if not shutil.which("nvidia-smi"):
        return "no nvidia-smi"
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()


def main() -> None:
    context = arguments()
    note(jax.print_environment_info(return_string=True))
    device = jax.devices()[0]
    figures = {
        "card": device.device_kind,
        "platform": device.platform,
        "driver": nvidia("driver_version"),
        "nvidia_smi": nvidia("name,memory.total,clocks.max.sm,power.limit"),
        "jax": jax.__version__,
        "memory_gb": (device.memory_stats() or {}).get("bytes_limit", 0) / 1e9,
    }
    failures = []
    if device.platform != ("cpu" if context.dry_run else "gpu"):
        failures.append(f"JAX computes on {device.platform} ({device.device_kind})")
    if jax.device_count() > 1:
        figures["devices"] = jax.device_count()
    say(figures, failures)
    if failures:
        return
    size = 256 if context.dry_run else 8192
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    product = jax.jit(jnp.matmul)
    # Ten in a row: a single one is as long as starting it from here takes.
    figures["matrix_product_tflops_bf16"] = (
        2 * size**3 * 10 / seconds(lambda: [product(a, b) for _ in range(10)]) / 1e12
    )
    length = 1 << (20 if context.dry_run else 30)
    x = jax.random.normal(jax.random.key(2), (length,), jnp.float32)
    change = jax.jit(lambda x: x * 1.5)
    figures["copy_gb_per_second"] = 2 * x.nbytes / seconds(lambda: change(x)) / 1e9
    say(figures, failures)


if __name__ == "__main__":
    main()
