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
import tempfile
import time
from collections import deque
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from fusion_jax import (
    checkpoint,
    distributed,
    flops,
    generate,
    lock,
    losses,
    metrics,
    optim,
    resume,
    sharding,
    state,
    train_step,
    watch,
)
from fusion_jax.cli import define_config, run_main
from fusion_jax.config import RunConfig, StageConfig, from_dict, to_dict
from fusion_jax.data import conversation, pipeline, sources
from fusion_jax.data.tokenizer import Tokenizer, load_tokenizer
from fusion_jax.errors import BadRecord, RunAgain, UserError
from fusion_jax.evals.registry import find_tasks
from fusion_jax.evals.runner import evaluate_tasks
from fusion_jax.models import fusion

log = logging.getLogger("fusion_jax")

_CONFIG = define_config("run configuration")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder for checkpoints, metrics and plots")
_PROFILE = flags.DEFINE_string("profile_steps", "", "FIRST:LAST: trace these steps of a stage for XProf")
# Only where no cluster (TPU, SLURM, Open MPI) says it.
_ADDRESS = flags.DEFINE_string("coordinator_address", None, "host:port of process 0 of several")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes train together")
_PROCESS = flags.DEFINE_integer("process_id", None, "which of them this is, from 0")
FINAL_PATIENCE = 600.0  # seconds that the last checkpoint of a stage is tried for
STOP_PATIENCE = 20.0  # the same for the one before the run ends on request


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"Unexpected argument {argv[1]!r}; give --config FILE and --workdir DIR.")
    if _WORKDIR.value is None or _CONFIG.value is None:
        raise UserError("Give --config FILE and --workdir DIR.")
    if "://" in _WORKDIR.value:
        raise UserError(f"--workdir={_WORKDIR.value} must be a folder; mount the bucket and give the folder.")
    profile = watch.parse_steps(_PROFILE.value)
    distributed.start(_ADDRESS.value, _PROCESSES.value, _PROCESS.value)
    config = from_dict(RunConfig, _CONFIG.value.to_dict())
    with distributed.ends_with_the_others(), watch.Stop() as stop, watch.says_when_memory_is_short(config.remat):
        train(config, Path(_WORKDIR.value), stop, profile)


