"""OCRBench: a thousand questions that need reading, in ten kinds (Liu et al., 2023).

    OCRBench.json        [{"dataset_name", "type", "question", "answers", "image_path"}, ...]
    OCRBench_Images/     the images
    or Parquet with the columns dataset, question_type, question, answer, image

An answer is right when it contains one of the references: regardless of case or, for formulas (HME100k), of spaces.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.evals import choices, files
from fusion_jax.evals.task import Picture, Prediction, Question, Rule, Scored, Task, accuracy, picture

DATA = "OCRBench.json with the images in OCRBench_Images/, or OCRBench's Parquet files"
_FORMULAS = "HME100k"
# Full-width forms of ASCII, and the ideographic space.
_FULL_WIDTH = {0x3000: " "} | {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}


def read(data_dir: Path) -> list[Question]:
    folder = files.open_folder(data_dir, ("ocrbench",), "ocrbench", DATA)
    if parquet := folder.parquet(("default", ("test",))):
        rows = files.read_parquet(parquet, ("dataset", "question_type", "question", "answer"))
        return [
            _question(
                n, r.values["dataset"], r.values["question_type"], r.values["answer"], r.values, r.picture("image")
            )
            for n, r in enumerate(rows)
        ]
    path = folder.one("OCRBench.json")
    images = folder.images("OCRBench_Images", "images", "")
    questions = []
    for n, line in enumerate(files.read_records(path)):
        row = files.need_keys(
            line, ("dataset_name", "type", "question", "answers", "image_path"), f"{path}, record {n}"
        )
        image = picture(images / row["image_path"])
        questions.append(_question(n, row["dataset_name"], row["type"], row["answers"], row, image))
    return questions


def _question(number: int, dataset: str, kind: str, answers: Any, row: dict[str, Any], image: Picture) -> Question:
    answers = [answers] if isinstance(answers, str) else answers
    reference = [str(answer) for answer in answers if not choices.is_blank(answer)]  # any answer contains an empty one
    words = row["question"].strip()
    return Question(str(number), words, reference, (image,), words, {"category": kind, "dataset": dataset})


def score(question: Question, answer: str) -> Scored:
    formula = question.about["dataset"] == _FORMULAS
    answer, *references = (
        text if formula else text.translate(_FULL_WIDTH).lower() for text in (answer.strip(), *question.reference)
    )
    return _contains(answer, references, formula)


def lower_case_score(question: Question, answer: str) -> Scored:
    """Applies the rule's earlier version, which did not fold full-width characters and lowered the case of formulas."""
    formula = question.about["dataset"] == _FORMULAS
    references = question.reference if formula else [text.lower() for text in question.reference]
    return _contains(answer.lower(), references, formula)


def _contains(answer: str, references: Sequence[str], formula: bool) -> Scored:
    answer, *references = (text.strip().replace("\n", " ") for text in (answer, *references))
    if formula:
        answer, *references = (text.replace(" ", "") for text in (answer, *references))
    return answer, float(any(reference in answer for reference in references))


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """`final_score`, the number of right answers (of 1000), also by kind, and the share in percent."""
    kinds = defaultdict(int)
    for p in predictions:
        kinds[p.question.about["category"]] += int(p.score)
    return {
        "final_score": sum(kinds.values()),
        "text_recognition": sum(n for kind, n in kinds.items() if kind.endswith("Recognition") and "Math" not in kind),
        "accuracy": accuracy(predictions),
        "by_category": dict(sorted(kinds.items())),
    }


TASK = Task(
    "ocrbench",
    "OCRBench",
    DATA,
    read,
    score,
    summarise,
    headline="final_score",
    max_tokens=128,
    rule=choices.LMMS_EVAL,
    published=Rule(choices.LMMS_EVAL_OLD, lower_case_score, headline="accuracy"),
)
