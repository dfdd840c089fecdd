"""The steps of a training loop, and where its time goes."""

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
from fusion_jax.training import metrics, optim, state, watch

log = logging.getLogger("fusion_jax")


class Loop:
    """The steps of a stage and what they cost: each waits for its input and computes; a report sums up an interval."""

    def __init__(
        self,
        config: RunConfig,
        stage: StageConfig,
        steps: int,
        start: int,
        model: fusion.Fusion,
        mesh: jax.sharding.Mesh,
        step_fn: Callable,
        phase: watch.Watch,
    ):
        """Args: steps of the stage (`planner.stage_steps`); start: those done before; step_fn: of
        `train_step.compile_step`."""
        self._config, self._stage, self._steps, self._start = config, stage, steps, start
        self._done = 0.0  # `Fed.done` of the last step
        self._mesh, self._step_fn, self._phase = mesh, step_fn, phase
        self._peak = peaks.peak(model.dtype)
        self._parts = sharding.batch_shards(mesh) / len(sharding.held_shards(mesh))  # of a batch, each like ours
        self._compiled: set[int] = set()  # l^2 of the programs
        self._running: deque = deque()  # results of the steps that may still compute
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
        """The next state and the step's values, which may both still be computing."""
        if fed.batch.latent_count not in self._compiled:
            self._compiled.add(fed.batch.latent_count)
            log.info("%s: compiling the step for l^2 = %d", self._stage.name, fed.batch.latent_count)
        cost = self._parts * flops.step_flops(self._config.model, flops.shape_of(fed.batch))
        rates, self._done = optim.learning_rates(self._stage, fed.done, self._steps), fed.done
        with self._phase("computing") as computed:
            # Two batches at most are on the devices: one that a step reads, one put there meanwhile.
            while len(self._running) > 1:
                jax.block_until_ready(self._running.popleft())
            current, values = self._step_fn(current, sharding.put_batch(fed.batch, self._mesh), rates)
            self._running.append(values["total"])
        self.interval.spend("compute", computed())
        rates = {f"learning_rate/{name}": rate for name, rate in rates.items()}
        self.interval.add(values | rates, fed.samples, cost)
        return current, values

    def report(self, step: int, values: dict) -> dict[str, float]:
        """The values of the interval that ends with this step, which are also logged; the next one begins."""
        name, steps = self._stage.name, step + max(0, math.ceil(self._steps - self._done - 1))
        with self._phase("computing") as computed:
            jax.block_until_ready(values)
        self.interval.spend("compute", computed())
        report = self.interval.report(self._peak) | watch.memory()
        spikes = self._spikes.look(step - len(self.interval.fetched()) + 1, self.interval.fetched())
        for text in spikes[:3]:
            log.warning("%s %s", name, text)
        report["spikes"] = len(spikes)
        left = (time.perf_counter() - self._begun) / (step - self._start) * (steps - step)
        log.info(metrics.line(name, step, steps, report, left))
        self.begin_interval()
        return report
