"""MMMU: college questions in thirty subjects, some with several pictures (Yue et al., CVPR 2024).

    Accounting/validation-00000-of-00001.parquet and so on, or data/validation-*.parquet: id, question,
    options (a Python list as text), answer, question_type, image_1 ... image_7

Pictures come before the text, in the order of their numbers, and the text keeps its `<image 1>`. Answers are read
as by lmms-eval, which has the rule from the benchmark's eval_utils.py; where that draws a choice at random, the
question's id decides here. The test split has no answers; the model's are written to a file for the server.
"""

import functools
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.evals import choices, files
from fusion_jax.evals.task import Prediction, Question, Rule, Scored, Task, accuracy, percent_by

SUBJECTS = (
    *("Accounting", "Agriculture", "Architecture_and_Engineering", "Art", "Art_Theory", "Basic_Medical_Science"),
    *("Biology", "Chemistry", "Clinical_Medicine", "Computer_Science", "Design"),
    *("Diagnostics_and_Laboratory_Medicine", "Economics", "Electronics", "Energy_and_Power", "Finance", "Geography"),
    *("History", "Literature", "Manage", "Marketing", "Materials", "Math", "Mechanical_Engineering", "Music"),
    *("Pharmacy", "Physics", "Psychology", "Public_Health", "Sociology"),
)
_IMAGES = tuple(f"image_{n}" for n in range(1, 8))
_OPEN = choices.SHORT
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (  # the official patterns, rewritten to read each run of digits only once
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,000
    r"-?(?<!\d)\d++(?:\.\d++)?[eE][+-]?\d+",  # 1e5
    r"-?(?:(?<!\d)\d++\.\d++|\.\d++|(?<!\d)\d++\b)(?![eE][+-]?\d+)(?![,\d])",
)


def _data(split: str) -> str:
    return f"MMMU's {split} split in Parquet files, in one folder a subject or in data/"


def read(split: str, data_dir: Path) -> list[Question]:
    folder = files.open_folder(data_dir, ("mmmu",), f"mmmu ({split})", _data(split))
    columns = ("id", "question", "options", "answer", "question_type")
    paths = folder.joined_parquet(SUBJECTS, split) or folder.parquet(("default", (split,)))
    paths = paths or folder.need(f"{split}-*.parquet")
    return [_question(row) for row in files.read_parquet(paths, columns, _IMAGES)]


def _question(row: files.ParquetRow) -> Question:
    v = row.values
    options = choices.listed(v["options"], f"{row.where}: options")
    if multiple := v["question_type"] == "multiple-choice":
        prompt = f"{v['question']}\n{choices.lettered(options)}\n\n{choices.BY_LETTER}"
    else:
        prompt = f"{v['question']}\n\n{_OPEN}"
    numbers = sorted(set(re.findall(r"<image (\d)>", prompt)))
    pictures = tuple(row.picture(f"image_{n}") for n in numbers)
    answer = v["answer"]
    if isinstance(answer, str) and answer.startswith("[") and not multiple:
        answer = choices.listed(answer, f"{row.where}: answer")  # several right ones
    subject = re.sub(r"^[^_]+_(.+)_\d+$", r"\1", v["id"])
    about = {"options": options, "multiple": multiple, "subject": subject}
    return Question(
        v["id"], prompt, None if choices.is_blank(answer) or answer == "?" else answer, pictures, v["question"], about
    )


def parse_choice(answer: str, options: Sequence[str], seed: str) -> str:
    """Finds the letter in brackets, or else before a space, before a period, or by its option's text.

    An option's text counts only in an answer of over five words. Of several letters, the one that occurs last is taken;
    those without brackets are located as words of their own.
    """
    answer = answer.strip()
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer = f" {answer} "
    letters = choices.LETTERS[: len(options)]
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if matching := [x for x in letters if form.format(x) in answer]:
            return max(matching, key=lambda x: answer.rfind(place.format(x)))
    if len(answer.split()) > 5:
        lowered = answer.lower()
        if matching := [x for x, text in zip(letters, options) if text.lower() in lowered]:
            return max(matching, key=lambda x: lowered.rfind(options[letters.index(x)].lower()))
    return random.Random(seed).choice(letters)


def _normal(text: str) -> list[str | float]:
    """A number rounded to two places, or the text in lower case, a single letter with a space before or after it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def parse_open(answer: str) -> list[str | float]:
    """Candidates for the answer in each line: the shortest text after a word such as `is` or `answer`, in the last line
    also after `=`, and all numbers in it."""
    answer = answer.strip().strip(".").lower()
    # The official pattern ends sentences before a capital letter, which has no effect after lower().
    lines = re.split(r"\.\s(?=[A-Z])|\n", answer)
    candidates = []
    for number, line in enumerate(lines):
        keys = (*_KEYS, "=") if number == len(lines) - 1 else _KEYS
        shortest = ""
        for tail in (line.split(key)[-1].strip() for key in keys if key in line):
            shortest = tail if not shortest or len(tail) < len(shortest) else shortest
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            candidates.append(shortest)
    candidates = candidates or [answer]
    numbers = [match for text in candidates for pattern in _NUMBERS for match in re.findall(pattern, text)]
    return list(dict.fromkeys(value for text in (*candidates, *numbers) for value in _normal(text)))


def matches(parsed: Sequence[str | float], reference: str | Sequence[str]) -> bool:
    """Whether a candidate is a number that equals a right one, or a text that contains a right one."""
    right = [value for text in ([reference] if isinstance(reference, str) else reference) for value in _normal(text)]
    return any(
        any(isinstance(r, str) and r in value for r in right) if isinstance(value, str) else value in right
        for value in parsed
    )


def score(question: Question, answer: str) -> Scored:
    if question.about["multiple"]:
        parsed = parse_choice(answer, question.about["options"], question.id)
        return parsed, None if question.reference is None else float(parsed == question.reference)
    parsed = parse_open(answer)
    return parsed, None if question.reference is None else float(matches(parsed, question.reference))


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    return {
        "accuracy": accuracy(predictions),
        "by_subject": percent_by(predictions, "subject"),
    }


def submit(predictions: Sequence[Prediction], folder: Path) -> list[Path]:
    if all(p.score is not None for p in predictions):
        return []
    answers = {p.question.id: p.parsed if p.question.about["multiple"] else p.answer for p in predictions}
    return files.write_json(folder / "submission.json", answers)


def _task(name: str, split: str) -> Task:
    return Task(
        name,
        f"MMMU ({split})",
        _data(split),
        functools.partial(read, split),
        score,
        summarise,
        headline="accuracy" if split == "validation" else "",
        max_tokens=128,
        submit=submit,
        rule=choices.LMMS_EVAL,
        published=Rule(choices.LMMS_EVAL_OLD, max_tokens=16) if split == "validation" else None,
    )


TASKS = [_task("mmmu", "validation"), _task("mmmu_test", "test")]
