"""VizWiz-VQA: photographs by blind people with their questions (Gurari et al., CVPR 2018).

    val.json, test.json   [{"image", "question", "answers": [{"answer"}, ...ten of them]}, ...]
    val/, test/           the images
    or Parquet with the columns question_id, question, answers (ten texts), image

The official evaluation normalises the model's answer and compares it with the people's answers as they wrote them. Its
normaliser has errors of its own: it writes most contractions with a curly apostrophe. The test split has no answers;
the model's are written to a file for the server.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.evals import choices, files, vqa
from fusion_jax.evals.task import (
    Picture,
    Prediction,
    Question,
    Rule,
    Scored,
    Task,
    picture,
    summarise_accuracy,
)

_HINT = "When the provided information is insufficient, respond with 'Unanswerable'."


def _data(split: str) -> str:
    return f"{split}.json with the images in {split}/, or the {split} split in Parquet files"


def read(split: str, data_dir: Path) -> list[Question]:
    folder = files.open_folder(data_dir, ("vizwiz", "VizWiz-VQA"), f"vizwiz ({split})", _data(split))
    if parquet := folder.parquet(("default", (split,))):
        rows = files.read_parquet(parquet, ("question_id", "question"))
        return [_question(f"{Path(str(r.values['question_id'])).stem}.jpg", r.values, r.picture("image")) for r in rows]
    path = folder.one(f"{split}.json")
    images = folder.images(split, "images", "")
    questions = []
    for number, line in enumerate(files.read_records(path)):
        row = files.need_keys(line, ("image", "question"), f"{path}, record {number}")
        questions.append(_question(row["image"], row, picture(images / row["image"])))
    return questions


def _question(key: str, row: dict[str, Any], image: Picture) -> Question:
    answers = row.get("answers")
    every = choices.listed(answers, f"question {key}: answers") if answers else []
    people = [a["answer"] if isinstance(a, dict) else a for a in every] or None
    prompt = f"{row['question'].capitalize()}\n{_HINT}\n{choices.SHORT}"
    return Question(key, prompt, people, (image,), row["question"])


def score(question: Question, answer: str) -> Scored:
    parsed = vqa.normalise_for_vizwiz(answer)
    return parsed, None if question.reference is None else vqa.accuracy(parsed, question.reference)


def normalised_score(question: Question, answer: str) -> Scored:
    """Applies lmms-eval's rule: both sides are normalised, as for TextVQA."""
    parsed, people = vqa.normalise(answer), question.reference
    return parsed, None if people is None else vqa.accuracy(parsed, [vqa.normalise(person) for person in people])


def submit(predictions: Sequence[Prediction], folder: Path) -> list[Path]:
    if all(p.score is not None for p in predictions):
        return []
    rows = [{"image": p.question.id, "answer": vqa.normalise(p.answer)} for p in predictions]
    return files.write_json(folder / "submission.json", rows)


def _task(split: str) -> Task:
    name = "vizwiz" if split == "val" else f"vizwiz_{split}"
    headline = "accuracy" if split == "val" else ""
    return Task(
        name,
        f"VizWiz ({split})",
        _data(split),
        functools.partial(read, split),
        score,
        summarise_accuracy,
        headline,
        max_tokens=128,
        submit=submit,
        rule="VizWiz's vqaEval.py, 2018",
        published=Rule(choices.LMMS_EVAL, normalised_score) if split == "val" else None,
    )


TASKS = [_task(split) for split in ("val", "test")]
