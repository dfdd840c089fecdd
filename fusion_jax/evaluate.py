"""Evaluation of a checkpoint: `python -m fusion_jax.evaluate --checkpoint DIR --tasks pope,textvqa --data_dir DIR`.

All tasks are read and checked before the first question. Prints the scores as one JSON line last; a task that fails
leaves the others theirs, and the exit code says it. With --output_dir the answers are kept as they come, so that a run
can be stopped, continued and shared, with a summary and a report after every task; docs/evaluation.md says what is in
the folder.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import flags

from fusion_jax.command_line.cli import check_output, run_main
from fusion_jax.errors import check
from fusion_jax.evals import judge, predictions, published, report
from fusion_jax.evals.prepare import Prepared
from fusion_jax.evals.registry import TASKS, find_tasks
from fusion_jax.evals.runner import Output, Result
from fusion_jax.evals.several import Failed, answer_tasks, failure, prepare_tasks
from fusion_jax.evals.task import Prediction
from fusion_jax.inference.generate import Answerer
from fusion_jax.models.fusion import Fusion
from fusion_jax.training import checkpoint

log = logging.getLogger("fusion_jax")

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "step folder, stage folder or workdir")
_TASKS = flags.DEFINE_list("tasks", ["held_out"], f"which of: {', '.join(TASKS)}")
_RULE = flags.DEFINE_enum(
    "rule", "official", ["official", "published"], "ask and score by a task's own rule, or as for the published figures"
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "folder with a task's data, or with one folder for each task")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for scores and all answers")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "folder for predictions, submissions, summary and report")
_LIMIT = flags.DEFINE_integer("limit", 0, "ask about so many questions of each task, evenly spread; 0 for all")
_ROWS = flags.DEFINE_integer("batch_size", 32, "questions answered at a time")
_SHOW = flags.DEFINE_integer("show", 0, "print this many questions with the model's answers", lower_bound=0)
_INDEX = flags.DEFINE_integer(
    "process_index", 0, "this process, of those that share the work; 0 joins it", lower_bound=0
)
_COUNT = flags.DEFINE_integer(
    "process_count", 1, "how many processes share the work; all write to --output_dir", lower_bound=1
)
_PATIENCE = flags.DEFINE_integer(
    "patience", 600, "seconds that process 0 waits for an answer of any other", lower_bound=1
)


def main(argv: list[str]) -> None:
    del argv
    check(bool(_CHECKPOINT.value and _DATA_DIR.value), "Give --checkpoint DIR and --data_dir DIR.")
    tasks = find_tasks(_TASKS.value, _RULE.value)
    index, count = _INDEX.value, _COUNT.value
    check(_LIMIT.value >= 0, f"--limit={_LIMIT.value} must not be negative.")
    check(_ROWS.value >= 1, f"--batch_size={_ROWS.value} must be at least 1.")
    check(0 <= index < count, f"--process_index={index} must be at least 0 and below --process_count={count}.")
    check(count == 1 or bool(_OUTPUT_DIR.value), "Processes that share the work need one --output_dir for all.")
    if _OUTPUT.value:
        check_output("output", _OUTPUT.value)
    grader = judge.from_environment()
    checkpoint.find(_CHECKPOINT.value)  # before minutes go into reading benchmarks
    failed: Failed = {}
    prepared = prepare_tasks(tasks, Path(_DATA_DIR.value), failed, _LIMIT.value, progress=True)
    for one in prepared:
        _describe(one, grader is not None)
    if not prepared and not _OUTPUT_DIR.value:
        raise failure(failed, len(tasks))
    loaded = checkpoint.load_model(_CHECKPOINT.value)  # decides which checkpoint it is
    step_folder = loaded.folder
    header = {"checkpoint": predictions.fingerprint(step_folder), "folder": str(step_folder)}
    output = None
    if _OUTPUT_DIR.value:
        folder = Path(_OUTPUT_DIR.value)
        predictions.check_folder(folder, header)
        output = Output(folder, header, index, count, _PATIENCE.value)

    model = Fusion(loaded.config.model, jnp.dtype(loaded.config.dtype))
    answerer = Answerer(model, loaded.params, loaded.config, loaded.tokenizer, rows=_ROWS.value)
    results: list[Result] = []
    if failed and not index:
        _write(header, output, [], results, failed)
    for one, result in answer_tasks(answerer, prepared, failed, output, grader):
        name = one.task.name
        if result is not None:
            results.append(result)
            _show(result.predictions, _SHOW.value)
            log.info("%s: %d questions in %.0f s: %s", name, len(result.predictions), result.seconds, _figures(result))
            for path in result.files:
                log.info("%s: for the benchmark's server: %s", name, path)
        elif index and name not in failed:
            log.info("%s: the share of process %d is answered", name, index)
        if not index:  # after every task: what is done stays, whatever becomes of the rest
            _write(header, output, results[-1:] if result else [], results, failed)
    if not index:
        if output:
            log.info("written: %s", output.folder / "summary.md")
        scores: dict[str, Any] = {result.task.name: result.scores for result in results}
        print(json.dumps({"checkpoint": str(step_folder), **scores} | ({"failed": failed} if failed else {})))
    if failed:
        raise failure(failed, len(tasks))


def _describe(one: Prepared, graded: bool) -> None:
    """Says what will be asked, and what is to be known about it beforehand."""
    name = one.task.name
    log.info("%s: %d questions from %s", name, len(one.questions), one.source.words())
    if part := published.part(name, one.whole):
        log.warning("%s: these are %s questions: not the published split, or not all of it", name, part)
    if one.task.judged and not graded:
        log.info("%s: the official rule asks a language model; set JUDGE_MODEL and JUDGE_BASE_URL", name)


def _figures(result: Result) -> str:
    """The figure that publications quote, and the others that are no parts of it."""
    numbers = {key: value for key, value in result.scores.items() if isinstance(value, int | float)}
    numbers = {key: numbers[key] for key in (result.task.headline, *numbers) if key in numbers and key != "questions"}
    return ", ".join(f"{key} {value:.4g}" for key, value in list(numbers.items())[:6]) or "not scored here"


def _write(header: dict, output: Output | None, new: list[Result], every: list[Result], failed: Failed) -> None:
    """The summary and the report, and the file of all answers, as far as there are some."""
    if output:
        report.write(output.folder, header, new, failed)
    if _OUTPUT.value:
        whole = {r.task.name: {**r.scores, "examples": _examples(r.predictions)} for r in every}
        whole = {"checkpoint": header["folder"], **whole} | ({"failed": failed} if failed else {})
        Path(_OUTPUT.value).write_text(json.dumps(whole, indent=2))


def _examples(asked: Sequence[Prediction]) -> list[dict[str, Any]]:
    """The rows of all predictions but those for comparison."""
    return [p.row() for p in asked if not p.question.control]


def _show(asked: Sequence[Prediction], count: int) -> None:
    """Logs `count` questions on as many topics as possible, in the benchmark's order."""
    seen: dict[str, int] = {}
    ranked = []
    for position, p in enumerate(asked):
        if p.question.control:
            continue
        topic = str(p.question.about.get("topic", p.question.about.get("category", "")))
        seen[topic] = seen.get(topic, 0) + 1
        ranked.append((seen[topic], position))
    for _, position in sorted(ranked)[:count]:
        p = asked[position]
        log.info(
            "%s\n    Q: %s\n    model: %s   expected: %s   (%s)",
            ", ".join(Path(image.name).name for image in p.question.pictures) or "no image",
            p.question.text or p.question.prompt,
            p.answer,
            p.question.reference,
            "not scored" if p.score is None else "right" if p.score == 1 else "wrong",
        )


if __name__ == "__main__":
    run_main(main, goes_on=lambda: bool(_OUTPUT_DIR.value))
