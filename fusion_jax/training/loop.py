"""Runs the steps of a training loop: waits for input, computes, reports, and measures what takes time."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable

import jax

from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data.loader import Fed
from fusion_jax.data.planner import Counts
from fusion_jax.devices import flops, peaks, sharding
from fusion_jax.models import fusion
from fusion_jax.training import metrics, optim, state
from fusion_jax.training.memory import memory_in_use
from fusion_jax.training.watch import Watch

log = logging.getLogger("fusion_jax")


class Loop:
    """Runs and measures the steps of a stage: each waits for its input and computes; a report sums up an interval."""

    def __init__(
        self,
        config: RunConfig,
        stage: StageConfig,
        steps: int,
        start: int,
        model: fusion.Fusion,
        mesh: jax.sharding.Mesh,
        step_fn: Callable,
        phase: Watch,
    ):
        """Sets up the loop of a stage.

        Args:
          steps: the stage's steps (`planner.stage_steps`). start: steps done before. step_fn: from `compile_step`.
        """
        self._config, self._stage, self._steps, self._start = config, stage, steps, start
        self._done = 0.0  # `Fed.done` of the last step
        self._mesh, self._step_fn, self._phase = mesh, step_fn, phase
        self._peak = peaks.peak(model.dtype)
        # The number of shards of a batch, divided by the number that this process holds.
        self._parts = sharding.batch_shards(mesh) / len(sharding.held_shards(mesh))
        self._compiled: set[tuple] = set()  # shapes of batches that have a program
        self._running: deque = deque()  # results of steps that may still be computing
        self._spikes = metrics.Spikes()
        self._begun = time.perf_counter()
        self.begin_interval()

    def begin_interval(self) -> None:
        self.interval = metrics.Interval()

    def wait_for_input(self, batches) -> tuple[Fed, Counts]:
        with self._phase("waiting for input") as waited:
            fed, counts = next(batches)
        # Waiting costs nothing while a step is still computing.
        computing = self._running and not self._running[-1].is_ready()
        self.interval.spend("compute" if computing else "input", waited())
        return fed, counts

    def compute(self, step: int, current: state.TrainState, fed: Fed) -> tuple[state.TrainState, dict]:
        """Returns the next state and the step's values, which may both still be computing."""
        batch = fed.batch
        shape = batch.latent_count, batch.crop_text.shape, batch.round_crop.shape
        if shape not in self._compiled:
            self._compiled.add(shape)
            log.info(
                "%s: compiling the step for l^2 = %d (%d crops, %d question tokens, %d rounds a row)",
                *(self._stage.name, batch.latent_count, *shape[1][1:], shape[2][1]),
            )
        cost = self._parts * flops.step_flops(self._config.model, flops.shape_of(fed.batch))
        rates, self._done = optim.learning_rates(self._stage, fed.done, self._steps), fed.done
        with self._phase("computing") as computed:
            # At most two batches are on the devices: one that a step reads, and one that is copied there meanwhile.
            while len(self._running) > 1:
                jax.block_until_ready(self._running.popleft())
            current, values = self._step_fn(current, sharding.put_batch(fed.batch, self._mesh), rates)
            self._running.append(values["total"])
        self.interval.spend("compute", computed())
        rates = {f"learning_rate/{name}": rate for name, rate in rates.items()}
        self.interval.add(values | rates, fed.samples, cost)
        return current, values

    def report(self, step: int, values: dict) -> dict[str, float]:
        """Returns and logs the values of the interval that ends with this step, and begins the next one."""
        name, steps = self._stage.name, step + max(0, math.ceil(self._steps - self._done - 1))
        with self._phase("computing") as computed:
            jax.block_until_ready(values)
        self.interval.spend("compute", computed())
        report = self.interval.report(self._peak) | memory_in_use()
        spikes = self._spikes.find(step - len(self.interval.fetched()) + 1, self.interval.fetched())
        for text in spikes[:3]:
            log.warning("%s %s", name, text)
        report["spikes"] = len(spikes)
        left = (time.perf_counter() - self._begun) / (step - self._start) * (steps - step)
        log.info(metrics.line(name, step, steps, report, left))
        self.begin_interval()
        return report