def train(config: RunConfig, workdir: Path, stop: watch.Stop | None = None, profile=None) -> None:
    """Runs, or continues, all stages of a config in `workdir`.

    Args:
      stop: asked after every step. profile: (first, last) step to trace, in each stage.

    Raises:
      UserError: anything that the person at the terminal can put right.
      RunAgain: stopped on request; the same call goes on.
    """
    # ---- Where to go on: the last stage that has a checkpoint.
    begun = [i for i, stage in enumerate(config.stages) if checkpoint.steps_in(_checkpoints(workdir, stage))]
    first = begun[-1] if begun else 0
    # ---- Inputs: everything that can be wrong is looked at before any long work.
    scratch = tempfile.TemporaryDirectory()  # lives as long as this function
    if config.init_from:
        config, tokenizer, origin = resume.start_from(
            config, workdir if begun else Path(config.init_from), scratch.name
        )
    else:
        tokenizer, origin = load_tokenizer(config.tokenizer), {}
    _check_tokenizer(config, tokenizer)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_model(config.model, mesh)
    for stage in config.stages:
        if not stage.packing:  # which deals its rows to the devices itself
            sharding.check_rows(stage.batch_size // stage.accumulation, mesh, f"stage {stage.name!r}")
    record_sources = {stage.name: pipeline.open_source(config, stage) for stage in config.stages}
    records = {name: len(source) for name, source in record_sources.items()}
    if begun:
        stage = config.stages[first]
        folder = _checkpoints(workdir, stage)
        saved = resume.newest_about(folder)
        if saved is not None:
            resume.check(config, stage, records[stage.name], saved, folder)
    validation = sources.load_source(config.validation_data) if config.validation_data else None
    if config.evaluate_every:
        _check_evaluation(config)
    if config.wandb_project:
        metrics.import_wandb()
    workdir.mkdir(parents=True, exist_ok=True)
    # One of several processes speaks for all.
    with lock.hold(workdir) if distributed.is_first() else contextlib.nullcontext():
        _cache_compiled_programs(workdir)
        if distributed.is_first():
            (workdir / "config.json").write_text(json.dumps(to_dict(config), indent=2))
        about = checkpoint.describe(config, tokenizer, origin, records)

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
        if config.init_from and not begun:
            folder = checkpoint.find(config.init_from)
            params = checkpoint.load_params(folder, params)
            log.info("parameters from %s", folder)
        elif not begun:  # otherwise the stage restores them
            params = state.initial_parameters(config.model, config.seed, mesh)

        # ---- Stages.
        for stage in config.stages[first:]:
            if stop and stop.requested:
                raise RunAgain(f"stopped before {stage.name}; start again to go on.")
            run = StageRun(config, stage, workdir, mesh, tokenizer, record_sources[stage.name], validation, about)
            params = run.train(model, params, stop or watch.Stop(), profile)
        if not distributed.is_first():
            return
        files = {stage.name: workdir / stage.name / "metrics.jsonl" for stage in config.stages}
        metrics.plot_losses({name: path for name, path in files.items() if path.exists()}, workdir / "losses.png")
        log.info("done; loss curves in %s", workdir / "losses.png")


def _check_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.model.llm.vocab_size:
        raise UserError(
            f"config.model.llm.vocab_size={config.model.llm.vocab_size} is smaller than the {tokenizer.vocab_size} "
            f"tokens of {config.tokenizer or config.init_from}."
        )
    conversation.stop_ids(tokenizer, conversation.find_template(config.template))


def _check_evaluation(config: RunConfig) -> None:
    if not config.evaluation_tasks or not Path(config.evaluation_data).is_dir():
        raise UserError(
            f"config.evaluate_every={config.evaluate_every} needs evaluation_tasks (they are "
            f"{list(config.evaluation_tasks)}) and the folder evaluation_data (it is {config.evaluation_data!r})."
        )
    find_tasks(config.evaluation_tasks)


def _cache_compiled_programs(workdir: Path) -> None:
    """Restarts and stages of equal shapes compile nothing again. A cache chosen by the user is left alone."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").absolute()))


def _checkpoints(workdir: Path, stage: StageConfig) -> Path:
    return workdir / stage.name / checkpoint.FOLDER


class StageRun:
    """One stage: its data, state, checkpoints and reports."""

    def __init__(self, config, stage, workdir, mesh, tokenizer, source, validation, about):
        self.config: RunConfig = config
        self.stage: StageConfig = stage
        self.folder: Path = workdir / stage.name
        self.reports: Path = distributed.own_folder(self.folder)
        self.mesh: jax.sharding.Mesh = mesh
        self.tokenizer: Tokenizer = tokenizer
        self.source: sources.RecordSource = source
        self.validation: sources.RecordSource | None = validation
        self.about: dict = about
        self.steps = pipeline.stage_steps(stage, len(source))
        self.bad_to_show = 5  # in the log; bad_records.jsonl has them all

    def train(self, model: fusion.Fusion, params, stop: watch.Stop, profile: tuple[int, int] | None = None) -> dict:
        """Trains from `params`, which may be abstract where there is a checkpoint, or from the newest of those.

        Returns the final parameters.

        Raises:
          RunAgain: asked to stop; everything is saved.
        """
        config, stage, steps, mesh = self.config, self.stage, self.steps, self.mesh
        # ---- Optimizer and state.
        labels = optim.labels(stage, params)
        tx = optim.optimizer(stage, params)
        step_fn = train_step.compile_step(model, stage, tx, labels, mesh)
        # ---- Input and restore.
        process, processes = sharding.feeder(mesh)
        batches = pipeline.training_batches(
            config, stage, self.source, self.tokenizer, sharding.batch_shards(mesh), process, processes
        )
        checkpoints = checkpoint.Checkpoints(
            self.folder / checkpoint.FOLDER, self.about, config.keep_checkpoints, config.keep_every
        )
        start = 0
        restored = checkpoints.restore(state.abstract(params, tx, mesh))
        if restored is not None:
            start, current, position = restored
            batches.set_state(position)
            log.info("%s continues after step %d", stage.name, start)
        else:
            current = state.begin(params, tx, mesh)
        writer = metrics.Writer(self.reports, start, config.wandb_project if distributed.is_first() else "")
        metrics.truncate(self.reports / "bad_records.jsonl", start)
        log.info("%s: %d records, %d steps of %d samples", stage.name, len(self.source), steps, stage.batch_size)
        if self._validates_at(start) and not writer.has(start, "validation/ce"):
            self._validate(model, current.params, start, writer, stop)  # a stop came in between
        # ---- Loop.
        peak = flops.peak(model.dtype)
        tracer = watch.Profile(profile, self.folder / "profile")
        spikes, every = metrics.Spikes(), watch.Every(config.checkpoint_minutes)
        interval, begun, compiled = metrics.Interval(), time.perf_counter(), set()
        running: deque = deque()  # results of the steps that may still compute
        with watch.Watch(config.hang_minutes) as phase:
            for step in range(start + 1, steps + 1):
                tracer.before(step)
                with phase("waiting for input") as waited:
                    fed, counts = next(batches)
                # Waiting costs nothing while a step is still computing.
                interval.spend("compute" if running and not running[-1].is_ready() else "input", waited())
                self._note_bad(step, fed.bad, counts)
                if fed.batch.latent_count not in compiled:
                    compiled.add(fed.batch.latent_count)
                    log.info("%s: compiling the step for l^2 = %d", stage.name, fed.batch.latent_count)
                cost = processes * flops.step_flops(config.model, flops.shape_of(fed.batch))
                rates = optim.learning_rates(stage, step - 1, steps)
                with phase("computing") as computed:
                    # Two batches at most are on the devices: one that a step reads, one put there meanwhile.
                    while len(running) > 1:
                        jax.block_until_ready(running.popleft())
                    current, values = step_fn(current, sharding.put_batch(fed.batch, mesh), rates)
                    running.append(values["total"])
                interval.spend("compute", computed())
                stop.nothing_to_lose = False
                interval.add(values | _prefixed("learning_rate/", rates), fed.samples, cost)
                tracer.after(step, values)
                stop.after_step()

                if step % config.log_every == 0 or step == steps:
                    with phase("computing") as computed:
                        jax.block_until_ready(values)
                    interval.spend("compute", computed())
                    report = interval.report(peak) | watch.memory()
                    found = spikes.look(step - len(interval.fetched()) + 1, interval.fetched())
                    for text in found[:3]:
                        log.warning("%s %s", stage.name, text)
                    report["spikes"] = len(found)
                    left = (time.perf_counter() - begun) / (step - start) * (steps - step)
                    writer.scalars(step, {**report, **counts.scalars()})
                    log.info(metrics.line(stage.name, step, steps, report, left))
                    self._check_skipped(int(current.skipped_in_row))
                    interval = metrics.Interval()
                if self._validates_at(step) and not stop.requested:
                    with phase("validating"):
                        self._validate(model, current.params, step, writer, stop)
                    interval = metrics.Interval()  # validation is not training time
                if config.evaluate_every and step % config.evaluate_every == 0 and not stop.requested:
                    with phase("evaluating"):
                        self._evaluate_tasks(model, current.params, step, writer)
                    interval = metrics.Interval()
                # The iterator stands right behind this step's batch: save before it moves on.
                if stop.requested and step < steps:
                    with phase("saving"):
                        checkpoints.finish(step, current, batches.get_state(), STOP_PATIENCE)
                    writer.close()
                    raise RunAgain(f"stopped after step {step} of {stage.name}, which is saved; start again to go on.")
                if step == steps:
                    with phase("saving"):
                        checkpoints.finish(step, current, batches.get_state(), FINAL_PATIENCE)
                    stop.nothing_to_lose = True
                elif step % config.checkpoint_every == 0 or every.due(step % config.log_every == 0):
                    with phase("saving") as saved:
                        checkpoints.save(step, current, batches.get_state())
                    every.restart()
                    interval.spend("checkpoint", saved())
        tracer.close()
        checkpoints.close()
        batches.close()
        writer.close()
        return current.params

    def _validates_at(self, step: int) -> bool:
        every = self.config.validate_every
        return bool(step and every and self.validation is not None and (step % every == 0 or step == self.steps))

    def _note_bad(self, step: int, bad: tuple[BadRecord, ...], counts: pipeline.Counts) -> None:
        if not bad:
            return
        entries = [{"step": step, "reason": b.reason, "where": b.where, "detail": b.detail} for b in bad]
        try:
            with (self.reports / "bad_records.jsonl").open("a") as file:
                file.write("".join(json.dumps(entry) + "\n" for entry in entries))
        except OSError as error:
            log.warning("bad records are not listed: %s", error)
        for record in bad[: max(0, self.bad_to_show)]:
            log.warning("skipped a bad record (%s): %s", record.reason, record)
        self.bad_to_show -= len(bad)
        counts.check(self.config.max_bad_records, len(self.source))

    def _check_skipped(self, in_row: int) -> None:
        if in_row >= self.config.max_skipped_steps:
            raise UserError(
                f"{in_row} steps in a row had a loss or gradient that is not finite (max_skipped_steps="
                f"{self.config.max_skipped_steps}); lower the learning rate or look at the data of the last steps."
            )

    def _validate(self, model: fusion.Fusion, params, step: int, writer: metrics.Writer, stop: watch.Stop) -> None:
        """Validation losses, and answers to the first questions, to the log and TensorBoard.

        A request to stop ends it without a word; the run that goes on from this step does it again.
        """
        batches = pipeline.fixed_batches(
            self.config, self.stage, self.validation, self.tokenizer, self.config.validation_batches
        )
        parts = []
        for batch in batches:
            if stop.requested:
                return
            parts.append(jax.device_get(self._evaluate(model, params, batch)))
        if parts:
            # Means over all tokens, as in training, not over batches.
            sums, counts = (jax.tree.map(lambda *x: float(sum(x)), *column) for column in zip(*parts))
            means = {name: sums[name] / max(counts[name], 1.0) for name in sums}
            writer.scalars(step, _prefixed("validation/", means))
            log.info("%s %d  validation ce %.4f", self.stage.name, step, means["ce"])
        shown = self._sample_answers(model, params)
        if shown:
            writer.text(step, "answers", "\n\n".join(shown))

    def _evaluate_tasks(self, model: fusion.Fusion, params, step: int, writer: metrics.Writer) -> None:
        """Scores of the config's benchmarks, into the metrics and the log."""
        config = self.config
        answerer = generate.Answerer(model, params, config, self.tokenizer)
        scores = evaluate_tasks(answerer, config.evaluation_tasks, config.evaluation_data, config.evaluation_limit)
        writer.scalars(step, _prefixed("evaluation/", scores))
        shown = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        log.info("%s %d  evaluation  %s", self.stage.name, step, shown)

    def _evaluate(self, model: fusion.Fusion, params, batch):
        shards = sharding.batch_shards(self.mesh)
        if any(len(x) % shards for x in jax.tree.leaves(batch)):  # too few to deal: every device computes all of them
            return _evaluate(model, params, batch)
        rows = sharding.put_batch(sharding.local_rows(batch, self.mesh), self.mesh)
        return sharding.OnMesh(functools.partial(_evaluate, model), self.mesh)(params, rows)

    def _sample_answers(self, model: fusion.Fusion, params) -> list[str]:
        """The first usable questions of the validation data with the model's answers, as Markdown."""
        maker = pipeline.ExampleMaker(self.config.model, self.tokenizer, self.config.template)
        prompts, expected = [], []
        for i in range(len(self.validation)):
            if len(prompts) == self.config.sample_answers:
                break
            try:
                record = self.validation[i]
                prompt = generate.first_question(record)
                maker(prompt, prompt=True)
            except BadRecord:
                continue
            prompts.append(prompt)
            expected.append(record.turns[record.turns.index(prompt.turns[0]) + 1]["value"])
        if not prompts:
            return []
        answerer = generate.Answerer(model, params, self.config, self.tokenizer, rows=len(prompts))
        shown = []
        for prompt, answer, wanted in zip(prompts, answerer.answer(prompts), expected):
            question = " ".join(prompt.turns[0]["value"].replace(conversation.IMAGE_TAG, "").split())
            name = prompt.image_path.name if prompt.image_path else "text"
            shown.append(f"**{name}** {question}  \nmodel: {answer}  \nrecord: {wanted}")
        return shown


@jax.jit(static_argnums=0)
def _evaluate(model: fusion.Fusion, params, batch):
    """Sums of the losses and what they are divided by."""
    totals = losses.counts(batch, model.config.vision.patches)
    _, means = train_step.loss_and_parts(model, params, batch, totals)
    return {name: mean * totals[name] for name, mean in means.items()}, totals


def _prefixed(prefix: str, values: dict) -> dict:
    return {prefix + name: value for name, value in values.items()}


if __name__ == "__main__":
    run_main(main)
