"""Reads a benchmark and checks rows, references and image headers before any question is asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fusion_jax.data.image import read_size
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.evals import sources
from fusion_jax.evals.choices import LETTERS, is_blank, place
from fusion_jax.evals.predictions import digest
from fusion_jax.evals.task import Question, Task
from fusion_jax.files import shown

# Errors of reading and scoring where a file differs from the benchmark's own.
ODD_FILES = (
    OSError, AttributeError, LookupError, SyntaxError, TypeError, ValueError, ArithmeticError, RecursionError,
    MemoryError,
)  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A task with the questions that will be asked.

    Attributes:
      source: the files that hold them. whole: number of questions in these files, without those for comparison.
    """

    task: Task
    questions: list[Question]
    source: sources.Source
    whole: int


def prepare(task: Task, data_dir: Path, limit: int = 0, progress: bool = False) -> Prepared:
    """Reads a task's questions, and checks that each can be asked and every answer scored.

    Args:
      data_dir: the benchmark's data, or a folder with one folder for each benchmark.
      limit: about how many questions, spread evenly; 0 for all. Images of the others are not read.
      progress: whether to show a progress bar while images are checked.

    Raises:
      UserError: the data folder has another layout, or a row, a reference or an image cannot be used.
    """
    with sources.noted() as source:
        every = _read(task, data_dir)
    questions = sample(every, limit)
    if not questions:
        raise UserError(f"{task.name}: {data_dir} holds no questions; expected {task.data}.")
    _check(task, questions)
    _check_images(task, questions, progress)
    return Prepared(task, questions, source, sum(not q.control for q in every))


def sample(questions: list[Question], limit: int) -> list[Question]:
    """About `limit` questions, evenly spread and in whole groups; all of them for 0."""
    if not limit or limit >= len(questions):
        return questions
    groups = list(dict.fromkeys(q.group or q.id for q in questions))
    count = max(1, limit * len(groups) // len(questions))
    chosen = {groups[i * len(groups) // count] for i in range(count)}
    return [q for q in questions if (q.group or q.id) in chosen]


def key(question: Question) -> tuple[str, str]:
    """The key of a question's answer: its id, and a digest of the whole text that the answer depends on."""
    return question.id, digest(words(question))


def words(question: Question) -> str:
    """The whole text that an answer depends on."""
    system = question.about.get("system")
    return question.prompt if system is None else f"{system}\n\n{question.prompt}"


def _read(task: Task, data_dir: Path) -> list[Question]:
    """The task's questions; every error names the expected files."""
    try:
        return task.read(data_dir)
    except UserError as error:
        message = str(error) if str(error).startswith(f"{task.name}: ") else f"{task.name}: {error}"
        if "; expected " in message:
            raise UserError(message) from error
        raise UserError(f"{message.rstrip('.')}; expected {task.data}.") from error
    except ODD_FILES as error:
        message = f"{type(error).__name__}: {shown(error)}"
        raise UserError(
            f"{task.name}: a file in {data_dir} cannot be used ({message}); expected {task.data}."
        ) from error


def _check(task: Task, questions: Sequence[Question]) -> None:
    """Raises UserError where two ids are equal, or an answer could not be compared with its reference."""
    if task.headline and (secret := next((q for q in questions if q.reference is None), None)):
        raise UserError(
            f"{task.name}: there are questions without an answer, as only test splits have; the first is "
            f"{shown(secret.id)}{_row(secret)}; expected {task.data}."
        )
    seen: dict[str, Question] = {}
    for question in questions:
        try:
            key(question)
            task.score(question, "")
            if task.published and task.published.score:
                task.published.score(question, "")
        except ODD_FILES as error:
            raise UserError(
                f"{task.name}: no answer to the question {shown(question.id)} can be scored ({type(error).__name__}: "
                f"{shown(error)}){_row(question)}; expected {task.data}."
            ) from error
        _check_filled(task, question)
        if question.id in seen:
            rows = "".join({_row(seen[question.id]): 0, _row(question): 0})
            raise UserError(f"{task.name}: two questions have the id {question.id!r}{rows}.")
        seen[question.id] = question


def _row(question: Question) -> str:
    """The question's row, in brackets, if its picture is in a table."""
    table = question.pictures and not question.pictures[0].stored_in_file
    return f" ({question.pictures[0].name})" if table else ""


def _check_filled(task: Task, question: Question) -> None:
    """Raises UserError where an option or an answer is empty, or the answer is not one of the options."""
    where, row, right = f"{task.name}, question {shown(question.id)}", _row(question), question.reference
    options = question.about.get("options") or ()
    by_letter = options if isinstance(options, dict) else dict(zip(LETTERS, options))
    texts = list(by_letter.values())
    if any(map(is_blank, texts)):
        raise UserError(f"{where}: an option is empty{row}.")
    if right is not None and (is_blank(right) or right == []):
        raise UserError(f"{where}: the answer is empty{row}.")
    # The answer must not be a lower-case letter, a number or an option's text either, because no prediction would ever
    # equal that. Only MathVista's answers are texts.
    if texts and isinstance(right, str) and "answer_type" not in question.about:
        try:
            place(right, list(by_letter), where)
        except UserError as error:
            raise UserError(f"{str(error).rstrip('.')}{row}.") from error


def _check_images(task: Task, questions: Sequence[Question], progress: bool) -> None:
    """Raises UserError where images are missing, or their headers cannot be read."""
    missing = [(p.name, q.id) for q in questions for p in q.pictures if p.stored_in_file and not Path(p.name).is_file()]
    if missing:
        raise UserError(
            f"{task.name}: {len(missing)} of {len(questions)} images are missing, the first is {missing[0][0]} "
            f"(question {missing[0][1]})."
        )
    pictures = {id(p): (p, q) for q in questions for p in q.pictures}
    bad = []
    shown_as = f"{task.name}, images"
    for picture, question in tqdm(pictures.values(), shown_as, unit="", disable=not progress, leave=False):
        try:
            read_size(picture.load(), picture.name)
        except BadRecord as error:
            bad.append(f"{task.name}, question {shown(question.id)}: {error.detail}{_row(question)}")
        except UserError as error:
            bad.append(f"{task.name}, question {shown(question.id)}: {str(error).rstrip('.')}")
        except ODD_FILES as error:
            reason = f"{type(error).__name__}: {shown(error)}"
            bad.append(
                f"{task.name}, question {shown(question.id)}: the image cannot be read ({reason}){_row(question)}"
            )
    if bad:
        more = f" ({len(bad) - 1} more of {len(pictures)} images cannot be used)" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}.")
