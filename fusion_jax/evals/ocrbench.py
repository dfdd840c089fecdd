"""OCRBench: a thousand questions that need reading, in ten kinds (Liu et al., 2023).

    OCRBench.json        [{"dataset_name", "type", "question", "answers", "image_path"}, ...]
    OCRBench_Images/     the images
    or Parquet with the columns dataset, question_type, question, answer, image

An answer is right when it contains one of the references: without case, but for formulas (HME100k) without spaces.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.evals import files
from fusion_jax.evals.task import Picture, Prediction, Question, Scored, Task, percent, picture

DATA = "OCRBench.json with the images in OCRBench_Images/, or OCRBench's Parquet files"
_FORMULAS = "HME100k"


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
    reference = [answers] if isinstance(answers, str) else [str(answer) for answer in answers]
    words = row["question"].strip()
    return Question(str(number), words, reference, (image,), words, {"category": kind, "dataset": dataset})


def score(question: Question, answer: str) -> Scored:
    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if question.about["dataset"] == _FORMULAS else text.lower()

    said = plain(answer)
    return said, float(any(plain(reference) in said for reference in question.reference))


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """`final_score`, the number of right answers (of 1000), by kind as well, and the share in percent."""
    kinds = defaultdict(int)
    for p in predictions:
        kinds[p.question.about["category"]] += int(p.score)
    return {
        "final_score": sum(kinds.values()),
        "text_recognition": sum(n for kind, n in kinds.items() if kind.endswith("Recognition") and "Math" not in kind),
        "accuracy": percent([p.score for p in predictions]),
        "by_category": dict(sorted(kinds.items())),
    }


TASK = Task("ocrbench", "OCRBench", DATA, read, score, summarise, headline="final_score", max_tokens=128)
