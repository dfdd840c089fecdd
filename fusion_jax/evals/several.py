"""Runs several tasks: all are checked first, and one that fails does not stop the others.

A task fails where its data cannot be read, for example, or its judge does not answer.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fusion_jax.command_line.cli import explain
from fusion_jax.errors import RunAgain, UserError, first_line
from fusion_jax.evals.guide import guided_by
from fusion_jax.evals.judge import Judge
from fusion_jax.evals.prepare import Prepared, prepare
from fusion_jax.evals.runner import Answers, Output, Result, answer_task
from fusion_jax.evals.task import Task

log = logging.getLogger("fusion_jax")

Failed = dict[str, str]  # error by name of the task


def prepare_tasks(
    tasks: Sequence[Task],
    data_dir: Path,
    failed: Failed,
    limit: int = 0,
    progress: bool = False,
    guide: str = "question",
) -> list[Prepared]:
    """Prepares the tasks, see `prepare` and `guided_by`; the errors of those that cannot be asked go into `failed`."""

    def one(task: Task) -> Prepared:
        return guided_by(prepare(task, data_dir, limit, progress), guide)

    every = [_attempt(task.name, failed, lambda task=task: one(task)) for task in tasks]
    return [one for one in every if one is not None]


def answer_tasks(
    answerer: Answers, prepared: Sequence[Prepared], failed: Failed, output: Output | None = None,
    judge: Judge | None = None, progress: bool = True,
) -> Iterator[tuple[Prepared, Result | None]]:  # fmt: skip
    """Yields each task with its result, which is None for a task that fails and where `answer_task` returns None."""
    for one in prepared:
        yield one, _attempt(one.task.name, failed, lambda one=one: answer_task(answerer, one, output, judge, progress))


def _attempt(name: str, failed: Failed, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except (RunAgain, BrokenPipeError):  # these end the command
        raise
    except Exception as error:
        known = explain(error)
        if known is None:
            log.exception("%s stopped with an unexpected error", name)
        failed[name] = known[1] if known else f"{type(error).__name__}: {first_line(error)}"
        log.error("%s failed; the other tasks go on: %s", name, failed[name])
        return None


def failure(failed: Failed, count: int) -> UserError:
    """The error of a run of `count` tasks, of which these failed."""
    reasons = [error if error.startswith(name) else f"{name}: {error}" for name, error in failed.items()]
    if len(failed) == count == 1:
        return UserError(reasons[0])
    return UserError(f"{len(failed)} of {count} tasks failed: {' '.join(reasons)}")
