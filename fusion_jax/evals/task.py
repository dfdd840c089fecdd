"""What a benchmark is to the runner: questions, a rule that scores one answer, and a summary of all of them."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion_jax.evals.choices import is_missing
from fusion_jax.evals.judge import Judge

Scored = tuple[Any, float | None]  # what was read out of the answer, and its score; None where nothing can be said


@dataclass(frozen=True)
class Picture:
    """An image of a question.

    Attributes:
      name: for people: the file, or where in a table it is.
      load: gives the file, or the bytes of one.
      stored_in_file: `name` is a file of its own.
    """

    name: str
    load: Callable[[], Path | bytes] = field(repr=False)
    stored_in_file: bool = False


def picture(path: Path) -> Picture:
    """The picture in a file."""
    return Picture(str(path), lambda: path, stored_in_file=True)


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
      id: unique within the task.
      prompt: what the model reads, without image tags: the pictures come before it.
      reference: the right answer, as JSON; None where the benchmark keeps it secret.
      pictures: in order; none for a question about text.
      text: the benchmark's own words, for people; by default the prompt.
      about: whatever the score or the summary needs besides (category, options, split), as JSON; `system`, where there
        is one, is the system text in place of the template's.
      group: questions that are only worth something together (a pair, the passes of one question) share it.
      control: asked for comparison alone; its answer is expected to be wrong and is not shown as a mistake.
    """

    id: str
    prompt: str
    reference: Any
    pictures: tuple[Picture, ...] = ()
    text: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    control: bool = False


@dataclass(frozen=True)
class Prediction:
    """A question with the model's answer; `parsed` and `score` as the task's rule gives them."""

    question: Question
    answer: str
    parsed: Any = None
    score: float | None = None

    def row(self) -> dict[str, Any]:
        """Everything needed to look again, as JSON."""
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
        }


@dataclass(frozen=True)
class Rule:
    """How a benchmark's published figures were measured, where the task itself follows another rule.

    What is left out is as in the task.

    Attributes:
      name: whose code, and which version.
      score: of one answer. headline: the figure that was published.
      read: the questions in that code's words. max_tokens: longest answer.
    """

    name: str
    score: Callable[[Question, str], Scored] | None = None
    headline: str = ""
    read: Callable[[Path], list[Question]] | None = None
    max_tokens: int = 0

    @property
    def same_answers(self) -> bool:
        """The task's own answers can be scored: the model is asked the same."""
        return self.read is None and not self.max_tokens


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
      name: what `--tasks` calls it. title: what tables call it.
      data: what belongs into the data folder; errors quote it.
      read: the questions in a data folder. Raises UserError for a folder of another shape.
      score: one answer's score by the official rule, without a judge.
      summarise: figures by name, in the units of the benchmark's publications (mostly percent).
      headline: the figure that publications quote; "" where there is none without the benchmark's server.
      max_tokens: longest answer.
      judged: as `score`, where the official rule asks a language model; used when one is configured.
      submit: writes what the benchmark's server takes into a folder and returns the files.
      rule: the official code that `score` follows, with its version; "" for figures of our own.
      published: the rule that the published figures were made with, where that is another.
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
    """100 times the mean; 0 of nothing."""
    return 100 * sum(scores) / len(scores) if scores else 0.0


def percent_by(predictions: Sequence[Prediction], key: str) -> dict[str, float]:
    """`percent` of the scores for each value of `about[key]`, sorted by value; "" where there is none."""
    groups: dict[str, list[float]] = {}
    for p in predictions:
        value = p.question.about[key]
        groups.setdefault("" if is_missing(value) else str(value), []).append(p.score)
    return {name: percent(scores) for name, scores in sorted(groups.items())}
