"""Training: `python -m fusion_jax.train --config configs/quickstart.py --workdir runs/quickstart`.

Trains the stages of the config one after the other, each from the parameters of the one before. Started again with the
same workdir it goes on from the newest checkpoint and gives the same losses as an undisturbed run. Asked to stop
(SIGTERM, Ctrl-C, a preemption notice) it saves and exits with code 75: run me again.
"""

import contextlib
import functools
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from fusion_jax.command_line.cli import define_config, run_main
from fusion_jax.config import RunConfig, StageConfig, from_dict, to_dict
from fusion_jax.data.layout import Measured
from fusion_jax.data.loader import training_batches
from fusion_jax.data.planner import stage_is_over, stage_steps
from fusion_jax.devices import board, distributed, sharding
from fusion_jax.errors import RunAgain, UserError
from fusion_jax.files import write_whole
from fusion_jax.models import fusion
from fusion_jax.training import checkpoint, checks, compiled, ending, lock, metrics, optim, resume, state, watch
from fusion_jax.training import step as train_step
from fusion_jax.training.input_check import InputCheck
from fusion_jax.training.loop import Loop
from fusion_jax.training.reports import Reports

log = logging.getLogger("fusion_jax")

FINAL_PATIENCE = 600.0  # seconds that the last checkpoint of a stage is tried for
STOP_PATIENCE = 20.0  # the same for the one before the run ends on request


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"Unexpected argument {argv[1]!r}; give --config FILE and --workdir DIR.")
    given = flags.FLAGS
    if given.workdir is None or given.config is None:
        raise UserError("Give --config FILE and --workdir DIR.")
    if "://" in given.workdir:
        raise UserError(f"--workdir={given.workdir} must be a folder; mount the bucket and give the folder.")
    profile = watch.parse_steps(given.profile_steps)
    with ending.with_the_others():
        distributed.start(given.coordinator_address, given.num_processes, given.process_id)
        config = from_dict(RunConfig, given.config.to_dict())
        with watch.Stop() as stop, watch.says_when_memory_is_short(config.remat):
            train(config, Path(given.workdir), stop, profile, given.accept_changed)


def train(
    config: RunConfig,
    workdir: Path,
    stop: watch.Stop | None = None,
    profile: tuple[int, int] | None = None,
    accepted: Sequence[str] = (),
) -> None:
    """Runs, or continues, all stages of a config in `workdir`.

    Args:
      stop: asked after every step. profile: (first, last) step to trace, in each stage. accepted: `resume.INPUTS` that
        may have changed since the checkpoint.

    Raises:
      UserError: anything that the person at the terminal can put right.
      RunAgain: stopped on request; the same call goes on.
    """
    with _says_what_fails(workdir):
        # ---- Inputs: everything that can be wrong is looked at before any long work.
        inputs = checks.look(config, workdir, accepted)
        config, mesh, tokenizer = inputs.config, inputs.mesh, inputs.tokenizer
        workdir.mkdir(parents=True, exist_ok=True)
    # One of several processes speaks for all.
    with lock.hold(workdir) if distributed.is_first() else contextlib.nullcontext():
        compiled.keep(workdir / "compiled", distributed.is_first())
        with _says_what_fails(workdir):
            if distributed.is_first():
                write_whole(workdir / "config.json", json.dumps(to_dict(config), indent=2))
            about = checkpoint.describe(config, tokenizer, inputs.origin, inputs.data)

        # ---- Model.
        model = fusion.Fusion(config.model, jnp.dtype(config.dtype), config.remat)
        params = state.abstract_parameters(config.model, mesh)
        log.info(
            "%s parameters, %d device(s) of kind %s (%s) in %d process(es), compute in %s",
            f"{sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)):,}",
            jax.device_count(),
            jax.devices()[0].device_kind,
            ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
            jax.process_count(),
            config.dtype,
        )
        if config.init_from and not inputs.begun:
            folder, params = resume.initial_parameters(config, params)
            log.info("parameters from %s", folder)
        elif not inputs.begun:  # otherwise the stage restores them
            params = state.initial_parameters(config.model, config.seed, mesh)

        # ---- Stages.
        for stage in config.stages[inputs.first :]:
            if stop and stop.requested:
                raise RunAgain(f"stopped before {stage.name}; start again to go on.")
            run = StageRun(inputs, stage, workdir, about)
            params = run.train(model, params, stop or watch.Stop(), profile)
        if not distributed.is_first():
            return
        files = {stage.name: workdir / stage.name / "metrics.jsonl" for stage in config.stages}
        try:
            metrics.plot_losses({name: path for name, path in files.items() if path.exists()}, workdir / "losses.png")
            log.info("done; loss curves in %s", workdir / "losses.png")
        except Exception as error:
            log.warning("done; no loss curves: %s: %s", type(error).__name__, error)


