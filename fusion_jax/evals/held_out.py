"""Accuracy on held-out questions with short answers, beside two baselines that do not look at the image.

Data: `held_out.json` in LLaVA format, one round a record, with an extra key `kinds` (one kind a record).
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.data.sources import load_records
from fusion_jax.errors import UserError
from fusion_jax.evals import files
from fusion_jax.evals.task import Prediction, Question, Scored, Task, picture
from fusion_jax.generate import first_question

FILE = "held_out.json"
DATA = f"{FILE} in LLaVA format, with a key 'kinds' in every record"


def normalise(text: str) -> str:
    """Lower case, no punctuation at the ends, single spaces."""
    return " ".join(text.lower().strip().strip(".,;:!?\"'()").split())


def majority_accuracy(expected: Sequence[str], kinds: Sequence[str]) -> float:
    """Accuracy of always giving a kind's most common held-out answer: what knowing the questions alone can reach."""
    by_kind = defaultdict(Counter)
    for answer, kind in zip(expected, kinds):
        by_kind[kind][normalise(answer)] += 1
    return sum(counter.most_common(1)[0][1] for counter in by_kind.values()) / len(expected)


def others(count: int, seed: int = 0) -> list[int]:
    """For each of `count` things another one, none of them twice."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    # A rotation of a random order moves every one to another place.
    other = {order[i]: order[(i + 1) % count] for i in range(count)}
    return [other[i] for i in range(count)]


def read(data_dir: Path) -> list[Question]:
    """Every question with its own image, then all of them again, each with another record's.

    Raises:
      UserError: the file is missing or has no `kinds`.
    """
    folder = files.open_folder(data_dir, ("held_out",), "held_out", DATA)
    path = folder.path / FILE
    if not path.is_file():
        raise folder.wrong(f"there is no {FILE}")
    source, raw = load_records(path), files.read_json(path)
    if any(not record.get("kinds") for record in raw):
        raise UserError(f"{path}: every record needs the key 'kinds'.")
    seen, blind = [], []
    records = [source[i] for i in range(len(source))]
    for number, (record, other) in enumerate(zip(records, others(len(records)))):
        words = first_question(record).turns[0]["value"].replace("<image>", "").strip()
        kind, answer = raw[number]["kinds"][0], record.turns[1]["value"]
        for image, shuffled, part in ((record, False, seen), (records[other], True, blind)):
            key = f"{number}/shuffled" if shuffled else f"{number}"
            shown = " ".join(words.split())
            part.append(
                Question(key, words, answer, (picture(image.image_path),), shown, {"kind": kind}, f"{number}", shuffled)
            )
    return seen + blind


def score(question: Question, answer: str) -> Scored:
    said = normalise(answer)
    return said, float(said == normalise(question.reference))


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Shares of right answers, not percent: with the own image, with another's, per kind, and of the majority's."""
    seen = [p for p in predictions if not p.question.control]
    blind = [p.score for p in predictions if p.question.control]
    kinds = [p.question.about["kind"] for p in seen]
    right = defaultdict(list)
    for kind, p in zip(kinds, seen):
        right[kind].append(p.score)
    return {
        "questions": len(seen),
        "held_out_accuracy": sum(p.score for p in seen) / len(seen),
        "shuffled_image_accuracy": sum(blind) / len(blind),
        "majority_accuracy": majority_accuracy([p.question.reference for p in seen], kinds),
        "accuracy_per_kind": {kind: sum(hits) / len(hits) for kind, hits in sorted(right.items())},
    }


TASK = Task("held_out", "held-out questions", DATA, read, score, summarise, headline="held_out_accuracy")
