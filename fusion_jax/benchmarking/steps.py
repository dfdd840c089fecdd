"""Measures how long a training step takes, and on which operations it spends the time."""

import dataclasses
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fusion_jax.batch import Batch
from fusion_jax.benchmarking.common import RUN_REPEATS, build_model, equal_batch, times
from fusion_jax.config import MeshConfig, RunConfig, StageConfig, from_dict
from fusion_jax.data import typical
from fusion_jax.devices import flops, op_times, peaks, sharding
from fusion_jax.errors import UserError
from fusion_jax.models import fusion
from fusion_jax.training import optim, state
from fusion_jax.training.memory import explain_memory_errors, memory_in_use
from fusion_jax.training.step import compile_step as compile_train_step

TRACED = 2  # steps


@dataclasses.dataclass(frozen=True)
class Work:
    """A step to time: the computation, its devices and its batch."""

    model: fusion.Fusion
    stage: StageConfig
    mesh: Mesh
    batch: Batch


@dataclasses.dataclass
class CompiledStep:
    """A compiled step with its arguments on the devices, and how many seconds its compilation took."""

    program: jax.stages.Compiled
    state: state.TrainState
    batch: Batch
    rates: dict[str, Any]
    compile_seconds: float

    def run(self) -> dict:
        """Runs one step and keeps the new state. Returns its metrics, which may still be computed."""
        self.state, metrics = self.program(self.state, self.batch, self.rates)
        return metrics


def benchmark_work(config: ConfigDict) -> Work:
    """Makes the step of a benchmark configuration, on equal conversations, one a row."""
    stage = StageConfig(name="benchmark", data="", batch_size=config.batch_size, accumulation=config.accumulation)
    model = build_model(config)
    mesh = sharding.make_mesh(from_dict(MeshConfig, config.get("mesh", {}), "config.mesh"))
    sharding.check_rows(config.batch_size // config.accumulation, mesh, "benchmark")
    batch = equal_batch(model.config, config.batch_size, config.question_tokens, config.answer_tokens)
    return Work(model, stage, mesh, batch)


def compile_step(work: Work) -> CompiledStep:
    """Compiles the step as training does, with random parameters."""
    stage, mesh = work.stage, work.mesh
    sharding.check_model(work.model.config, mesh)
    params = state.with_masters(state.initial_parameters(work.model.config, 0, mesh), stage.master_weights)
    tx, labels = optim.optimizer(stage, params), optim.labels(stage, params)
    current = state.begin(params, tx, mesh)
    batch = sharding.put_batch(sharding.local_rows(work.batch, mesh), mesh)
    start = time.perf_counter()
    rates = optim.learning_rates(stage, 500, 1000)
    step = compile_train_step(work.model, stage, tx, labels, mesh).lower(current, batch, rates).compile()
    return CompiledStep(step, current, batch, rates, time.perf_counter() - start)


def measure(config: ConfigDict, latent_count: int | None, trace: bool) -> dict:
    """Times one whole optimizer step (AdamW, clipping), from the loss to the update.

    For a run's configuration this is a step of the first stage, with typical conversations (`data.typical`). Where that
    does not fit into the devices, it is split into more microbatches, until each device has one row at a time.

    Args:
      latent_count: l^2 of a run's step; None is the largest. trace: whether to list the most expensive operations.
    """
    if "stages" not in config:
        return _time_step(benchmark_work(config), config.batch_size, config.repeats, trace)
    run = from_dict(RunConfig, config.to_dict())
    stage, model = run.stages[0], build_model(config)
    mesh = sharding.make_mesh(run.mesh)
    shards = sharding.batch_shards(mesh)
    while True:
        batch, samples = typical.random_batch(run, stage, shards, latent_count)
        shape = {"rows": len(batch.tokens), "latents": batch.latent_count, "accumulation": stage.accumulation}
        try:
            with explain_memory_errors(run.remat):
                return shape | _time_step(Work(model, stage, mesh, batch), samples, RUN_REPEATS, trace)
        except UserError:
            if len(batch.tokens) <= shards * stage.accumulation:
                raise
        stage = dataclasses.replace(stage, accumulation=2 * stage.accumulation)
        print(f"does not fit; with accumulation {stage.accumulation}:", file=sys.stderr)


def _time_step(work: Work, samples: int, repeats: int, trace: bool) -> dict:
    cost = flops.step_flops(work.model.config, flops.shape_of(work.batch))
    step = compile_step(work)
    jax.block_until_ready(step.run())
    seconds = statistics.median(times(step.run, repeats))
    result = {
        "seconds_per_step": seconds,
        "samples_per_second": samples / seconds,
        "compile_seconds": step.compile_seconds,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        **{key: value for key, value in memory_in_use().items() if key == "hbm_peak_gib"},
        "model_tflop_per_step": cost / 1e12,
        "model_gflop_per_second": cost / seconds / 1e9,
        "mfu": cost / seconds / peaks.peak(work.model.dtype),
    }
    if trace:
        print(json.dumps(result), flush=True)  # printed now, in case the profiler ends the process
        result["operations"] = _trace(step.run, step.program.as_text())
    return result


def _trace(run: Callable, program: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(TRACED):
                results = run()
            jax.block_until_ready(results)
        return op_times.summary(op_times.read(folder), TRACED, program)
