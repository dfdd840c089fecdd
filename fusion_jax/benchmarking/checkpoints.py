"""Measures what saving a checkpoint costs training: the loop's wait, and the slowdown of its steps."""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from fusion_jax.benchmarking.steps import benchmark_work, compile_step
from fusion_jax.training.checkpoint import Checkpoints


def measure(config: ConfigDict) -> dict:
    """Measures the median cost of saving a benchmark configuration's state.

    `cost_seconds` is the time that a save adds to training, and `stall_share` is that time over the time of 500 steps;
    `write_seconds` is how long the background thread writes.
    """
    step = compile_step(benchmark_work(config))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(step.state))

    def timed_step() -> float:
        start = time.perf_counter()
        step.run()
        jax.block_until_ready(step.state)
        return time.perf_counter() - start

    timed_step()
    undisturbed, costs, waits, writes = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), {"json": "{}"}, keep=1)
        for number in range(1, config.repeats + 1):
            undisturbed += [timed_step() for _ in range(config.steps_between)]
            usual = statistics.median(undisturbed)
            start = time.perf_counter()
            checkpoints.save(number, step.state, {})
            waits.append(time.perf_counter() - start)
            meanwhile = []
            while checkpoints.writing:
                meanwhile.append(timed_step())
            writes.append(time.perf_counter() - start)
            costs.append(waits[-1] + sum(meanwhile) - usual * len(meanwhile))
            print(f"save {number}: waited {waits[-1]:.2f} s, cost {costs[-1]:.2f} s", file=sys.stderr)
        checkpoints.close()
    seconds, cost = statistics.median(undisturbed), statistics.median(costs)
    return {
        "state_gib": size / 2**30,
        "seconds_per_step": seconds,
        "wait_seconds": statistics.median(waits),
        "write_seconds": statistics.median(writes),
        "cost_seconds": cost,
        "stall_share": cost / (500 * seconds),
    }
