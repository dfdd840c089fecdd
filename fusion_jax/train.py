"""Training: `python -m fusion_jax.train --config configs/quickstart.py --workdir runs/quickstart`.

Trains the stages of the config one after the other, each from the parameters of the one before. Started again with the
same workdir it goes on from the newest checkpoint and gives the same losses as an undisturbed run.
"""

import dataclasses
import json
import logging
import math
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from fusion_jax import checkpoint, flops, generate, losses, metrics, optim, sharding, state, train_step
from fusion_jax.cli import run_main
from fusion_jax.config import RunConfig, StageConfig, from_dict, to_dict
from fusion_jax.data import conversation, pipeline, sources
from fusion_jax.data.tokenizer import Tokenizer, load_tokenizer
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.models import fusion

log = logging.getLogger("fusion_jax")

_CONFIG = config_flags.DEFINE_config_file("config", None, "run configuration", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder for checkpoints, metrics and plots")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"Unexpected argument {argv[1]!r}; give --config FILE and --workdir DIR.")
    if _WORKDIR.value is None or _CONFIG.value is None:
        raise UserError("Give --config FILE and --workdir DIR.")
    train(from_dict(RunConfig, _CONFIG.value.to_dict()), Path(_WORKDIR.value))


def train(config: RunConfig, workdir: Path) -> None:
    """Runs, or continues, all stages of a config in `workdir`."""
    # ---- Where to go on: the last stage that has a checkpoint.
    begun = [i for i, stage in enumerate(config.stages) if _saved_steps(workdir, stage)]
    first = begun[-1] if begun else 0
    # ---- Inputs: everything that can be wrong is looked at before any long work.
    scratch = tempfile.TemporaryDirectory()  # lives as long as this function
    if config.init_from:
        config, tokenizer, origin = _continue_from(config, workdir if begun else Path(config.init_from), scratch.name)
    else:
        tokenizer, origin = load_tokenizer(config.tokenizer), {}
    _check_tokenizer(config, tokenizer)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_model(config.model, mesh)
    for stage in config.stages:
        if not stage.packing:  # which deals its rows to the devices itself
            sharding.check_rows(stage.batch_size // stage.accumulation, mesh, f"stage {stage.name!r}")
    record_sources = {stage.name: pipeline.open_source(config, stage) for stage in config.stages}
    validation = sources.load_source(config.validation_data) if config.validation_data else None
    workdir.mkdir(parents=True, exist_ok=True)
    _cache_compiled_programs(workdir)
    (workdir / "config.json").write_text(json.dumps(to_dict(config), indent=2))
    about = checkpoint.describe(config, tokenizer, origin)

    # ---- Model.
    model = fusion.Fusion(config.model, jnp.dtype(config.dtype), config.remat)
    params = state.abstract_parameters(config.model, mesh)
    log.info(
        "%s parameters, %d device(s) of kind %s (%s), compute in %s",
        f"{sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)):,}",
        jax.device_count(),
        jax.devices()[0].device_kind,
        ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
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
        run = StageRun(config, stage, workdir, mesh, tokenizer, record_sources[stage.name], validation, about)
        params = run.train(model, params)
    files = {stage.name: workdir / stage.name / "metrics.jsonl" for stage in config.stages}
    metrics.plot_losses({name: path for name, path in files.items() if path.exists()}, workdir / "losses.png")
    log.info("done; loss curves in %s", workdir / "losses.png")


def _continue_from(config: RunConfig, source: Path, scratch: str) -> tuple[RunConfig, Tokenizer, dict]:
    """Starting from a checkpoint: the config with what its weights decide, the tokenizer, and the checkpoint's origin.

    Without a tokenizer in the config both it and the template are the checkpoint's; its files are put into `scratch`.
    """
    folder = checkpoint.find(source)
    about = checkpoint.load_about(folder)
    config = dataclasses.replace(config, model=checkpoint.continue_model(config.model, about, str(source)))
    if config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        config = dataclasses.replace(config, template=about["config"]["template"])
        checkpoint.save_tokenizer(about, Path(scratch))
        tokenizer = load_tokenizer(scratch)
    return config, tokenizer, about.get("origin", {})


def _check_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.model.llm.vocab_size:
        raise UserError(
            f"config.model.llm.vocab_size={config.model.llm.vocab_size} is smaller than the {tokenizer.vocab_size} "
            f"tokens of {config.tokenizer or config.init_from}."
        )
    conversation.stop_ids(tokenizer, conversation.find_template(config.template))


def _cache_compiled_programs(workdir: Path) -> None:
    """Restarts and stages of equal shapes compile nothing again. A cache chosen by the user is left alone."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").absolute()))


def _saved_steps(workdir: Path, stage: StageConfig) -> list[int]:
    folder = workdir / stage.name / checkpoint.FOLDER
    return [int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()]


class StageRun:
    """One stage: its data, state, checkpoints and reports."""

    def __init__(self, config, stage, workdir, mesh, tokenizer, source, validation, about):
        self.config: RunConfig = config
        self.stage: StageConfig = stage
        self.folder: Path = workdir / stage.name
        self.mesh: jax.sharding.Mesh = mesh
        self.tokenizer: Tokenizer = tokenizer
        self.source: sources.RecordSource = source
        self.validation: sources.RecordSource | None = validation
        self.about: dict = about
        self.steps = pipeline.stage_steps(stage, len(source))
        self.bad_to_show = 5  # in the log; bad_records.jsonl has them all

    def train(self, model: fusion.Fusion, params) -> dict:
        """Trains from `params`, which may be abstract where there is a checkpoint, or from the newest of those.

        Returns the final parameters.
        """
        config, stage, steps, mesh = self.config, self.stage, self.steps, self.mesh
        # ---- Optimizer and state.
        labels = optim.labels(stage, params)
        tx = optim.optimizer(stage, params)
        step_fn = train_step.compile_step(model, stage, tx, labels, mesh)
        # ---- Input and restore.
        batches = pipeline.training_batches(config, stage, self.source, self.tokenizer, sharding.batch_shards(mesh))
        checkpoints = checkpoint.Checkpoints(self.folder / checkpoint.FOLDER, config.keep_checkpoints, self.about)
        start = checkpoints.latest or 0
        if start:
            current = checkpoints.restore(state.abstract(params, tx, mesh), batches)
            log.info("%s continues after step %d", stage.name, start)
        else:
            current = state.begin(params, tx, mesh)
        writer = metrics.Writer(self.folder, start)
        metrics.truncate(self.folder / "bad_records.jsonl", start)
        log.info("%s: %d records, %d steps of %d samples", stage.name, len(self.source), steps, stage.batch_size)
        # ---- Loop.
        peak = flops.peak(model.dtype)
        interval, begun, compiled = metrics.Interval(), time.perf_counter(), set()
        for step in range(start + 1, steps + 1):
            waiting = time.perf_counter()
            fed, counts = next(batches)
            waited = time.perf_counter() - waiting
            self._note_bad(step, fed.bad, counts)
            if fed.batch.latent_count not in compiled:
                compiled.add(fed.batch.latent_count)
                log.info("%s: compiling the step for l^2 = %d", stage.name, fed.batch.latent_count)
            cost = flops.step_flops(config.model, flops.shape_of(fed.batch))
            rates = optim.learning_rates(stage, step - 1, steps)
            current, values = step_fn(current, sharding.put_batch(sharding.local_rows(fed.batch, mesh), mesh), rates)
            values |= _prefixed("learning_rate/", rates)
            interval.add(values, fed.samples, cost, waited)

            if step % config.log_every == 0 or step == steps:
                report = interval.report(peak)
                left = (time.perf_counter() - begun) / (step - start) * (steps - step)
                writer.scalars(step, {**report, "records_seen": counts.seen, **_prefixed("bad/", counts.bad)})
                log.info(metrics.line(stage.name, step, steps, report, left))
                self._check_skipped(int(current.skipped_in_row))
                interval = metrics.Interval()
            validate = config.validate_every and self.validation is not None
            if validate and (step % config.validate_every == 0 or step == steps):
                self._validate(model, current.params, step, writer)
                interval = metrics.Interval()  # validation is not training time
            # The iterator stands right behind this step's batch: save before it moves on.
            if step % config.checkpoint_every == 0 or step == steps:
                checkpoints.save(step, current, batches)
        checkpoints.close()
        batches.close()
        writer.close()
        return current.params

    def _note_bad(self, step: int, bad: tuple[BadRecord, ...], counts: pipeline.Counts) -> None:
        if not bad:
            return
        with (self.folder / "bad_records.jsonl").open("a") as file:
            for record in bad:
                entry = {"step": step, "reason": record.reason, "where": record.where, "detail": record.detail}
                file.write(json.dumps(entry) + "\n")
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

    def _validate(self, model: fusion.Fusion, params, step: int, writer: metrics.Writer) -> None:
        """Validation losses, and answers to the first questions, to the log and TensorBoard."""
        batches = pipeline.fixed_batches(
            self.config, self.stage, self.validation, self.tokenizer, self.config.validation_batches
        )
        parts = [jax.device_get(_evaluate(model, params, batch)) for batch in batches]
        if parts:
            # Means over all tokens, as in training, not over batches.
            sums, counts = (jax.tree.map(lambda *x: float(sum(x)), *column) for column in zip(*parts))
            means = {name: sums[name] / max(counts[name], 1.0) for name in sums}
            writer.scalars(step, _prefixed("validation/", means))
            log.info("%s %d  validation ce %.4f", self.stage.name, step, means["ce"])
        shown = self._sample_answers(model, params)
        if shown:
            writer.text(step, "answers", "\n\n".join(shown))

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
