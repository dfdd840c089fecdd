"""MMStar: 1500 questions that need the picture, in six abilities (Chen et al., NeurIPS 2024).

mmstar.parquet or MMStar.tsv: index, question (with its options), answer (a letter), category, l2_category, image; also
A, B, C and D where the question does not include its options
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.evals import choices, files
from fusion_jax.evals.task import Picture, Prediction, Question, Rule, Scored, Task, accuracy, percent_by

DATA = "mmstar.parquet or MMStar.tsv"
_COLUMNS = ("index", "question", "answer", "category", "l2_category")


def read(data_dir: Path) -> list[Question]:
    folder = files.open_folder(data_dir, ("mmstar",), "mmstar", DATA)
    if parquet := folder.parquet(*((config, ("val",)) for config in ("val", "default"))):
        rows = [(row.values, row.picture("image")) for row in files.read_parquet(parquet, _COLUMNS)]
    else:
        rows = [(row.values, row.picture) for row in files.read_images(folder.one("*mmstar*.tsv"), _COLUMNS)]
    values = [v for v, _ in rows]
    every = choices.read_options(values, choices.LETTERS, lambda v: f"index {v['index']}", needed=False)
    return [_question(v, options, image) for (v, image), options in zip(rows, every)]


def _question(row: dict[str, Any], options: dict[str, str], image: Picture) -> Question:
    words = row["question"].strip()
    if options and "Options:" not in words:
        words += "\nOptions: " + ", ".join(f"{letter}: {text}" for letter, text in options.items())
    # The published prompt has no period at its end.
    prompt = f"{words}\n{choices.BY_LETTER.rstrip('.')}"
    about = {"category": row["category"], "l2_category": row["l2_category"]} | ({"options": options} if options else {})
    return Question(str(row["index"]), prompt, row["answer"].strip(), (image,), words, about)


def score(question: Question, answer: str) -> Scored:
    letter = choices.ranked_letter(answer, "ABCD")
    return letter, float(letter == question.reference.upper())


def first_letter_score(question: Question, answer: str) -> Scored:
    """Applies MMStar's own rule: the letter is first, in brackets, or after `option ` or `the answer is `."""
    text = answer.lower().strip().replace("\n", " ")
    right = question.reference.lower()
    letter = text[:1]
    for start in ("(", "option ", "the answer is "):
        if text.startswith(start) and letter != right:
            letter = text[len(start) : len(start) + 1]
    return letter, float(bool(letter) and letter == right)


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """`average` over the finer categories, as in lmms-eval, and `accuracy` over the questions, as in MMStar."""
    by_l2_category = percent_by(predictions, "l2_category")
    return {
        "average": sum(by_l2_category.values()) / len(by_l2_category),
        "accuracy": accuracy(predictions),
        "by_category": percent_by(predictions, "category"),
        "by_l2_category": by_l2_category,
    }


TASK = Task(
    "mmstar",
    "MMStar",
    DATA,
    read,
    score,
    summarise,
    headline="average",
    max_tokens=1024,
    rule=choices.LMMS_EVAL,
    published=Rule(choices.LMMS_EVAL_OLD, first_letter_score),
)
