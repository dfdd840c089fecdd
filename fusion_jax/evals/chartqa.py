"""ChartQA, test split: questions about charts (Masry et al., ACL Findings 2022).

Some questions were written by people (human), some by a machine (augmented).

test/test_human.json, test/test_augmented.json   [{"imgname", "query", "label"}, ...]
test/png/                                        the images
or Parquet with the columns type (human_test or augmented_test), question, answer, image
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.evals import choices, files
from fusion_jax.evals.task import Picture, Prediction, Question, Scored, Task, accuracy, percent, picture

DATA = "test_human.json and test_augmented.json with the images in png/, or the test split in Parquet files"
_TOLERANCE = 0.05
_LAST_LINE = "Answer the question with a single word."


def read(data_dir: Path) -> list[Question]:
    folder = files.open_folder(data_dir, ("chartqa",), "chartqa", DATA)
    if parquet := folder.parquet(("default", ("test",))):
        rows = files.read_parquet(parquet, ("type", "question", "answer"))
        return [
            _question(str(n), r.values["type"], r.values["question"], r.values["answer"], r.picture("image"))
            for n, r in enumerate(rows)
        ]
    questions = []
    for kind in ("human", "augmented"):
        path = folder.one(f"test_{kind}.json")
        for number, line in enumerate(files.read_records(path)):
            row = files.need_keys(line, ("imgname", "query", "label"), f"{path}, record {number}")
            image = picture(path.parent / "png" / row["imgname"])
            questions.append(_question(f"{kind}/{number}", kind, row["query"], row["label"], image))
    return questions


def _question(key: str, kind: str, text: str, answer: str, image: Picture) -> Question:
    about = {"kind": "human" if kind.startswith("human") else "augmented"}
    reference = "" if choices.is_blank(answer) else str(answer)
    return Question(key, f"{text}\n{_LAST_LINE}", reference, (image,), text, about)


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed(answer: str, reference: str) -> bool:
    """Whether a number or percentage is within 5% of the reference; any other text, and an answer to a reference of 0,
    must equal it but for case."""
    value, right = _number(answer), _number(reference)
    if value is not None and right:
        return abs(value - right) / abs(right) <= _TOLERANCE
    return answer.lower() == reference.lower()


def score(question: Question, answer: str) -> Scored:
    parsed = answer.strip()
    return parsed, float(relaxed(parsed, question.reference))


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    kinds = {
        kind: [p.score for p in predictions if p.question.about["kind"] == kind] for kind in ("human", "augmented")
    }
    return {
        "relaxed_accuracy": accuracy(predictions),
        **{kind: percent(scores) for kind, scores in kinds.items() if scores},
    }


TASK = Task(
    "chartqa",
    "ChartQA",
    DATA,
    read,
    score,
    summarise,
    headline="relaxed_accuracy",
    max_tokens=16,
    rule=choices.LMMS_EVAL,
)
