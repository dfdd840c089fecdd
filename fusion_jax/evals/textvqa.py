"""TextVQA, validation split: questions whose answers must be read in the picture (Singh et al., CVPR 2019).

    TextVQA_0.5.1_val.json   {"data": [{"question_id", "question", "image_id", "answers": [ten of them], ...}]}
    train_images/            the images, named by image_id
    or Parquet with the columns question_id, question, answers, image

Asked without the OCR tokens that come with the data.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.evals import choices, files, vqa
from fusion_jax.evals.task import Prediction, Question, Scored, Task, percent, picture

DATA = "TextVQA_0.5.1_val.json with the images in train_images/, or the validation split in Parquet files"


def read(data_dir: Path) -> list[Question]:
    folder = files.open_folder(data_dir, ("textvqa",), "textvqa", DATA)
    if parquet := folder.parquet(("default", ("validation",)), ("default", ("val",))):
        rows = files.read_parquet(parquet, ("question_id", "question", "answers"))
        return [_question(row.values, row.picture("image")) for row in rows]
    path = folder.one("TextVQA_*val*.json")
    images = folder.images("train_images", "train_val_images/train_images", "images", "")
    data = files.need_keys(files.read_json(path), ("data",), str(path))["data"]
    questions = []
    for number, row in enumerate(data):
        files.need_keys(row, ("question_id", "question", "image_id", "answers"), f"{path}, data {number}")
        questions.append(_question(row, picture(images / f"{row['image_id']}.jpg")))
    return questions


def _question(row: dict, image) -> Question:
    prompt = f"{row['question'].capitalize()}\n{choices.SHORT}"
    return Question(str(row["question_id"]), prompt, list(row["answers"]), (image,), row["question"])


def score(question: Question, answer: str) -> Scored:
    said = vqa.normalise(answer)
    return said, vqa.accuracy(said, [vqa.normalise(person) for person in question.reference])


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    return {"accuracy": percent([p.score for p in predictions])}


TASK = Task("textvqa", "TextVQA", DATA, read, score, summarise, headline="accuracy", max_tokens=16)
