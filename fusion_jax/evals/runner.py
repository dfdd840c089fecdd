"""Asks a checkpoint the questions of a benchmark, scores its answers, and keeps them for inspection.

With an output folder a run can be interrupted and shared; training runs without one (`evaluate_tasks`).
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from fusion_jax.data.sources import Record
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.evals import predictions as files
from fusion_jax.evals.judge import Judge
from fusion_jax.evals.prepare import Prepared, key, prepare, words
from fusion_jax.evals.registry import find_tasks
from fusion_jax.evals.sources import Source
from fusion_jax.evals.task import Prediction, Question, Task

log = logging.getLogger("fusion_jax")

_WINDOW = 8  # batches whose questions are sorted by length together: little padding, and tables are still read in order
_JUDGE_THREADS = 8


class Answers(Protocol):
    """The part of `generate.Answerer` that the runner uses."""

    rows: int
    max_tokens: int

    def answer(self, prompts: Sequence[Record]) -> list[str]: ...


@dataclass(frozen=True)
class Output:
    """Where answers are written, and which share of the questions this process answers.

    Attributes:
      folder: see predictions.py and report.py for what is in it.
      header: `checkpoint` (a fingerprint) and `folder` (for people) of the checkpoint.
      index, count: the number of this process and of all that share the work; process 0 joins the answers.
      patience: seconds for which process 0 waits for the next answer of the others.
    """

    folder: Path
    header: dict[str, Any]
    index: int = 0
    count: int = 1
    patience: float = 600.0


@dataclass(frozen=True)
class Result:
    """A task's predictions in the benchmark's order, and its figures.

    Attributes:
      seconds: time for answers and scores. files: those for the benchmark's server.
      source: the files that hold the questions. whole: number of questions in them.
    """

    task: Task
    predictions: list[Prediction]
    scores: dict[str, Any]
    seconds: float
    files: list[Path] = dataclasses.field(default_factory=list)
    source: Source = dataclasses.field(default_factory=Source)
    whole: int = 0


def evaluate_tasks(
    answerer: Answers, tasks: Sequence[str], data_dir: Path | str, limit: int = 0, rule: str = "official"
) -> dict[str, float]:
    """Evaluates some tasks; returns the figures in one flat dict, `task/figure`, for a training loop's metrics.

    It uses no judge and writes nothing. A task whose data cannot be used is logged and left out.

    Args:
      answerer: a `generate.Answerer` of the current parameters.
      tasks: names from `registry.TASKS`.
      data_dir: as for `prepare`.
      limit: about how many questions of each task, spread evenly; 0 for all.
      rule: `published` to ask and score as for the published figures.

    Raises:
      UserError: a task is unknown, an image cannot be decoded, or no task's data can be used.
    """
    prepared, failed = [], []
    for task in find_tasks(tasks, rule):
        try:
            prepared.append(prepare(task, Path(data_dir), limit))
        except UserError as error:
            failed.append(error)
    if failed and not prepared:
        raise failed[0]
    for error in failed:
        log.warning("the evaluation goes on without a task: %s", error)
    flat = {}
    for one in prepared:
        scores = answer_task(answerer, one, progress=False).scores
        flat |= {f"{one.task.name}/{name}": float(v) for name, v in scores.items() if isinstance(v, int | float)}
    return flat


def run_task(
    answerer: Answers,
    task: Task,
    data_dir: Path,
    output: Output | None = None,
    limit: int = 0,
    judge: Judge | None = None,
    progress: bool = True,
) -> Result | None:
    """Calls `prepare` and then `answer_task`."""
    return answer_task(answerer, prepare(task, data_dir, limit, progress), output, judge, progress)


def answer_task(
    answerer: Answers,
    prepared: Prepared,
    output: Output | None = None,
    judge: Judge | None = None,
    progress: bool = True,
) -> Result | None:
    """Answers and scores a task's questions; those with an answer in the output folder are not asked again.

    Args:
      judge: grades where the official rule needs a language model.

    Returns:
      The result; None in a process other than 0, once it has answered its share.

    Raises:
      UserError: an image cannot be decoded, the output folder holds another checkpoint's answers, other processes'
        answers do not come, or the judge does not answer.
    """
    start = time.perf_counter()
    task, questions = prepared.task, prepared.questions
    if output is None:
        answers: dict[tuple[str, str], str] = {}
        _ask(answerer, task, questions, progress, lambda q, a: answers.__setitem__(key(q), a), lambda: None)
    else:
        folder = output.folder / task.name
        # A contiguous share, so that each row of a table is read by one process.
        begin, end = (len(questions) * i // output.count for i in (output.index, output.index + 1))
        share = questions[begin:end]
        part = files.Part(folder, output.index, output.count, {"task": task.name, **output.header})
        done = files.read_answers(folder)
        missing = [q for q in share if key(q) not in done]
        if len(missing) < len(share):
            log.info("%s: %d of %d questions are answered already", task.name, len(share) - len(missing), len(share))
        try:
            _ask(answerer, task, missing, progress, lambda q, a: part.add(q.id, words(q), a), part.flush)
        finally:
            part.close()
        if output.index:
            return None
        answers = files.wait_for(folder, {key(q) for q in questions}, output.patience)
    predictions = _score(task, [Prediction(q, answers[key(q)]) for q in questions], judge, output)
    scores: dict[str, Any] = {"questions": len(predictions)}
    if all(p.score is not None for p in predictions):
        scores |= task.summarise(predictions) | _by_published_rule(task, predictions)
    written = []
    if output is not None:
        files.write_rows(output.folder / task.name / "predictions.jsonl", [p.row() for p in predictions])
        written = task.submit(predictions, output.folder / task.name) if task.submit else []
    return Result(task, predictions, scores, time.perf_counter() - start, written, prepared.source, prepared.whole)


def record(task: Task, question: Question) -> Record:
    """The record that the model answers: all pictures, then the prompt."""
    images = tuple(p.load() for p in question.pictures)
    tags = "<image>\n" * len(images)
    turns = [{"from": "human", "value": tags + question.prompt.replace("<image>", "")}]
    first = question.pictures[0].name if images else None
    where, system = f"{task.name}, question {question.id}", question.about.get("system")
    return Record(question.id, first and Path(first), turns, where, images, system=system, guide=question.guide)


def _ask(
    answerer: Answers,
    task: Task,
    questions: Sequence[Question],
    progress: bool,
    keep: Callable[[Question, str], None],
    flush: Callable[[], None],
) -> None:
    rows = max(1, getattr(answerer, "rows", 1))
    bar = tqdm(total=len(questions), desc=task.name, unit="q", disable=not progress)
    with bar, _longest(answerer, task.max_tokens):
        for batch in _batches(questions, rows):
            try:
                answers = answerer.answer([record(task, question) for question in batch])
            except BadRecord as bad:
                raise UserError(f"{bad.where}: {bad.detail}.") from bad
            for question, answer in zip(batch, answers):
                keep(question, answer)
            flush()
            bar.update(len(batch))


def _batches(questions: Sequence[Question], rows: int) -> Iterator[list[Question]]:
    """Batches of similar lengths, from windows in the benchmark's order."""
    for start in range(0, len(questions), rows * _WINDOW):
        window = questions[start : start + rows * _WINDOW]
        window = sorted(window, key=lambda q: (len(q.pictures), len(q.prompt)))
        yield from (window[i : i + rows] for i in range(0, len(window), rows))


