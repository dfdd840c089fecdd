"""Writes report.html: all figures beside the published ones, and wrong answers with their images.

Like the summary, it covers every task with answers in the folder, not only those of the last run. A task's part is kept
beside its predictions, so that each image is read only once.
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fusion_jax.data.image import load_image
from fusion_jax.errors import BadRecord
from fusion_jax.evals import summary
from fusion_jax.evals.runner import Result
from fusion_jax.evals.task import Picture, Prediction

WRONG = 40  # wrong answers shown per task
_SIDE = 256  # pixels of a thumbnail's longer side
_PART = "report_part.html"


def write(
    output: Path, header: dict[str, Any], results: Sequence[Result], failed: Mapping[str, str] | None = None
) -> list[Path]:
    """Writes or updates the summary and the report; returns their files.

    Args:
      failed: error messages by the names of tasks that have no result.
    """
    for result in results:
        part = output / result.task.name / _PART
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(_section(result), encoding="utf-8", errors="replace")
    there, paths = summary.write(output, header, results, failed or {})
    parts = [output / name / _PART for name in there["tasks"]]
    page = output / "report.html"
    page.write_text(
        _page(there, [p.read_text(encoding="utf-8") for p in parts if p.exists()]), encoding="utf-8", errors="replace"
    )
    return [*paths, page]


def write_scores(path: Path, header: dict[str, Any], results: Sequence[Result], failed: Mapping[str, str]) -> None:
    """Writes one JSON file of all scores and of all answers but those for comparison (`Question.control`)."""
    scores: dict[str, Any] = {"checkpoint": header["folder"]}
    for result in results:
        examples = [p.row() for p in result.predictions if not p.question.control]
        scores[result.task.name] = {**result.scores, "examples": examples}
    path.write_text(json.dumps(scores | ({"failed": dict(failed)} if failed else {}), indent=2))


def is_wrong(prediction: Prediction) -> bool:
    """Whether an answer was scored below full marks although the right one was expected."""
    return prediction.score is not None and prediction.score < 1 and not prediction.question.control


def _section(result: Result) -> str:
    wrong = [p for p in result.predictions if is_wrong(p)]
    shown = [wrong[i * len(wrong) // min(WRONG, len(wrong))] for i in range(min(WRONG, len(wrong)))]
    title = html.escape(result.task.title)
    questions = sum(not p.question.control for p in result.predictions)
    note = f"{len(wrong)} of {questions} answers without full marks; {len(shown)} of them shown."
    if all(p.score is None for p in result.predictions):
        note = "These answers are not scored here."
    cards = "\n".join(_card(p) for p in shown)
    return f'<section id="{result.task.name}"><h2>{title}</h2><p>{note}</p><div class="cards">{cards}</div></section>'


def _card(prediction: Prediction) -> str:
    q = prediction.question
    pictures = "".join(thumbnail(p) for p in q.pictures[:4])
    rows = [
        ("question", q.text or q.prompt),
        ("model", prediction.answer),
        ("read as", prediction.parsed),
        ("right", q.reference),
        ("score", f"{prediction.score:g}"),
    ]
    if str(prediction.parsed) == prediction.answer:
        del rows[2]
    text = "".join(f"<dt>{name}</dt><dd>{html.escape(_words(value))}</dd>" for name, value in rows)
    return f'<article>{pictures}<dl>{text}</dl><p class="id">{html.escape(q.id)}</p></article>'


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def thumbnail(picture: Picture) -> str:
    """An `img` element with the picture, reduced; where it cannot be read, the reason in its place."""
    name = html.escape(Path(picture.name).name)
    try:
        image = load_image(picture.load())
    except BadRecord as bad:
        return f"<p>{html.escape(bad.detail)}</p>"
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return (
        f'<img alt="{name}" loading="lazy" src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'
    )


_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { padding: .25rem .75rem; border-bottom: 1px solid #8885; text-align: right }
td:first-child, th:first-child, td:nth-child(2), th:nth-child(2) { text-align: left }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem }
article { border: 1px solid #8885; border-radius: .5rem; padding: .75rem; overflow-wrap: anywhere }
img { max-width: 100%; display: block; margin-bottom: .5rem }
dl { margin: 0; display: grid; grid-template-columns: auto 1fr; gap: .1rem .75rem } dt { opacity: .7 } dd { margin: 0 }
dd { white-space: pre-wrap } .id { opacity: .6; font-size: .8rem; margin: .5rem 0 0 }
"""


def _page(there: dict[str, Any], sections: Sequence[str]) -> str:
    heads, rows = summary.table(there)
    body = []
    for row in rows:
        first = html.escape(row.cells[0])
        cells = [f'<a href="#{row.task}">{first}</a>' if row.task in there["tasks"] else first]
        cells += [html.escape(cell) for cell in row.cells[1:]]
        body.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    failed = "".join(
        f"<p>{html.escape(title)} failed: {html.escape(error)}</p>" for title, error in summary.failures(there)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Evaluation</title>'
        f"<style>{_STYLE}</style></head><body><h1>Evaluation</h1><p>{html.escape(str(there['folder']))}</p>{failed}"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        f"{''.join(sections)}</body></html>\n"
    )
