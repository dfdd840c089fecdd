"""Evaluates a checkpoint on benchmarks.

    python -m fusion_jax.evaluate --checkpoint DIR --tasks pope,textvqa --data_dir DIR --out DIR

All tasks are read and checked before the first question. The last line printed has the scores as JSON. A task that
fails does not stop the others, and the exit code is then 2. With --out answers are kept as they come, so that a run can
be stopped, continued and shared, with a summary and a report after every task; docs/evaluation.md describes the folder.
"""

import json
import logging
from pathlib import Path
from typing import Any

from absl import flags

from fusion_jax.command_line.cli import check_output, run_main
from fusion_jax.errors import check
from fusion_jax.evals import judge, predictions, report, terminal
from fusion_jax.evals.guide import GUIDES
from fusion_jax.evals.registry import TASKS, find_tasks
from fusion_jax.evals.runner import Output, Result
from fusion_jax.evals.several import Failed, answer_tasks, failure, prepare_tasks
from fusion_jax.inference.generate import Answerer
from fusion_jax.models import weights
from fusion_jax.training.loading import find_checkpoint, load_model

log = logging.getLogger("fusion_jax")
FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "step folder, stage folder or workdir")
    flags.DEFINE_list("tasks", ["held_out"], f"benchmarks, with commas between them, of: {', '.join(TASKS)}")
    flags.DEFINE_enum(
        "rule", "official", ["official", "published"],
        "prompts and scores by each benchmark's own rule, or as the published figures were measured",
    )  # fmt: skip
    flags.DEFINE_string("data_dir", None, "folder with a benchmark's data, or with one folder for each benchmark")
    flags.DEFINE_string("out", None, "folder for predictions, submissions, summary and report; by default none is kept")
    flags.DEFINE_string("scores_file", None, "JSON file for scores and all answers; by default none is written")
    flags.DEFINE_integer("limit", 0, "about how many questions of each task, evenly spread; 0 for all")
    flags.DEFINE_integer("batch_size", 32, "questions answered at a time")
    flags.DEFINE_enum(
        "weights", "full", weights.KINDS, "how to store weights: full, in the dtype of computation, or as int8"
    )
    flags.DEFINE_enum(
        "guide",
        "question",
        GUIDES,
        "what the vision encoder reads: the question, another one of the task, or none",
    )
    flags.DEFINE_integer("show", 0, "how many questions of each task to print with their answers", lower_bound=0)
    flags.DEFINE_integer(
        "process_id", 0, "number of this process among those that share the work; 0 joins it", lower_bound=0
    )
    flags.DEFINE_integer("num_processes", 1, "how many processes share the work; they need one --out", lower_bound=1)
    flags.DEFINE_integer(
        "patience", 600, "seconds that process 0 waits for another answer of the other processes", lower_bound=1
    )
    # Names until 0.2.
    flags.DEFINE_alias("output", "scores_file")
    flags.DEFINE_alias("output_dir", "out")
    flags.DEFINE_alias("process_index", "process_id")
    flags.DEFINE_alias("process_count", "num_processes")


def main(argv: list[str]) -> None:
    del argv
    check(bool(FLAGS.checkpoint and FLAGS.data_dir), "Give --checkpoint DIR and --data_dir DIR.")
    tasks = find_tasks(FLAGS.tasks, FLAGS.rule)
    index, count = FLAGS.process_id, FLAGS.num_processes
    check(FLAGS.limit >= 0, f"--limit={FLAGS.limit} must not be negative.")
    check(FLAGS.batch_size >= 1, f"--batch_size={FLAGS.batch_size} must be at least 1.")
    check(0 <= index < count, f"--process_id={index} must be at least 0 and below --num_processes={count}.")
    check(count == 1 or bool(FLAGS.out), "Processes that share the work need the same --out.")
    if FLAGS.scores_file:
        check_output("scores_file", FLAGS.scores_file)
    grader = judge.from_environment()
    find_checkpoint(FLAGS.checkpoint)  # raises before minutes are spent on reading benchmarks

    # Data: a task that cannot be read does not stop the others.
    failed: Failed = {}
    prepared = prepare_tasks(tasks, Path(FLAGS.data_dir), failed, FLAGS.limit, progress=True, guide=FLAGS.guide)
    for one in prepared:
        terminal.describe(one, grader is not None)
    if not prepared and not FLAGS.out:
        raise failure(failed, len(tasks))

    # Model.
    loaded = load_model(FLAGS.checkpoint, kind=FLAGS.weights)  # this decides which step is evaluated
    check(
        FLAGS.guide == "question" or loaded.model.config.text_guided,
        f"--guide={FLAGS.guide}: the vision encoder of {loaded.folder} reads no text (model.text_guided is False).",
    )
    stored = "" if FLAGS.weights == "full" else f"-{FLAGS.weights}"
    guided = "" if FLAGS.guide == "question" else f"-guide-{FLAGS.guide}"
    header = {"checkpoint": predictions.fingerprint(loaded.folder) + stored + guided, "folder": str(loaded.folder)}
    output = None
    if FLAGS.out:
        predictions.check_folder(Path(FLAGS.out), header)
        output = Output(Path(FLAGS.out), header, index, count, FLAGS.patience)
    answerer = Answerer(loaded.model, loaded.params, loaded.config, loaded.tokenizer, rows=FLAGS.batch_size)

    # Answers: all results are written after every task, so that finished tasks are kept even if a later one fails.
    results: list[Result] = []

    def write(new: list[Result]) -> None:
        if output:
            report.write(output.folder, header, new, failed)
        if FLAGS.scores_file:
            report.write_scores(Path(FLAGS.scores_file), header, results, failed)

    if failed and index == 0:
        write([])
    for one, result in answer_tasks(answerer, prepared, failed, output, grader):
        if result is not None:
            results.append(result)
            terminal.show(result, FLAGS.show)
        elif index and one.task.name not in failed:
            log.info("%s: the share of process %d is answered", one.task.name, index)
        if index == 0:
            write([result] if result else [])

    if index == 0:
        if output:
            log.info("written: %s", output.folder / "summary.md")
        scores: dict[str, Any] = {result.task.name: result.scores for result in results}
        print(json.dumps({"checkpoint": str(loaded.folder), **scores} | ({"failed": failed} if failed else {})))
    if failed:
        raise failure(failed, len(tasks))


if __name__ == "__main__":
    define_flags()
    run_main(main, goes_on=lambda: bool(FLAGS["out"].value))