@contextmanager
def _longest(answerer: Answers, max_tokens: int) -> Iterator[None]:
    """Sets the answerer's longest answer to the task's for a while."""
    before = answerer.max_tokens
    answerer.max_tokens = max_tokens
    try:
        yield
    finally:
        answerer.max_tokens = before


def _score(task: Task, predictions: list[Prediction], judge: Judge | None, output: Output | None) -> list[Prediction]:
    if judge is None or task.judged is None:
        scored = [task.score(p.question, p.answer) for p in predictions]
    else:
        scored = _judge(task, predictions, judge, output)
    return [dataclasses.replace(p, parsed=parsed, score=score) for p, (parsed, score) in zip(predictions, scored)]


def _by_published_rule(task: Task, predictions: Sequence[Prediction]) -> dict[str, float]:
    """The published figure from the same answers, where it was measured by another rule."""
    rule = task.published
    if rule is None or not rule.same_answers:
        return {}
    scored = [(p, (rule.score or task.score)(p.question, p.answer)) for p in predictions]
    figures = task.summarise([dataclasses.replace(p, parsed=parsed, score=score) for p, (parsed, score) in scored])
    headline = rule.headline or task.headline
    return {f"{headline} (rule=published)": figures[headline]} if headline in figures else {}


def _judge(task: Task, predictions: list[Prediction], judge: Judge, output: Output | None) -> list[tuple]:
    """Asks the judge for verdicts; those in the output folder are not asked for again."""
    path = output.folder / task.name / "verdicts.jsonl" if output else None
    known = {}
    if path and path.exists():
        whole = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if _verdict(line)]
        path.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
        known = dict(_verdict(line) for line in whole)

    def name(p: Prediction) -> str:
        return files.digest(json.dumps([judge.model, p.question.id, p.question.prompt, p.answer]))

    waiting = [p for p in predictions if name(p) not in known]
    with (
        ThreadPoolExecutor(_JUDGE_THREADS) as pool,
        tqdm(total=len(waiting), desc=f"{task.name}, judge", unit="q", disable=not waiting) as bar,
    ):
        # One window at a time, so that after an error no further window is requested.
        for start in range(0, len(waiting), _JUDGE_THREADS):
            window = waiting[start : start + _JUDGE_THREADS]
            pending = [(p, pool.submit(task.judged, p.question, p.answer, judge)) for p in window]
            # All verdicts of the window are written before an error ends the run.
            for p, verdict in pending:
                if verdict.exception() is None:
                    known[name(p)] = parsed, score = verdict.result()
                    if path:
                        with open(path, "a", encoding="utf-8") as file:
                            file.write(json.dumps({"of": name(p), "parsed": parsed, "score": score}) + "\n")
            for _, verdict in pending:
                verdict.result()
            bar.update(len(window))
    return [known[name(p)] for p in predictions]


def _verdict(line: str) -> tuple[str, tuple] | None:
    """The verdict in a line of verdicts.jsonl; None for a damaged line, which is asked for again."""
    try:
        row = json.loads(line)
        return str(row["of"]), (row["parsed"], row["score"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
