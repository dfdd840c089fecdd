"""Prints the progress of an evaluation: the tasks before they are asked, and results with examples."""

import logging
from collections.abc import Sequence
from pathlib import Path

from fusion_jax.evals import published
from fusion_jax.evals.prepare import Prepared
from fusion_jax.evals.runner import Result
from fusion_jax.evals.task import Prediction

log = logging.getLogger("fusion_jax")


def describe(prepared: Prepared, graded: bool) -> None:
    """Logs what will be asked, and what limits the comparison with published figures.

    Args:
      graded: whether a judge is configured.
    """
    name = prepared.task.name
    log.info("%s: %d questions from %s", name, len(prepared.questions), prepared.source.one_line())
    if part := published.part(name, prepared.whole):
        log.warning("%s: these are %s questions: not the published split, or not all of it", name, part)
    if prepared.task.judged and not graded:
        log.info("%s: the official rule asks a language model; set JUDGE_MODEL and JUDGE_BASE_URL", name)


def show(result: Result, examples: int) -> None:
    """Logs a task's figures and the files for its server, with some questions and answers before them."""
    name = result.task.name
    _show_examples(result.predictions, examples)
    log.info("%s: %d questions in %.0f s: %s", name, len(result.predictions), result.seconds, _figures(result))
    for path in result.files:
        log.info("%s: for the benchmark's server: %s", name, path)


def _figures(result: Result) -> str:
    """The figure that publications quote first, then up to five others."""
    numbers = {key: value for key, value in result.scores.items() if isinstance(value, int | float)}
    numbers = {key: numbers[key] for key in (result.task.headline, *numbers) if key in numbers and key != "questions"}
    return ", ".join(f"{key} {value:.4g}" for key, value in list(numbers.items())[:6]) or "not scored here"


def _show_examples(predictions: Sequence[Prediction], count: int) -> None:
    """Logs `count` questions on as many topics as possible, in the benchmark's order."""
    seen: dict[str, int] = {}
    ranked = []
    for position, p in enumerate(predictions):
        if p.question.control:
            continue
        topic = str(p.question.about.get("topic", p.question.about.get("category", "")))
        seen[topic] = seen.get(topic, 0) + 1
        ranked.append((seen[topic], position))
    for _, position in sorted(ranked)[:count]:
        p = predictions[position]
        log.info(
            "%s\n    Q: %s\n    model: %s   expected: %s   (%s)",
            ", ".join(Path(image.name).name for image in p.question.pictures) or "no image",
            p.question.text or p.question.prompt,
            p.answer,
            p.question.reference,
            "not scored" if p.score is None else "right" if p.score == 1 else "wrong",
        )
