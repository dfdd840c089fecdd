"""MMVP: one question for each of 150 pairs of pictures that CLIP confuses (Tong et al., CVPR 2024).

    Questions.csv        Index, Question, Options ("(a) Open (b) Closed"), Correct Answer ("(a)")
    MMVP Images/1.jpg    the images, by index; 1 and 2 are a pair, and so on

By the benchmark's own measure a pair is right when both its answers are. Published figures count single questions.
The prompt is that of Cambrian-1's evaluation.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.evals import choices, files
from fusion_jax.evals.task import Prediction, Question, Rule, Scored, Task, accuracy, percent, picture

DATA = "Questions.csv with the images in 'MMVP Images/'"
_COLUMNS = ("Question", "Options", "Correct Answer")
_OPTION = re.compile(r"\(([a-z])\)")


def read(data_dir: Path) -> list[Question]:
    folder = files.open_folder(data_dir, ("mmvp",), "mmvp", DATA)
    path = folder.one("Questions.csv")
    images = folder.images("MMVP Images", "MMVP_Images", "images")
    questions = []
    for row in files.read_table(path, _COLUMNS):
        index = row.get("Index") or row.get("lndex") or ""  # the published file spells it with a small L
        if not index.isdigit():
            raise folder.wrong(f"{path.name} has a row without a number in the column Index")
        index = int(index)
        _, *parts = _OPTION.split(row["Options"])
        options = {letter.upper(): text.strip() for letter, text in zip(parts[::2], parts[1::2])}
        if len(options) < 2:
            raise folder.wrong(f"{path.name}, Index {index} has {len(options)} options such as '(a) Open' in Options")
        prompt = f"{row['Question']} Options:\n{choices.lettered(options)}\n{choices.BY_LETTER}"
        answer = row["Correct Answer"].strip().strip("()").upper()
        image = picture(images / f"{index}.jpg")
        group = str((index + 1) // 2)
        questions.append(Question(str(index), prompt, answer, (image,), row["Question"], {"options": options}, group))
    return questions


def score(question: Question, answer: str) -> Scored:
    parsed = choices.scripted_letter(answer.strip())
    return parsed, float(parsed == question.reference)


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    pairs = defaultdict(list)
    for p in predictions:
        pairs[p.question.group].append(p.score)
    return {
        "pair_accuracy": percent([min(scores) for scores in pairs.values()]),
        "accuracy": accuracy(predictions),
    }


TASK = Task(
    "mmvp",
    "MMVP",
    DATA,
    read,
    score,
    summarise,
    headline="pair_accuracy",
    max_tokens=1024,
    rule=choices.SCRIPTS,
    published=Rule(choices.SCRIPTS, headline="accuracy"),
)
