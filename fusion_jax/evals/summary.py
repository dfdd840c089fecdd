"""Writes summary.json, summary.md and summary.csv into the output folder of an evaluation.

They cover every task with answers in the folder, not only those of the last run. The table shows all published figures
of the family (published.py) with this checkpoint's beside them.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_jax.evals import published
from fusion_jax.evals.registry import TASKS
from fusion_jax.evals.runner import Result
from fusion_jax.evals.sources import one_line
from fusion_jax.files import shown, write_whole

_LONGEST = 2000  # characters of an error


def write(
    output: Path, header: dict[str, Any], results: Sequence[Result], failed: Mapping[str, str]
) -> tuple[dict[str, Any], list[Path]]:
    """Writes or updates the summary; returns it, and its files.

    Args:
      failed: error messages by the names of tasks without a result. Earlier figures of such a task are kept.
    """
    output.mkdir(parents=True, exist_ok=True)
    tasks = _earlier(output, header)
    for result in results:
        tasks[result.task.name] = {
            "scores": result.scores,
            "seconds": round(result.seconds, 1),
            "files": [str(path.relative_to(output)) for path in result.files],
            "data": result.source.row() | {"questions": result.whole},
        }
    for name, error in failed.items():
        tasks[name] = {**tasks.get(name, {}), "error": shown(error, _LONGEST)}
    there = {**header, "tasks": {name: tasks[name] for name in TASKS if name in tasks}}
    paths = [output / f"summary.{ending}" for ending in ("json", "md", "csv")]
    texts = (json.dumps(there, indent=1, ensure_ascii=False) + "\n", markdown(there), _csv(there))
    for path, text in zip(paths, texts):
        write_whole(path, text.encode(errors="replace"))
    return there, paths


def _earlier(output: Path, header: dict[str, Any]) -> dict[str, Any]:
    path = output / "summary.json"
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        return earlier["tasks"] if earlier["checkpoint"] == header["checkpoint"] else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


@dataclass(frozen=True)
class Line:
    """One row of the table: its task and cells, and how its published figures were measured."""

    task: str
    cells: list[str]
    measured: str = ""


def table(there: Mapping[str, Any]) -> tuple[list[str], list[Line]]:
    """Heads and rows: first all published figures with this checkpoint's, then the tasks without published ones."""
    heads = ["benchmark", "figure", "this checkpoint", *published.MODELS, "questions"]
    scores = _scores(there)
    lines = [Line("", ["visual tokens", "", "", *map(str, published.TOKENS), ""])]
    known = set()
    for row in published.ROWS:
        value, task, figure = row.own(scores)
        known.add((task, figure))
        cells = [row.title, figure, _number(value), *map(_number, row.values), _questions(task, there)]
        lines.append(Line(task, cells, row.measured + _own_rule(task, figure)))
    for name, figures in scores.items():
        task = TASKS[name]
        if (name, task.headline) not in known:
            value = figures.get(task.headline)
            own = "not scored here" if value is None else _number(value)
            cells = [task.title, task.headline, own, *[""] * len(published.MODELS), _questions(name, there)]
            lines.append(Line(name, cells))
    return heads, lines


def _own_rule(task: str, figure: str) -> str:
    """The rule of our own figure, and how to measure by the published rule where that is another."""
    one = TASKS[task]
    if one.published is not None and figure.endswith("(rule=published)"):
        return f". Here: {one.published.name}"
    other = "; --rule=published measures as published" if one.published is not None else ""
    return f". Here: {one.rule}{other}" if one.rule else ""


def failures(there: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Title and error of each task that failed when it was last run."""
    return [(TASKS[name].title, entry["error"]) for name, entry in there["tasks"].items() if "error" in entry]


def markdown(there: Mapping[str, Any]) -> str:
    """The summary as Markdown: failures, the table, how it was measured, all figures, and the data."""
    parts = [f"Checkpoint: {there['folder']}"]
    if failed := failures(there):
        parts += ["## Failed", _list((title, error) for title, error in failed)]
    heads, lines = table(there)
    rows = [heads, ["---", "---", *["---:"] * (len(heads) - 2)], *(line.cells for line in lines)]
    parts += ["\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)]
    parts += ["## How the published figures were measured"]
    parts += [_list((line.cells[0], line.measured) for line in lines if line.measured)]
    scores = _scores(there)
    parts += ["## All figures", _list((TASKS[name].title, _every(figures)) for name, figures in scores.items())]
    data = {name: there["tasks"][name].get("data") for name in scores}
    parts += ["## Data", _list((TASKS[name].title, one_line(entry)) for name, entry in data.items() if entry)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _list(items) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in items)


def _every(figures: Mapping[str, Any]) -> str:
    every = ", ".join(f"{key} {_number(value)}" for key, value in flat(figures).items() if key != "questions")
    return every or "no figures without the benchmark’s own server or a judge"


def _scores(there: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: entry["scores"] for name, entry in there["tasks"].items() if "scores" in entry}


def _questions(task: str, there: Mapping[str, Any]) -> str:
    """Number of questions and, if these are not all, of all: in the published split, or else in the files."""
    entry = there["tasks"].get(task, {})
    if (count := entry.get("scores", {}).get("questions")) is None:
        return ""
    whole = entry.get("data", {}).get("questions", count)
    return published.part(task, count) or (f"{count} of {whole}" if count < whole else str(count))


def _csv(there: Mapping[str, Any]) -> str:
    heads, lines = table(there)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([["task", *heads], *([line.task, *line.cells] for line in lines)])
    return text.getvalue()


def flat(figures: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures under one name, such as `by_category/animals`."""
    every = {}
    for key, value in figures.items():
        every |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return every


def _number(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if abs(value) <= 1 else f"{value:.1f}"
