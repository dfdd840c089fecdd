"""MMVP: 150 pairs of pictures that CLIP takes for the same, one question for both (Tong et al., CVPR 2024).

    Questions.csv        Index, Question, Options ("(a) Open (b) Closed"), Correct Answer ("(a)")
    MMVP Images/1.jpg    the images, by index; 1 and 2 are a pair, and so on

A pair is right when both its answers are. Prompt and reading of answers as in Cambrian-1's evaluation.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.evals import choices, files
from fusion_jax.evals.task import Prediction, Question, Scored, Task, percent, picture

DATA = "Questions.csv with the images in 'MMVP Images/'"
_COLUMNS = ("Question", "Options", "Correct Answer")
_OPTION = re.compile(r"\(([a-z])\)\s*([^(]*)")


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
        options = [text.strip() for _, text in _OPTION.findall(row["Options"])]
        prompt = f"{row['Question']} Options:\n{choices.lettered(options)}\n{choices.BY_LETTER}"
        answer = row["Correct Answer"].strip().strip("()").upper()
        image = picture(images / f"{index}.jpg")
        group = str((index + 1) // 2)
        questions.append(Question(str(index), prompt, answer, (image,), row["Question"], {"options": options}, group))
    return questions


def score(question: Question, answer: str) -> Scored:
    """The letter, or the option's whole text, behind the last `answer is` or `answer:`."""
    said = answer.lower().strip()
    for phrase in ("answer is", "answer is:", "answer:"):
        said = said.split(phrase)[-1]
    said = said.strip().rstrip(".:,").lstrip("(").rstrip(")")
    right = question.about["options"][choices.LETTERS.index(question.reference)].lower()
    return said, float(said in (question.reference.lower(), right))


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    pairs = defaultdict(list)
    for p in predictions:
        pairs[p.question.group].append(p.score)
    return {
        "pair_accuracy": percent([min(scores) for scores in pairs.values()]),
        "accuracy": percent([p.score for p in predictions]),
    }


TASK = Task("mmvp", "MMVP", DATA, read, score, summarise, headline="pair_accuracy", max_tokens=16)
