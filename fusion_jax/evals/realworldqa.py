"""RealWorldQA: questions about photographs, many of them from cars (xAI, 2024).

*.parquet with the columns question (options and instruction in it), answer, image
or RealWorldQA.tsv: index, question, A, B, C, D, answer, image (base64)
"""

import re
import string
from pathlib import Path
from typing import Any

from fusion_jax.evals import choices, files
from fusion_jax.evals.task import Picture, Question, Rule, Scored, Task, summarise_accuracy

DATA = "the test split in Parquet files, or RealWorldQA.tsv"
_DIGITS = dict(
    zip(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), map(str, range(11)))
)
_OPTION = re.compile(r"\b[A-Z]\.\s+([^\n]*)")


def read(data_dir: Path) -> list[Question]:
    folder = files.open_folder(data_dir, ("realworldqa",), "realworldqa", DATA)
    if parquet := folder.parquet(("default", ("test",))):
        rows = files.read_parquet(parquet, ("question", "answer"))
        return [
            _question(str(n), r.values["question"], r.values["answer"], r.picture("image")) for n, r in enumerate(rows)
        ]
    questions = []
    path = folder.one("*realworldqa*.tsv")
    rows = files.read_images(path, ("question", "answer"))
    values = [row.values for row in rows]
    every = choices.read_options(values, choices.LETTERS, lambda v: f"{path}, index {v['index']}", needed=False)
    for row, options in zip(rows, every):
        lettered = choices.lettered(options)
        text = row.values["question"]
        words = f"{text}\n{lettered}\n{choices.BY_LETTER}" if options else text
        about = {"options": options} if options else {}
        questions.append(_question(row.values["index"], words, row.values["answer"], row.picture, about))
    return questions


def _question(key: str, text: str, answer: str, image: Picture, about: dict[str, Any] | None = None) -> Question:
    return Question(key, text.strip(), answer.strip(), (image,), about=about or {})


def parse(answer: str, question: str) -> str:
    """Applies lmms-eval's earlier, flexible rule: numbers up to ten become digits, punctuation is removed, and an
    option whose text is in the answer becomes its letter."""
    words = re.sub(r"[^\w\s]", "", _DIGITS.get(answer.lower(), answer)).strip()
    options = [text.strip() for text in _OPTION.findall(question)]
    match = re.search("|".join(map(re.escape, options)), words) if options else None
    # Of two options with the same text, the later one counts.
    letters = dict(zip(options, choices.LETTERS))
    return letters.get(match[0], words) if match else words


def score(question: Question, answer: str) -> Scored:
    """Scores by lmms-eval's general rule for letters where the reference is one of the first four; otherwise the whole
    answer must equal it, but for case and periods at its end."""
    if question.reference.upper() in tuple("ABCD"):
        parsed = choices.ranked_letter(answer, "ABCD")
        return parsed, float(parsed == question.reference.upper())
    parsed = answer.lower().strip().rstrip(".")
    return parsed, float(parsed == question.reference.lower())


def flexible_score(question: Question, answer: str) -> Scored:
    def plain(text: str) -> str:
        return text.lower().translate(str.maketrans("", "", string.punctuation))

    parsed = parse(answer, question.prompt)
    return parsed, float(plain(parsed) == plain(question.reference))


TASK = Task(
    "realworldqa",
    "RealWorldQA",
    DATA,
    read,
    score,
    summarise_accuracy,
    headline="accuracy",
    max_tokens=16,
    rule=choices.LMMS_EVAL,
    published=Rule(choices.LMMS_EVAL_OLD, flexible_score),
)
