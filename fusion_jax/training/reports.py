"""Writes the reports of a stage during training: validation, sample answers and benchmarks.

No report may cost a training step: reports run after the step is saved, and failed ones are logged, counted, skipped.
"""

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax

from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data import conversation
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.data.validation_batches import FixedBatch
from fusion_jax.devices import distributed, sharding
from fusion_jax.errors import BadRecord, check, first_line
from fusion_jax.evals.runner import evaluate_tasks
from fusion_jax.files import printable
from fusion_jax.inference import generate
from fusion_jax.inference.prompts import first_question
from fusion_jax.models import fusion
from fusion_jax.training.step import compile_evaluation
from fusion_jax.training.stopping import Stop, is_process_lost
from fusion_jax.training.validation import Validation
from fusion_jax.training.watch import Watch
from fusion_jax.training.writer import Writer

log = logging.getLogger("fusion_jax")

_PATIENCE = 300.0  # seconds for which processes wait for each other after a report
_FAILED_PATIENCE = 20.0  # the same for a process whose report failed: the others may wait for it in a collective


@dataclass
class Reports:
    """Runs the reports of one stage, and writes them to its metrics, to TensorBoard and to the log."""

    config: RunConfig
    stage: StageConfig
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    validation: Validation | None
    model: fusion.Fusion
    writer: Writer
    stop: Stop
    _failed: Counter[str] = field(init=False, default_factory=Counter)  # by kind of report
    _planned: list[FixedBatch] | None = field(init=False, default=None)  # validation's batches

    @functools.cached_property
    def _evaluate(self) -> sharding.OnMesh:
        return compile_evaluation(self.model, self.mesh)

    def run(self, step: int, params, phase: Watch, last: bool) -> bool:
        """Runs the reports that are due after a step and not yet written; returns whether there was one.

        After a request to stop it runs none: the run that continues from this step will.

        Args:
          last: this is the last step of the stage.
        """
        ran = False
        for kind, doing, due, report in (
            ("validation", "validating", self._validates_at, self._validate),
            ("evaluation", "evaluating", self._evaluates_at, self._evaluate_tasks),
        ):
            if due(step, last) and not self.stop.requested and not self._has(step, kind):
                ran = True
                with phase(doing), self._tolerate(step, kind):
                    report(step, params)
        if ran:
            self.writer.publish()
        return ran

    def failures(self) -> dict[str, int]:
        """Returns how many reports of each kind have failed, for the metrics."""
        return {f"failed/{kind}": count for kind, count in self._failed.items()}

    def _validates_at(self, step: int, last: bool) -> bool:
        every = self.config.validate_every
        return bool(step and every and self.validation is not None and (step % every == 0 or last))

    def _evaluates_at(self, step: int, last: bool) -> bool:
        every = self.config.evaluate_every
        return bool(step and every and step % every == 0)

    def _has(self, step: int, kind: str) -> bool:
        """Returns whether an earlier start has written the report. Process 0 decides, as all must do the same."""
        return distributed.gather(self.writer.has(step, f"{kind}/"))[0]

    @contextlib.contextmanager
    def _tolerate(self, step: int, kind: str) -> Iterator[None]:
        """Logs the error of a report, so that training continues.

        With several processes all must reach the end of the report, failed or not. If one fails while the others wait
        for it inside a compiled program, training cannot continue, and an error is raised after a short time.
        """
        failure = None
        try:
            yield
        except Exception as error:
            if jax.process_count() > 1 and (isinstance(error, jax.errors.JaxRuntimeError) or is_process_lost(error)):
                raise  # another process has ended, or all are out of step
            failure = error
        if not distributed.meet(f"{self.stage.name}/{step}/{kind}", _FAILED_PATIENCE if failure else _PATIENCE):
            raise failure or RuntimeError(f"not every process reached the end of the {kind} after step {step}")
        if failure is None:
            return
        self._failed[kind] += 1
        reason = f"{type(failure).__name__}: {first_line(failure)}"
        name, times = self.stage.name, self._failed[kind]
        log.warning("%s %d  %s failed (%s), %d time(s) so far; training goes on", name, step, kind, reason, times)

    def _validate(self, step: int, params) -> None:
        """Writes validation losses, and answers to the first questions. A request to stop ends it without a report."""
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
        answers = self._sample_answers(params)
        if answers:
            self.writer.text(step, "answers", "\n\n".join(answers))

    def _evaluate_tasks(self, step: int, params) -> None:
        """Writes the scores of the config's benchmarks."""
        config = self.config
        answerer = generate.Answerer(self.model, params, config, self.tokenizer, mesh=self.mesh)
        scores = evaluate_tasks(answerer, config.evaluation_tasks, config.evaluation_data, config.evaluation_limit)
        self.writer.scalars(step, {f"evaluation/{name}": score for name, score in scores.items()})
        text = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        log.info("%s %d  evaluation  %s", self.stage.name, step, text)

    def _sample_answers(self, params) -> list[str]:
        """Returns the first questions of validation records usable in every process, with answers, as Markdown.

        If a record fits into the stage, so does its first question.
        """
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
        texts = []
        for prompt, answer, wanted in zip(prompts, answerer.answer(prompts), expected):
            question = " ".join(prompt.turns[0]["value"].replace(conversation.IMAGE_TAG, "").split())
            name = printable(prompt.image_path.name) if prompt.image_path else "text"
            texts.append(f"**{name}** {question}  \nmodel: {answer}  \nrecord: {wanted}")
        return texts
