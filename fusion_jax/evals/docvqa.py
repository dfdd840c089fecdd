"""DocVQA and InfographicVQA: scanned pages and infographics (Mathew et al., WACV 2021 and 2022).

    val_v1.0_withQT.json, val_v1.0.json               {"data": [{"questionId", "question", "answers", "image"}]}
    infographicsVQA_val_v1.0_withQT.json              the same with "image_local_name" for the image
    documents/, infographicsvqa_images/               the images
    or Parquet with the columns questionId, question, answers, image, in validation and test files

ANLS is the robust reading competition's. The test splits have no answers; they become a file for its server.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.evals import choices, files
from fusion_jax.evals.task import Picture, Prediction, Question, Scored, Task, accuracy, picture

_THRESHOLD = 0.5
_FILES = {
    "docvqa": ("{0}_v1.0_withQT.json", "{0}_v1.0.json"),
    "infovqa": ("infographicsVQA_{0}_v1.0_withQT.json", "infographicsVQA_{0}_v*.json"),
}
_IMAGES = {
    "docvqa": ("spdocvqa_images", "documents", "images", ""),
    "infovqa": ("infographicsvqa_images", "images", ""),
}
_TITLES = {"docvqa": "DocVQA", "infovqa": "InfographicVQA"}


def _data(name: str, split: str) -> str:
    patterns = " or ".join(pattern.format(split) for pattern in _FILES[name])
    return f"{patterns} with the images in {_IMAGES[name][0]}/, or the {split} split in Parquet files"


def read(name: str, split: str, data_dir: Path) -> list[Question]:
    # The hub has both in one snapshot, named DocVQA.
    folder = files.open_folder(data_dir, (name, _TITLES[name], "docvqa"), name, _data(name, split))
    parts = {"val": ("validation", "val"), "test": ("test",)}[split]
    if parquet := folder.parquet(*((config, (s,)) for config in (_TITLES[name], "default") for s in parts)):
        rows = files.read_parquet(parquet, ("questionId", "question"))
        return [_question(row.values, row.picture("image")) for row in rows]
    path = folder.one(*(pattern.format(split) for pattern in _FILES[name]))
    images = folder.images(*_IMAGES[name])
    questions = []
    for number, row in enumerate(files.need_keys(files.read_json(path), ("data",), str(path))["data"]):
        key = "image_local_name" if name == "infovqa" else "image"
        files.need_keys(row, ("questionId", "question", key), f"{path}, data {number}")
        # DocVQA's files name documents/x.png, and its archives call that folder by other names.
        place = images / row[key]
        place = place if place.is_file() else images / Path(row[key]).name
        questions.append(_question(row, picture(place)))
    return questions


def _question(row: dict[str, Any], image: Picture) -> Question:
    answers = row.get("answers")
    reference = choices.listed(answers, f"question {row['questionId']}: answers") if answers else None
    return Question(str(row["questionId"]), f"{row['question']}\n{choices.SHORT}", reference, (image,), row["question"])


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: the number of insertions, deletions and replacements of one character.

    Myers' algorithm (Journal of the ACM, 1999) keeps a column of the usual table as two numbers of len(b) bits: where
    the next value is one higher, and where it is one lower. An answer of a megabyte takes a second.
    """
    a, b = (a, b) if len(a) >= len(b) else (b, a)
    if not b:
        return len(a)
    places: dict[str, int] = {}
    for i, y in enumerate(b):
        places[y] = places.get(y, 0) | 1 << i
    whole, last = (1 << len(b)) - 1, 1 << len(b) - 1
    higher, lower, distance = whole, 0, len(b)
    for x in a:
        same = places.get(x, 0)
        diagonal = (((same & higher) + higher) ^ higher) | same | lower
        up, down = lower | ~(diagonal | higher) & whole, higher & diagonal
        distance += bool(up & last) - bool(down & last)
        up, down = (up << 1 | 1) & whole, (down << 1) & whole
        higher, lower = down | ~(diagonal | up) & whole, up & diagonal
    return distance


def anls(answer: str, references: Sequence[str]) -> float:
    """1 minus the smallest relative edit distance to a reference, and 0 where that is below a half.

    Case and double spaces do not count. As in the official script, the distance is divided by the length of the longer
    text before double spaces are removed.
    """

    def distance(reference: str) -> float:
        a, b = (" ".join(text.strip().lower().split()) for text in (reference, answer))
        length = max(len(reference.upper()), len(answer.upper()))
        if abs(len(a) - len(b)) > (1 - _THRESHOLD) * length:  # at least so many edits are needed, so the score is 0
            return 1.0
        return edit_distance(a, b) / length if length else 0.0

    similarity = 1 - min(map(distance, references))
    return similarity if similarity >= _THRESHOLD else 0.0


def score(question: Question, answer: str) -> Scored:
    parsed = answer.strip()
    return parsed, None if question.reference is None else anls(parsed, question.reference)


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    return {"anls": accuracy(predictions)}


def submit(predictions: Sequence[Prediction], folder: Path) -> list[Path]:
    if all(p.score is not None for p in predictions):
        return []
    rows = [{"questionId": int(p.question.id), "answer": p.answer} for p in predictions]
    return files.write_json(folder / "submission.json", rows)


def _task(name: str, split: str) -> Task:
    return Task(
        name if split == "val" else f"{name}_{split}",
        f"{_TITLES[name]} ({split})",
        _data(name, split),
        functools.partial(read, name, split),
        score,
        summarise,
        headline="anls" if split == "val" else "",
        max_tokens=32,
        submit=submit,
        rule=choices.LMMS_EVAL,
    )


TASKS = [_task(name, split) for name in ("docvqa", "infovqa") for split in ("val", "test")]
