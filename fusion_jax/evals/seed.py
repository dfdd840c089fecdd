"""SEED-Bench, its questions about images: multiple choice in nine dimensions (Li et al., CVPR 2024).

SEED-Bench.json       {"questions": [{"question_id", "question", "choice_a".."choice_d", "answer", "data_type",
                      "data_id", "question_type_id"}], "question_type": {name: id}}
SEED-Bench-image/     the images, named by data_id
or Parquet with the same columns and a list of images in `image`
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.evals import choices, files
from fusion_jax.evals.task import Picture, Prediction, Question, Scored, Task, accuracy, percent_by, picture

DATA = "SEED-Bench.json with the images in SEED-Bench-image/, or SEED-Bench's Parquet files"
_KEYS = ("question_id", "question", "choice_a", "choice_b", "choice_c", "choice_d", "answer", "data_type")


def read(data_dir: Path) -> list[Question]:
    folder = files.open_folder(data_dir, ("seed_bench", "seed-bench", "seed"), "seed_image", DATA)
    if parquet := folder.parquet(("default", ("test",))):
        rows = [row for row in files.read_parquet(parquet, _KEYS) if row.values["data_type"] == "image"]
        return [_question(row.values, row.picture("image", 0), {}) for row in rows]
    path = folder.one("SEED-Bench.json", "SEED*.json")
    data = files.need_keys(files.read_json(path), ("questions",), str(path))
    names = {number: name for name, number in data.get("question_type", {}).items()}
    images = folder.images("SEED-Bench-image", "images", "")
    questions = []
    for number, row in enumerate(data["questions"]):
        files.need_keys(row, (*_KEYS, "data_id"), f"{path}, questions {number}")
        if row["data_type"] == "image":
            questions.append(_question(row, picture(images / row["data_id"]), names))
    return questions


def _question(row: dict[str, Any], image: Picture, names: dict[int, str]) -> Question:
    options = [row[f"choice_{letter}"] for letter in "abcd"]
    prompt = f"{row['question']}\n{choices.lettered(options)}\n{choices.BY_LETTER}"
    kind = row.get("question_type_id", 0)
    about = {"category": names.get(kind, str(kind)), "options": options}
    return Question(str(row["question_id"]), prompt, row["answer"], (image,), row["question"], about)


def score(question: Question, answer: str) -> Scored:
    """Compares the answer's first character, as lmms-eval does."""
    parsed = answer.strip()[:1]
    return parsed, float(parsed.lower() == question.reference.strip().lower())


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    return {
        "accuracy": accuracy(predictions),
        "by_category": percent_by(predictions, "category"),
    }


TASK = Task(
    "seed_image",
    "SEED-Bench (image)",
    DATA,
    read,
    score,
    summarise,
    headline="accuracy",
    max_tokens=16,
    rule=choices.LMMS_EVAL,
)