class StageRun:
    """One stage: its data, state, checkpoints and reports."""

    def __init__(self, inputs: checks.Inputs, stage: StageConfig, workdir: Path, about: dict):
        self.config, self.stage = inputs.config, stage
        self.over, self.accepted, self.data = inputs.over, inputs.accepted, inputs.data[stage.name]
        self.folder = workdir / stage.name
        self.reports = distributed.own_folder(self.folder)
        self.mesh, self.tokenizer = inputs.mesh, inputs.tokenizer
        self.source, self.validation = inputs.sources[stage.name], inputs.validation.get(stage.name)
        self.about = checkpoint.of_stage(about, stage.name, checkpoint.order_in(workdir, stage.name))
        self.sizes = inputs.sizes[stage.name]
        self.steps = stage_steps(stage, len(self.source), self.sizes.samples)

    def train(self, model: fusion.Fusion, params, stop: watch.Stop, profile: tuple[int, int] | None = None) -> dict:
        """Trains from `params`, which may be abstract where there is a checkpoint, or from the newest of those.

        Returns the final parameters.

        Raises:
          RunAgain: asked to stop; everything is saved.
          UserError: the stage's folder cannot be used, no checkpoint in it is whole, or too much of the data is bad.
        """
        config, stage, mesh = self.config, self.stage, self.mesh
        # ---- Optimizer and state.
        labels = optim.labels(stage, params)
        tx = optim.optimizer(stage, params)
        step_fn = train_step.compile_step(model, stage, tx, labels, mesh)
        # ---- Input and restore.
        texts = board.open_board(f"fusion_jax/input/{stage.name}")
        shards, held = sharding.batch_shards(mesh), sharding.held_shards(mesh)
        batches = training_batches(config, stage, self.source, self.tokenizer, shards, held, texts, self.sizes)
        records = InputCheck(config, stage, len(self.source), self.reports, held)
        with _says_what_fails(self.folder):
            checkpoints = checkpoint.Checkpoints(
                self.folder / checkpoint.FOLDER, self.about, config.keep_checkpoints, config.keep_every
            )
            restored = checkpoints.restore(state.abstract(params, tx, mesh), functools.partial(_go_on, batches))
            over = restored is not None and stage_is_over(stage, len(self.source), batches.get_state())
            if restored is not None:
                start, current, _ = restored
                if self.over and not over:  # the last checkpoint was damaged, and data are trained again
                    where = self.folder / checkpoint.FOLDER / str(start)
                    about = checkpoint.load_about(where)
                    resume.check_inputs(config, stage, self.data, self.tokenizer, about, where, self.accepted)
                log.info("%s is over after step %d" if over else "%s continues after step %d", stage.name, start)
            else:
                start, current = 0, state.begin(params, tx, mesh)
            writer = metrics.Writer(self.reports, start, config.wandb_project if distributed.is_first() else "")
            metrics.truncate(self.reports / "bad_records.jsonl", start)
            if self.validation is not None:
                self.validation.list_bad(self.reports, start)
        log.info(
            "%s: %d records, %s%d step(s) of %.0f samples",
            *(stage.name, len(self.source), "about " * (stage.packing and not stage.steps), self.steps),
            self.sizes.samples,
        )
        tracer = watch.Profile(profile, self.folder / "profile")
        parts = (checkpoints, tracer, writer, *([texts] if texts else []), batches)
        with _closed_at_the_end(*parts), watch.Watch(config.hang_minutes) as phase:
            reports = Reports(config, stage, mesh, self.tokenizer, self.validation, model, writer, stop)
            loop = Loop(config, stage, self.steps, start, model, mesh, step_fn, phase)
            reports.run(start, current.params, phase, over)  # a stop may have come in between
            loop.begin_interval()
            every = watch.Every(config.checkpoint_minutes)
            step, last = start, over
            while not last:
                step += 1
                tracer.before(step)
                fed, counts = loop.wait_for_input(batches)
                last = fed.last
                records.note(step, fed, counts)
                if last and step == 1:  # packed: it may hold what was expected to take two
                    optim.check_changes_parameters(stage, 1, current.params)
                current, values = loop.compute(step, current, fed)
                stop.nothing_to_lose = False
                tracer.after(step, values)
                stop.after_step()
                # Rows cannot fail, so they may come before the save: a restart from this step has its row.
                if step % config.log_every == 0 or last:
                    report = loop.report(step, values)
                    writer.scalars(step, report | records.agree(step).scalars() | reports.failures())
                    self._check_skipped(step, int(current.skipped_in_row), values, checkpoints)
                # The iterator stands right behind this step's batch: save before it moves on.
                if last:
                    with phase("saving"):
                        checkpoints.finish(step, current, records.position(step, batches.get_state()), FINAL_PATIENCE)
                    stop.nothing_to_lose = True
                elif step % config.checkpoint_every == 0 or every.due(step % config.log_every == 0):
                    with phase("saving") as saved:
                        if int(current.skipped_in_row):  # what the parameters are worth is not known
                            log.warning("no checkpoint of step %d, whose loss, gradient or update is not finite", step)
                        else:
                            checkpoints.save(step, current, records.position(step, batches.get_state()))
                    every.restart()
                    loop.interval.spend("checkpoint", saved())
                # All that may fail comes behind the save.
                writer.publish()
                if reports.run(step, current.params, phase, last):
                    loop.begin_interval()  # a report is not training time
                if stop.requested and not last:
                    with phase("saving"):
                        checkpoints.finish(step, current, records.position(step, batches.get_state()), STOP_PATIENCE)
                    raise RunAgain(f"stopped after step {step} of {stage.name}, which is saved; start again to go on.")
            if not over:
                self._say_what_waits(batches.get_state()["waiting"])
        return current.params

    def _say_what_waits(self, waiting: list) -> None:
        """Of a stage that is counted in steps: what it has read and not trained. Behind epochs nothing waits."""
        if waiting:
            text = sum(not Measured(*measured).crops for measured in waiting)
            log.info(
                "%s: %d records (%d of text alone) were read and wait for a step behind the last; they are not trained",
                *(self.stage.name, len(waiting), text),
            )

    def _check_skipped(self, step: int, in_row: int, values: dict, checkpoints: checkpoint.Checkpoints) -> None:
        if in_row >= self.config.max_skipped_steps:
            # The last update may be what ruined the parameters, and a checkpoint of it would ruin the next start, too;
            # but not where they gave a finite loss and the next update alone is at fault.
            if not all(math.isfinite(float(values[name])) for name in ("total", "grad_norm")):
                checkpoints.distrust(step - in_row)
            raise UserError(
                f"{in_row} steps in a row had a loss, gradient or update that is not finite (max_skipped_steps="
                f"{self.config.max_skipped_steps}); lower the learning rate or look at the data of the last steps"
                + (", or at the parameters that the stage began with." if in_row == step else ".")
            )


