"""Held-out questions with short answers, compared with two baselines that do not see the image.

The data are `held_out.json` in LLaVA format; each record has one round and, for accuracy by topic, `topics`.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.data.sources import Record, load_records
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.evals import choices, files
from fusion_jax.evals.task import Picture, Prediction, Question, Scored, Task, picture
from fusion_jax.inference.prompts import first_question

FILE = "held_out.json"
DATA = f"{FILE} in LLaVA format, with a key 'topics' for accuracy by topic"


def normalise(text: str) -> str:
    """The text in lower case, without punctuation at its ends and with single spaces."""
    return " ".join(text.lower().strip().strip(".,;:!?\"'()").split())


def majority_accuracy(expected: Sequence[str], topics: Sequence[str]) -> float:
    """Accuracy of always giving a topic's most common answer, which needs only the questions."""
    by_topic = defaultdict(Counter)
    for answer, topic in zip(expected, topics):
        by_topic[topic][normalise(answer)] += 1
    return sum(counter.most_common(1)[0][1] for counter in by_topic.values()) / len(expected)


def others(count: int, seed: int = 0) -> list[int]:
    """A permutation of `range(count)` that leaves no number in its place."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    # Rotating a random order moves every number.
    other = {order[i]: order[(i + 1) % count] for i in range(count)}
    return [other[i] for i in range(count)]


def read(data_dir: Path) -> list[Question]:
    """Reads every question with its own image, then all of them again with the image of another record.

    Raises:
      UserError: the file is missing, or a record cannot be used.
    """
    folder = files.open_folder(data_dir, ("held_out",), "held_out", DATA)
    path = folder.path / FILE
    if not path.is_file():
        raise folder.wrong(f"there is no {FILE}")
    source, raw = load_records(path), files.read_json(path)
    seen, blind = [], []
    try:
        records = [source[i] for i in range(len(source))]
        prompts = [first_question(record).turns[0] for record in records]
    except BadRecord as bad:
        raise UserError(f"All held-out records are needed, and one cannot be used: {bad}.") from bad
    for record in records:
        if len(record.images) != 1:
            raise UserError(f"{record.where} has {len(record.images)} images; a held-out question has one.")
    for number, (record, other) in enumerate(zip(records, others(len(records)))):
        words = prompts[number]["value"].replace("<image>", "").strip()
        answer = record.turns[record.turns.index(prompts[number]) + 1]["value"]
        about = {"topic": _topic(raw[number].get("topics"))} | (
            {} if record.system is None else {"system": record.system}
        )
        for image, shuffled, part in ((record, False, seen), (records[other], True, blind)):
            key = f"{number}/shuffled" if shuffled else f"{number}"
            shown = " ".join(words.split())
            part.append(Question(key, words, answer, (_picture(image),), shown, about, f"{number}", shuffled))
    return seen + blind


def _topic(value: Any) -> str:
    """The first of a record's topics; "all" without one."""
    first = next(iter(value), None) if isinstance(value, list) else value
    return "all" if choices.is_missing(first) else str(first)


def _picture(record: Record) -> Picture:
    if isinstance(record.images[0], bytes):  # the record itself holds the image
        return Picture(f"{record.where}, image", lambda: record.images[0])
    return picture(record.images[0])


def score(question: Question, answer: str) -> Scored:
    parsed = normalise(answer)
    return parsed, float(parsed == normalise(question.reference))


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Shares of right answers, from 0 to 1: with the own image, with another record's, by topic, and the majority's."""
    seen = [p for p in predictions if not p.question.control]
    blind = [p.score for p in predictions if p.question.control]
    topics = [p.question.about["topic"] for p in seen]
    right = defaultdict(list)
    for topic, p in zip(topics, seen):
        right[topic].append(p.score)
    return {
        "questions": len(seen),
        "held_out_accuracy": sum(p.score for p in seen) / len(seen),
        "shuffled_image_accuracy": sum(blind) / len(blind),
        "majority_accuracy": majority_accuracy([p.question.reference for p in seen], topics),
        "accuracy_per_topic": {topic: sum(hits) / len(hits) for topic, hits in sorted(right.items())},
    }


TASK = Task("held_out", "held-out questions", DATA, read, score, summarise, headline="held_out_accuracy")
