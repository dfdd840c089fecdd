"""Evaluation of a checkpoint: `python -m fusion_jax.evaluate --checkpoint DIR --tasks pope,textvqa --data_dir DIR`.

Prints the scores as one JSON line last. With --output_dir the answers are kept as they come, so that a run can be
stopped, continued and shared, with a summary and a report at the end; docs/evaluation.md says what is in the folder.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import flags

from fusion_jax import checkpoint
from fusion_jax.cli import check_output, run_main
from fusion_jax.errors import check
from fusion_jax.evals import judge, predictions, report
from fusion_jax.evals.registry import TASKS, find_tasks
from fusion_jax.evals.runner import Output, run_task
from fusion_jax.evals.task import Prediction
from fusion_jax.generate import Answerer
from fusion_jax.models.fusion import Fusion

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
    results = []
    for task in tasks:
        result = run_task(answerer, task, Path(_DATA_DIR.value), output, _LIMIT.value, grader)
        if result is None:
            log.info("%s: the share of process %d is answered", task.name, index)
            continue
        results.append(result)
        _show(result.predictions, _SHOW.value)
        log.info("%s: %d questions in %.0f s", task.name, len(result.predictions), result.seconds)
        for path in result.files:
            log.info("%s: for the benchmark's server: %s", task.name, path)
        if task.judged and grader is None:
            log.info("%s: the official rule asks a language model; set JUDGE_MODEL and JUDGE_BASE_URL", task.name)
    if index:
        return
    if output:
        for path in report.write(output.folder, header, results):
            log.info("written: %s", path)
    scores: dict[str, Any] = {result.task.name: result.scores for result in results}
    if _OUTPUT.value:
        answers = {result.task.name: {"examples": _examples(result.predictions)} for result in results}
        everything = {name: scores[name] | answers[name] for name in scores}
        Path(_OUTPUT.value).write_text(json.dumps({"checkpoint": str(step_folder), **everything}, indent=2))
    print(json.dumps({"checkpoint": str(step_folder), **scores}))


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
