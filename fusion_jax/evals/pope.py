"""POPE: is an object in the picture? Three splits of yes/no questions (Li et al., EMNLP 2023).

coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json   one object a line, with
    {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there ...?", "label": "yes"}
val2014/                                                                    the images
or Parquet with the columns id or question_id, question, answer, category, image
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.evals import choices, files
from fusion_jax.evals.task import Prediction, Question, Rule, Scored, Task, accuracy, picture

DATA = "coco_pope_{random,popular,adversarial}.json with the images in val2014/, or POPE's Parquet files"
SPLITS = ("random", "popular", "adversarial")


def read(data_dir: Path) -> list[Question]:
    folder = files.open_folder(data_dir, ("pope",), "pope", DATA)
    if parquet := folder.parquet(("default", ("test",)), ("Full", SPLITS)):
        rows = files.read_parquet(parquet, ("question", "answer", "category"))
        return [
            _question(
                row.values["category"], f"{n}", row.values["question"], row.values["answer"], row.picture("image")
            )
            for n, row in enumerate(rows)
        ]
    images = None
    questions = []
    for split in SPLITS:
        path = folder.one(f"coco_pope_{split}.json")
        images = images or folder.images("val2014", "coco/val2014", "images", "../coco/val2014", "")
        for number, line in enumerate(files.read_records(path)):
            row = files.need_keys(line, ("image", "text", "label"), f"{path}, line {number + 1}")
            key = str(row.get("question_id", number + 1))
            questions.append(_question(split, key, row["text"], row["label"], picture(images / row["image"])))
    return questions


def _question(split: str, key: str, text: str, label: str, image) -> Question:
    prompt = f"{text.strip()}\n{choices.SHORT}"
    label = choices.yes_or_no(label, f"question {split}/{key}")
    return Question(f"{split}/{key}", prompt, label, (image,), text, {"split": split})


def parse(answer: str) -> str:
    """Applies POPE's rule: only the first sentence counts; it is a no if one of its words is `no`, `No` or `not`."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def score(question: Question, answer: str) -> Scored:
    parsed = parse(answer)
    return parsed, float(parsed == question.reference)


def exact_score(question: Question, answer: str) -> Scored:
    """Applies lmms-eval's rule: the whole answer must be the word, in any case."""
    parsed = answer.lower().strip()
    return parsed, float(parsed == question.reference)


def measure(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and share of yes, in percent; 0 for what would divide by nothing."""
    answers = [p.parsed for p in predictions]
    missed = sum(p.question.reference == "yes" and p.parsed == "no" for p in predictions)
    hits = sum(p.question.reference == p.parsed == "yes" for p in predictions)
    precision, recall = hits / max(1, answers.count("yes")), hits / max(1, hits + missed)
    return {
        "accuracy": accuracy(predictions),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 100 * 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": 100 * answers.count("yes") / len(answers),
    }


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The figures of each split, and their means over the splits, which are those that are published."""
    splits = {name: [p for p in predictions if p.question.about["split"] == name] for name in SPLITS}
    each = {name: measure(part) for name, part in splits.items() if part}
    means = {key: sum(m[key] for m in each.values()) / len(each) for key in next(iter(each.values()))}
    return means | {f"{name}_{key}": value for name, m in each.items() for key, value in m.items()}


TASK = Task(
    "pope",
    "POPE",
    DATA,
    read,
    score,
    summarise,
    headline="f1",
    max_tokens=128,
    rule="POPE's evaluate.py, 2023",
    published=Rule(choices.LMMS_EVAL, exact_score),
)