@contextlib.contextmanager
def _says_what_fails(folder: Path) -> Iterator[None]:
    """UserError where a file or folder fails at the start. Later, training goes on for as long as it can."""
    try:
        yield
    except OSError as error:
        name, reason = error.filename2 or error.filename or folder, error.strerror or error
        raise UserError(
            f"The run cannot start in {folder} ({name}: {reason}); repair that, make room, or give another --workdir."
        ) from error


@contextlib.contextmanager
def _closed_at_the_end(*parts) -> Iterator[None]:
    """Closes them all, in that order, however training ends: a checkpoint that is being written is finished."""
    try:
        yield
    except BaseException as error:
        if jax.process_count() > 1 and (isinstance(error, jax.errors.JaxRuntimeError) or ending.is_lost(error)):
            raise  # another process is gone, without which no checkpoint is finished
        for part in parts:
            try:
                part.close()
            except Exception as another:
                log.warning("%s while training ends of something else: %s", type(another).__name__, another)
        raise
    for part in parts:
        part.close()


def _go_on(batches, step: int, position) -> None:
    """Input goes on behind a step. ValueError where that is no position behind it."""
    behind = position.get("step") if isinstance(position, dict) else None
    if behind != step:
        raise ValueError(f"the state of its input stands behind step {behind!r:.80}, not {step}")
    batches.set_state(position)


def define_flags() -> None:
    """Those of the command. Not while this file is imported: other commands have flags of the same names."""
    define_config("run configuration")
    flags.DEFINE_string("workdir", None, "folder for checkpoints, metrics and plots")
    flags.DEFINE_list("accept_changed", [], f"go on although these have changed: {', '.join(resume.INPUTS)}")
    flags.DEFINE_string("profile_steps", "", "FIRST:LAST: trace these steps of a stage for XProf")
    # Only where no cluster (TPU, SLURM, Open MPI) says it.
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0 of several")
    flags.DEFINE_integer("num_processes", None, "how many processes train together")
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0")


if __name__ == "__main__":
    define_flags()
    run_main(main)
