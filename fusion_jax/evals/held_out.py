"""Accuracy on held-out questions with short answers, beside two baselines that do not look at the image.

Data: `held_out.json` in LLaVA format, one round a record, with an extra key `kinds` (one kind a record).
"""

import json
import random
from collections import Counter, defaultdict
from pathlib import Path

from fusion_jax.data.sources import Record, load_records
from fusion_jax.errors import UserError
from fusion_jax.generate import Answerer, first_question

FILE = "held_out.json"


def normalise(text: str) -> str:
    """Lower case, no punctuation at the ends, single spaces."""
    return " ".join(text.lower().strip().strip(".,;:!?\"'()").split())


def accuracy(answers: list[str], expected: list[str]) -> float:
    """Share of answers that equal the expected one after `normalise`."""
    return sum(normalise(a) == normalise(e) for a, e in zip(answers, expected)) / len(expected)


def majority_accuracy(expected: list[str], kinds: list[str]) -> float:
    """Accuracy of always giving a kind's most common held-out answer: what knowing the questions alone can reach."""
    by_kind = defaultdict(Counter)
    for answer, kind in zip(expected, kinds):
        by_kind[kind][normalise(answer)] += 1
    return sum(counter.most_common(1)[0][1] for counter in by_kind.values()) / len(expected)


def permuted(records: list[Record], seed: int = 0) -> list[Record]:
    """The same questions, each asked about another record's image."""
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    # A rotation of a random order moves every image to another question.
    other = {order[i]: order[(i + 1) % len(order)] for i in range(len(order))}
    return [Record(r.id, records[other[i]].image_path, r.turns, r.where) for i, r in enumerate(records)]


def run(answerer: Answerer, data_dir: Path) -> dict:
    """Answers every question with its own and with a permuted image.

    Returns:
      `held_out_accuracy`, `shuffled_image_accuracy`, `majority_accuracy`, `accuracy_per_kind`, `questions` and
      `examples`: per question its text, kind, expected answer, the model's answer and the image file.

    Raises:
      UserError: the file is missing or has no `kinds`.
    """
    path = data_dir / FILE
    source = load_records(path)
    raw = json.loads(path.read_text())
    if not raw or any("kinds" not in record for record in raw):
        raise UserError(f"{path}: every record needs the key 'kinds'.")
    records = [source[i] for i in range(len(source))]
    kinds = [record["kinds"][0] for record in raw]
    expected = [record.turns[1]["value"] for record in records]
    prompts = [first_question(record) for record in records]
    answers = answerer.answer(prompts)
    blind = answerer.answer(permuted(prompts))
    right = defaultdict(list)
    for kind, answer, wanted in zip(kinds, answers, expected):
        right[kind].append(normalise(answer) == normalise(wanted))
    return {
        "questions": len(records),
        "held_out_accuracy": accuracy(answers, expected),
        "shuffled_image_accuracy": accuracy(blind, expected),
        "majority_accuracy": majority_accuracy(expected, kinds),
        "accuracy_per_kind": {kind: sum(hits) / len(hits) for kind, hits in sorted(right.items())},
        "examples": [
            {
                "question": " ".join(prompt.turns[0]["value"].replace("<image>", "").split()),
                "kind": kind,
                "expected": wanted,
                "answer": answer,
                "image": str(record.image_path),
            }
            for prompt, record, kind, wanted, answer in zip(prompts, records, kinds, expected, answers)
        ],
    }
