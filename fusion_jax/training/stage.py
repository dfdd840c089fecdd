"""Trains one stage: sets up its optimizer, state and input, restores it, and loops over its steps."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax

from fusion_jax.config import StageConfig
from fusion_jax.data.layout import Measured
from fusion_jax.data.loader import training_batches
from fusion_jax.data.planner import stage_is_over, stage_steps
from fusion_jax.devices import board, distributed, sharding
from fusion_jax.errors import RunAgain, UserError
from fusion_jax.models.fusion import Fusion
from fusion_jax.training import checkpoint, optim, resume, state
from fusion_jax.training.about import load_about, with_stage
from fusion_jax.training.checkpoint_folders import FOLDER, order_in
from fusion_jax.training.checks import Inputs
from fusion_jax.training.input_check import InputCheck
from fusion_jax.training.jsonl import truncate_rows
from fusion_jax.training.loop import Loop
from fusion_jax.training.profiling import Profile
from fusion_jax.training.reports import Reports
from fusion_jax.training.saving import FINAL_PATIENCE, STOP_PATIENCE, Saver
from fusion_jax.training.step import compile_step
from fusion_jax.training.stopping import Stop, is_process_lost
from fusion_jax.training.watch import Watch
from fusion_jax.training.writer import Writer

log = logging.getLogger("fusion_jax")


def train_stage(
    inputs: Inputs,
    stage: StageConfig,
    workdir: Path,
    about: dict[str, str],
    model: Fusion,
    params: dict,
    stop: Stop,
    profile: tuple[int, int] | None = None,
) -> dict:
    """Trains a stage from the newest of its checkpoints, or from `params`, and returns the final parameters.

    Args:
      about: the run's entry, see `about.describe_run`. params: may be abstract if there is a checkpoint.

    Raises:
      RunAgain: the run was stopped on request; everything is saved.
      UserError: the stage's folder cannot be used, none of its checkpoints is intact, or too much of the data is bad.
    """
    config, mesh, tokenizer = inputs.config, inputs.mesh, inputs.tokenizer
    source, sizes, validation = inputs.sources[stage.name], inputs.sizes[stage.name], inputs.validation.get(stage.name)
    folder = workdir / stage.name
    logs = distributed.own_folder(folder)
    about = with_stage(about, stage.name, order_in(workdir, stage.name))

    # ---- Optimizer and state.
    params = state.with_masters(params, stage.master_weights)
    tx = optim.optimizer(stage, params)
    step_fn = compile_step(model, stage, tx, optim.labels(stage, params), mesh)

    # ---- Input.
    texts = board.open_board(f"fusion_jax/input/{stage.name}")
    shards, held = sharding.batch_shards(mesh), sharding.held_shards(mesh)
    batches = training_batches(config, stage, source, tokenizer, shards, held, texts, sizes)
    records = InputCheck(config, stage, len(source), logs, held)
    steps = stage_steps(stage, len(source), sizes.samples)

    # ---- Where the stage begins, or continues.
    with explain_start_errors(folder):
        checkpoints = checkpoint.Checkpoints(folder / FOLDER, about, config.keep_checkpoints, config.keep_every)
        restored = checkpoints.restore(state.abstract(params, tx, mesh), functools.partial(_continue_input, batches))
        if restored is not None:
            start, current, _ = restored
            over = stage_is_over(stage, len(source), batches.get_state())
            if inputs.over and not over:  # the last checkpoint was damaged, and some data are trained on again
                _check_inputs(inputs, stage, folder / FOLDER / str(start))
            log.info("%s is over after step %d" if over else "%s continues after step %d", stage.name, start)
        else:
            start, current, over = 0, state.begin(params, tx, mesh), False
        writer = Writer(logs, start, config.wandb_project if distributed.is_first() else "")
        truncate_rows(logs / "bad_records.jsonl", start)
        if validation is not None:
            validation.list_bad(logs, start)
    about_steps = "about " if stage.packing and not stage.steps else ""
    log.info("%s: %d records, %s%d step(s) of %.0f samples", stage.name, len(source), about_steps, steps, sizes.samples)

    # ---- The loop.
    tracer = Profile(profile, folder / "profile")
    parts = (checkpoints, tracer, writer, *([texts] if texts else []), batches)
    with _closed_at_the_end(*parts), Watch(config.hang_minutes) as phase:
        reports = Reports(config, stage, mesh, tokenizer, validation, model, writer, stop)
        loop = Loop(config, stage, steps, start, model, mesh, step_fn, phase)
        saver = Saver(config, checkpoints, lambda step: records.position(step, batches.get_state()), phase)
        reports.run(start, current.params, phase, over)  # the run may have been stopped before they were written
        loop.begin_interval()
        step, last = start, over
        while not last:
            step += 1
            tracer.before(step)
            fed, counts = loop.wait_for_input(batches)
            last = fed.last
            records.note(step, fed, counts)
            if last and step == 1:  # packed rows may hold in one step the samples that were expected to take two
                optim.check_changes_parameters(stage, 1, current.params)
            current, values = loop.compute(step, current, fed)
            stop.nothing_to_lose = False
            tracer.after(step, values)
            stop.after_step()
            # Writing metrics cannot fail, so it may come before the save: a restart from this step has its line.
            if step % config.log_every == 0 or last:
                report = loop.report(step, values)
                writer.scalars(step, report | records.agree(step).scalars() | reports.failures())
                saver.check_skipped(step, current, values)
            # The iterator is right after this step's batch: save before it moves on.
            if last:
                saver.finish(step, current, FINAL_PATIENCE)
                stop.nothing_to_lose = True
            elif saver.is_due(step):
                loop.interval.spend("checkpoint", saver.save(step, current))
            # Everything that may fail comes after the save.
            writer.publish()
            if reports.run(step, current.params, phase, last):
                loop.begin_interval()  # a report is not training time
            if stop.requested and not last:
                saver.finish(step, current, STOP_PATIENCE)
                raise RunAgain(f"stopped after step {step} of {stage.name}, which is saved; start again to go on.")
        if not over:
            _log_untrained(stage, batches.get_state()["waiting"])
    return current.params


def _continue_input(batches, step: int, position: Any) -> None:
    """Makes the input continue after a step. Raises ValueError if `position` is not one after that step."""
    position_step = position.get("step") if isinstance(position, dict) else None
    if position_step != step:
        raise ValueError(f"the state of its input is that after step {position_step!r:.80}, not {step}")
    batches.set_state(position)


def _check_inputs(inputs: Inputs, stage: StageConfig, step_folder: Path) -> None:
    """Raises UserError if data, tokenizer or template are not those of a checkpoint."""
    about, data = load_about(step_folder), inputs.data[stage.name]
    resume.check_inputs(inputs.config, stage, data, inputs.tokenizer, about, step_folder, inputs.accepted)


def _log_untrained(stage: StageConfig, waiting: list) -> None:
    """Logs the records that a stage counted in steps has read and not trained on; after whole epochs there are none."""
    if waiting:
        text = sum(not Measured(*measured).crops for measured in waiting)
        log.info(
            "%s: %d records (%d of text alone) were read and wait for a step after the last; they are not trained",
            *(stage.name, len(waiting), text),
        )


@contextlib.contextmanager
def explain_start_errors(folder: Path) -> Iterator[None]:
    """Raises UserError if a file or folder fails at the start. Later, training continues for as long as it can."""
    try:
        yield
    except OSError as error:
        name, reason = error.filename2 or error.filename or folder, error.strerror or error
        raise UserError(
            f"The run cannot start in {folder} ({name}: {reason}); repair that, make room, or give another --workdir."
        ) from error


class _Closable(Protocol):
    def close(self) -> Any: ...


@contextlib.contextmanager
def _closed_at_the_end(*parts: _Closable) -> Iterator[None]:
    """Closes all parts, in their order, however training ends: a checkpoint that is being written is finished."""
    try:
        yield
    except BaseException as error:
        if jax.process_count() > 1 and (isinstance(error, jax.errors.JaxRuntimeError) or is_process_lost(error)):
            raise  # another process has ended, without which no checkpoint is finished
        for part in parts:
            try:
                part.close()
            except Exception as second:
                log.warning("%s while training ends because of another error: %s", type(second).__name__, second)
        raise
    for part in parts:
        part.close()
