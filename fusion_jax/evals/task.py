"""Defines a benchmark: its questions, the rule that scores an answer, and the summary of all answers."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion_jax.evals.choices import is_missing
from fusion_jax.evals.judge import Judge

Scored = tuple[Any, float | None]  # the parsed answer, and its score; None where it cannot be scored here


@dataclass(frozen=True)
class Picture:
    """An image of a question.

    Attributes:
      name: for people: the file, or its place in a table.
      load: returns the file's path, or its bytes.
      stored_in_file: whether `name` is a file of its own.
    """

    name: str
    load: Callable[[], Path | bytes] = field(repr=False)
    stored_in_file: bool = False


def picture(path: Path) -> Picture:
    """The picture in a file."""
    return Picture(str(path), lambda: path, stored_in_file=True)


@dataclass(frozen=True)
class Question:
    """A question of a benchmark.

    Attributes:
      id: unique within the task.
      prompt: what the model reads, without image tags: the pictures come before it.
      reference: the right answer, as JSON; None where the benchmark keeps it secret.
      pictures: in order; none for a question about text.
      text: the question in the benchmark's own words, for people; by default the prompt.
      about: other values for the score or the summary (category, options, split), as JSON; `system`, if there is one,
        replaces the template's system text.
      group: shared by questions that count only together, such as a pair or the rotations of one question.
      control: whether it is asked for comparison only; its answer should be wrong and is not shown as a mistake.
      guide: the text that the vision encoder reads instead of the prompt, see guide.py; None for the prompt.
    """

    id: str
    prompt: str
    reference: Any
    pictures: tuple[Picture, ...] = ()
    text: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    control: bool = False
    guide: str | None = None


@dataclass(frozen=True)
class Prediction:
    """A question with the model's answer, what the task's rule reads from the answer, and its score."""

    question: Question
    answer: str
    parsed: Any = None
    score: float | None = None

    def row(self) -> dict[str, Any]:
        """The prediction as JSON, for inspection."""
        q = self.question
        return {
            "id": q.id,
            "question": q.text or q.prompt,
            "image": [p.name for p in q.pictures],
            "prompt": q.prompt,
            "answer": self.answer,
            "parsed": self.parsed,
            "reference": q.reference,
            "score": self.score,
            **({"about": q.about} if q.about else {}),
            **({"control": True} if q.control else {}),
            **({} if q.guide is None else {"guide": q.guide}),
        }


@dataclass(frozen=True)
class Rule:
    """How a benchmark's published figures were measured, where the task itself follows another rule.

    Attributes that are left out are as in the task.

    Attributes:
      name: the code, and its version.
      score: scores one answer. headline: the figure that was published.
      read: reads the questions with that code's prompts. max_tokens: longest answer.
    """

    name: str
    score: Callable[[Question, str], Scored] | None = None
    headline: str = ""
    read: Callable[[Path], list[Question]] | None = None
    max_tokens: int = 0

    @property
    def same_answers(self) -> bool:
        """Whether the task's own answers can be scored, because the prompts are the same."""
        return self.read is None and not self.max_tokens


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
      name: its name in `--tasks`. title: its name in tables.
      data: the files that the data folder must hold; errors quote it.
      read: returns the questions in a data folder. Raises UserError for a folder with another layout.
      score: one answer's score by the official rule, without a judge.
      summarise: returns figures by name, in the units of the benchmark's publications (mostly percent), for predictions
        that all have a score; where some have none there are no figures.
      headline: the figure that publications quote; "" where there is none without the benchmark's server.
      max_tokens: longest answer.
      judged: like `score`, for official rules that use a language model; used when one is configured.
      submit: writes the files for the benchmark's server into a folder and returns them.
      rule: the official code that `score` follows, with its version; "" for figures of our own.
      published: the rule by which the published figures were measured, where it differs.
    """

    name: str
    title: str
    data: str
    read: Callable[[Path], list[Question]]
    score: Callable[[Question, str], Scored]
    summarise: Callable[[Sequence[Prediction]], dict[str, Any]]
    headline: str
    max_tokens: int = 32
    judged: Callable[[Question, str, Judge], Scored] | None = None
    submit: Callable[[Sequence[Prediction], Path], list[Path]] | None = None
    rule: str = ""
    published: Rule | None = None

    def as_published(self) -> "Task":
        """The same benchmark, asked and scored as for the published figures, under a name of its own."""
        rule = self.published
        if rule is None:
            return self
        return dataclasses.replace(
            self,
            name=f"{self.name}_published",
            title=f"{self.title}, rule=published",
            rule=rule.name,
            score=rule.score or self.score,
            headline=rule.headline or self.headline,
            read=rule.read or self.read,
            max_tokens=rule.max_tokens or self.max_tokens,
            published=None,
        )


def percent(scores: Sequence[float]) -> float:
    """100 times the mean; 0 for no values."""
    return 100 * sum(scores) / len(scores) if scores else 0.0


def accuracy(predictions: Sequence[Prediction]) -> float:
    """Mean score of the predictions in percent."""
    return percent([p.score for p in predictions])


def summarise_accuracy(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The figures of a benchmark that has only its accuracy."""
    return {"accuracy": accuracy(predictions)}


def percent_by(predictions: Sequence[Prediction], key: str) -> dict[str, float]:
    """`percent` of the scores for each value of `about[key]`, sorted by value; "" stands for a missing one."""
    groups: dict[str, list[float]] = {}
    for p in predictions:
        value = p.question.about[key]
        groups.setdefault("" if is_missing(value) else str(value), []).append(p.score)
    return {name: percent(scores) for name, scores in sorted(groups.items())}
