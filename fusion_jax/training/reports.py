"""What a stage tells of itself beside its losses in training: validation, answers to read, benchmarks.

None of it is worth a step: it runs behind the step's save, and what fails is said, counted and left out.
"""

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from fusion_jax.batch import Batch
from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data import conversation
from fusion_jax.data.plan import FixedBatch
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.devices import distributed, sharding
from fusion_jax.errors import BadRecord, check, first_line
from fusion_jax.evals.runner import evaluate_tasks
from fusion_jax.files import printable
from fusion_jax.inference import generate
from fusion_jax.inference.prompts import first_question
from fusion_jax.models import fusion
from fusion_jax.training import ending, losses, metrics, state, watch
from fusion_jax.training import step as train_step
from fusion_jax.training.validation import Validation

log = logging.getLogger("fusion_jax")

_PATIENCE = 300.0  # seconds that processes wait for each other behind a report
_FAILED_PATIENCE = 20.0  # the same for one whose report failed: the others may wait for it inside a collective


class Reports:
    """The reports of one stage, which go to its metrics, to TensorBoard and to the log."""

    def __init__(self, config, stage, mesh, tokenizer, validation, model, writer, stop):
        self.config: RunConfig = config
        self.stage: StageConfig = stage
        self.mesh: jax.sharding.Mesh = mesh
        self.tokenizer: Tokenizer = tokenizer
        self.validation: Validation | None = validation
        self.model: fusion.Fusion = model
        self.writer: metrics.Writer = writer
        self.stop: watch.Stop = stop
        self._failed: Counter[str] = Counter()
        self._planned: list[FixedBatch] | None = None  # validation's batches

    @functools.cached_property
    def _evaluate(self) -> sharding.OnMesh:
        return compile_evaluation(self.model, self.mesh)

    def run(self, step: int, params, phase: watch.Watch, last: bool) -> bool:
        """Those that are due behind a step and not yet written; whether any was. A request to stop goes first: the run
        that goes on from this step does them.

        Args: last: it is the stage's last step."""
        ran = False
        for what, doing, due, report in (
            ("validation", "validating", self._validates_at, self._validate),
            ("evaluation", "evaluating", self._evaluates_at, self._evaluate_tasks),
        ):
            if due(step, last) and not self.stop.requested and not self._has(step, what):
                ran = True
                with phase(doing), self._survived(step, what):
                    report(step, params)
        if ran:
            self.writer.publish()
        return ran

    def failures(self) -> dict[str, int]:
        """How many reports of each kind have failed, for the metrics."""
        return {f"failed/{what}": count for what, count in self._failed.items()}

    def _validates_at(self, step: int, last: bool) -> bool:
        every = self.config.validate_every
        return bool(step and every and self.validation is not None and (step % every == 0 or last))

    def _evaluates_at(self, step: int, last: bool) -> bool:
        every = self.config.evaluate_every
        return bool(step and every and step % every == 0)

    def _has(self, step: int, what: str) -> bool:
        """Whether an earlier start has written it. What the first process has decides: all must do the same."""
        return distributed.gather(self.writer.has(step, f"{what}/"))[0]

    @contextlib.contextmanager
    def _survived(self, step: int, what: str) -> Iterator[None]:
        """The log says what failed, and training goes on.

        With several processes it does so only where all of them come to the end of the report, failed or not. One that
        fails while the others wait for it inside a compiled program cannot be survived: it soon raises.
        """
        trouble = None
        try:
            yield
        except Exception as error:
            if jax.process_count() > 1 and (isinstance(error, jax.errors.JaxRuntimeError) or ending.is_lost(error)):
                raise  # another process is gone, or all are out of step
            trouble = error
        if not distributed.meet(f"{self.stage.name}/{step}/{what}", _FAILED_PATIENCE if trouble else _PATIENCE):
            raise trouble or RuntimeError(f"not every process came to the end of the {what} behind step {step}")
        if trouble is None:
            return
        self._failed[what] += 1
        reason = f"{type(trouble).__name__}: {first_line(trouble)}"
        name, times = self.stage.name, self._failed[what]
        log.warning("%s %d  %s failed (%s), %d time(s) so far; training goes on", name, step, what, reason, times)

    def _validate(self, step: int, params) -> None:
        """Validation losses, and answers to the first questions, to the log and TensorBoard. A request to stop ends it
        without a word."""
        validation, mesh = self.validation, self.mesh
        shards = sharding.batch_shards(mesh)
        if self._planned is None:
            self._planned = validation.plan(shards)
        parts = []
        for batch in validation.batches(self._planned, shards, sharding.held_shards(mesh)):
            if self.stop.requested:
                return
            parts.append(jax.device_get(self._evaluate(params, sharding.put_batch(batch, mesh))))
        validation.list_bad(self.writer.path.parent, step)
        # Means over all tokens, as in training, not over batches.
        sums, counts = (jax.tree.map(lambda *x: float(sum(x)), *column) for column in zip(*parts))
        check(counts["ce"] > 0, f"none of the first records of {self.config.validation_data} can be used.")
        means = {name: sums[name] / max(counts[name], 1.0) for name in sums}
        samples, planned = int(counts["samples"]), len(validation.records)
        figures = means | {"samples": samples, "left_out": planned - samples}
        self.writer.scalars(step, {f"validation/{name}": value for name, value in figures.items()})
        gaps = f", {planned - samples} left out" if samples < planned else ""
        log.info("%s %d  validation ce %.4f (%d samples%s)", self.stage.name, step, means["ce"], samples, gaps)
        shown = self._sample_answers(params)
        if shown:
            self.writer.text(step, "answers", "\n\n".join(shown))

    def _evaluate_tasks(self, step: int, params) -> None:
        """Scores of the config's benchmarks, into the metrics and the log."""
        config = self.config
        answerer = generate.Answerer(self.model, params, config, self.tokenizer, mesh=self.mesh)
        scores = evaluate_tasks(answerer, config.evaluation_tasks, config.evaluation_data, config.evaluation_limit)
        self.writer.scalars(step, {f"evaluation/{name}": score for name, score in scores.items()})
        shown = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        log.info("%s %d  evaluation  %s", self.stage.name, step, shown)

    def _sample_answers(self, params) -> list[str]:
        """The first questions of the validation records that every process can use, with the model's answers, as
        Markdown. A record that fits the stage has a first question that does."""
        maker, source = self.validation.loader.maker, self.validation.loader.source
        prompts, expected = [], []
        for measured in self.validation.records:
            if len(prompts) == self.config.sample_answers:
                break
            usable = False
            with contextlib.suppress(BadRecord):
                record = source[measured.number]
                prompt = first_question(record)
                maker(prompt, prompt=True)
                usable = True
            if not all(distributed.gather(usable)):
                continue
            prompts.append(prompt)
            expected.append(record.turns[record.turns.index(prompt.turns[0]) + 1]["value"])
        if not prompts:
            return []
        answerer = generate.Answerer(self.model, params, self.config, self.tokenizer, len(prompts), mesh=self.mesh)
        shown = []
        for prompt, answer, wanted in zip(prompts, answerer.answer(prompts), expected):
            question = " ".join(prompt.turns[0]["value"].replace(conversation.IMAGE_TAG, "").split())
            name = printable(prompt.image_path.name) if prompt.image_path else "text"
            shown.append(f"**{name}** {question}  \nmodel: {answer}  \nrecord: {wanted}")
        return shown


def evaluate(model: fusion.Fusion, params, batch: Batch):
    """Sums of the losses and what they are divided by, float32 scalars; among the latter also the `samples`."""
    totals = losses.counts(batch, model.config.vision.patches)
    _, means = train_step.loss_and_parts(model, params, batch, totals)
    samples = batch.segment_ids.max(axis=1).sum().astype(jnp.float32)
    return {name: mean * totals[name] for name, mean in means.items()}, totals | {"samples": samples}


def compile_evaluation(model: fusion.Fusion, mesh: jax.sharding.Mesh) -> sharding.OnMesh:
    """The jitted `evaluate` (params, batch) -> (sums, counts); arguments lie as those of `train_step.compile_step`."""
    places = jax.tree.map(lambda x: x.sharding, state.abstract_parameters(model.config, mesh))
    jitted = jax.jit(
        functools.partial(evaluate, model),
        in_shardings=(places, sharding.of_rows(mesh)),
        out_shardings=sharding.replicated(mesh),
        compiler_options=train_step.compiler_options(mesh),
    )
    return sharding.OnMesh(jitted, mesh)
