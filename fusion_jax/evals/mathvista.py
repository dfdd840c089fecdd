"""MathVista, testmini: mathematics in figures, tables and photographs (Lu et al., ICLR 2024).

    *testmini*.parquet     pid, question, query, decoded_image, choices, unit, precision, answer, question_type,
                           answer_type, metadata
    or testmini.json       {"1": the same with the image's file in `image`, ...} and images/

The answer is first extracted from the model's text, in the official evaluation by a language model. Without a judge,
rules extract it: a text that is an answer already, `The answer is "..."`, and then the last number in the text.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.evals import choices, files
from fusion_jax.evals.docvqa import edit_distance
from fusion_jax.evals.judge import Judge
from fusion_jax.evals.task import (
    Picture,
    Prediction,
    Question,
    Rule,
    Scored,
    Task,
    accuracy,
    percent,
    percent_by,
    picture,
)

DATA = "MathVista's testmini split in Parquet files, or testmini.json with images/"
_COLUMNS = ("pid", "question", "question_type", "answer_type", "answer", "choices")
_PLACES = {1: ("one decimal place", "1.2, 1.3, 1.4"), 2: ("two decimal places", "1.23, 1.34, 1.45")}
_EXTRACTION = """Copy the final answer out of a response to a question about a picture, without explaining anything.
Give a number as digits alone, a list as a Python list, and a chosen option as its letter. If there is none, say NONE.

Question: Which number is missing?
Response: The number missing in the sequence is 14.
Answer: 14

Question: Which two years does the peak lie between?
Response: It lies between 2007 and 2008.
Answer: [2007, 2008]

Question: Which part is blue? (A) 3/11 (B) 8/11
Response: Eight of eleven parts are blue, so (B) 8/11 is right.
Answer: B

Question: {}
Response: {}
Answer:"""


def read(data_dir: Path) -> list[Question]:
    folder = files.open_folder(data_dir, ("mathvista",), "mathvista", DATA)
    if parquet := folder.parquet(("default", ("testmini",))):
        rows = files.read_parquet(parquet, _COLUMNS, ("decoded_image",))
        return [_question(row.values, row.picture("decoded_image")) for row in rows]
    path = folder.one("testmini.json")
    questions = []
    for key, line in files.read_json(path).items():
        row = files.need_keys(line, (*_COLUMNS, "image"), f"{path}, {key}")
        images = next((p for p in (path.parent, folder.path) if (p / row["image"]).is_file()), folder.path)
        questions.append(_question(row, picture(images / row["image"])))
    return questions


def _choices(row: dict[str, Any]) -> list[str]:
    return [] if choices.is_blank(row["choices"]) else choices.listed(row["choices"], f"question {row['pid']}: choices")


def _precision(row: dict[str, Any]) -> int:
    return 0 if choices.is_missing(row.get("precision")) else int(row["precision"])


def query(row: dict[str, Any]) -> str:
    """The official zero-shot query: a hint about the kind of answer, the question with its unit, the choices."""
    places = _precision(row)
    if row["question_type"] == "multi_choice":
        hint = "Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
    elif row["answer_type"] == "integer":
        hint = (
            "Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at "
            "the end."
        )
    elif row["answer_type"] == "float":
        words, examples = _PLACES[places]
        hint = (
            f"Please answer the question requiring a floating-point number with {words} and provide the final value, "
            f"e.g., {examples}, at the end."
        )
    else:
        hint = (
            "Please answer the question requiring a Python list as an answer and provide the final list, e.g., "
            "[1, 2, 3], [1.2, 1.3, 1.4], at the end."
        )
    unit = "" if choices.is_missing(row.get("unit")) else f" (Unit: {row['unit']})"
    options = [f"({letter}) {text}" for letter, text in zip(choices.LETTERS, _choices(row))]
    return "\n".join(
        [f"Hint: {hint}", f"Question: {row['question']}{unit}", *(["Choices:", *options] if options else [])]
    )


def _question(row: dict[str, Any], image: Picture) -> Question:
    metadata = row.get("metadata") or {}
    about = {
        "options": _choices(row),
        "question_type": row["question_type"],
        "answer_type": row["answer_type"],
        "precision": _precision(row),
        "unit": "" if choices.is_missing(row.get("unit")) else row["unit"],
        "task": metadata.get("task") or "",
        "skills": list(metadata.get("skills") or ()),
    }
    answer = None if choices.is_blank(row["answer"]) else row["answer"]
    prompt = query(row) if choices.is_blank(row.get("query")) else row["query"]
    return Question(str(row["pid"]), prompt, answer, (image,), row["question"], about)


def read_in_other_words(data_dir: Path) -> list[Question]:
    """The questions as lmms-eval's mathvista_testmini_format asks them."""
    return [dataclasses.replace(q, prompt=_short_query(q)) for q in read(data_dir)]


def _short_query(question: Question) -> str:
    about = question.about
    unit = f" (Unit: {about['unit']})" if about["unit"] else ""
    places, _ = _PLACES.get(about["precision"], ("", ""))
    last = {
        "integer": "Answer the question using a single integer number.",
        "float": f"Answer the question using a single floating-point number with {places}.",
        "list": "Answer the question using a Python list.",
    }
    last = choices.BY_LETTER if about["question_type"] == "multi_choice" else last[about["answer_type"]]
    options = [choices.lettered(about["options"])] if about["options"] else []
    return "\n".join([f"{question.text}{unit}", *options, last])


def ready(answer: str, about: dict[str, Any]) -> str | None:
    """An answer that needs no extraction: one of the choices, or a number of the required kind."""
    if not answer or (about["question_type"] == "multi_choice" and answer in about["options"]):
        return answer
    try:
        if about["answer_type"] == "integer":
            return str(int(answer))
        if about["answer_type"] == "float":
            return str(float(answer))
    except ValueError:
        pass
    return None


def extract(answer: str, about: dict[str, Any]) -> str:
    """The answer by rules alone."""
    if (done := ready(answer, about)) is not None:
        return done
    for line in answer.split("\n"):
        _, mark, rest = line.partition('The answer is "')
        if mark and '".' in rest:
            return rest.rpartition('".')[0]
    if about["answer_type"] in ("integer", "float"):
        numbers = re.findall(r"-?(?:\d[\d,]*\.?\d*|\.\d+)", answer)
        return numbers[-1].replace(",", "").rstrip(".") if numbers else ""
    if about["answer_type"] == "list":
        lists = re.findall(r"\[[^\[\]]*\]", answer)
        return lists[-1] if lists else answer
    letters = choices.LETTERS[: len(about["options"])]
    alone = re.findall(rf"(?<![\w'])([{letters}])(?![\w'])", answer) if letters else []
    return alone[-1] if alone else answer


def normalise(extraction: str, about: dict[str, Any]) -> str | None:
    """The extracted answer in the form of references: an option's text (if need be, the nearest by edit distance), a
    whole number, or a rounded one; None where it is none of these."""
    options = about["options"]
    if about["question_type"] == "multi_choice":
        extraction = extraction.strip()
        if letter := re.search(r"\(([a-zA-Z])\)", extraction):
            extraction = letter[1].upper()
        if len(extraction) == 1 and extraction in choices.LETTERS[: len(options)]:
            return options[choices.LETTERS.index(extraction)]
        return min(options, key=lambda option: edit_distance(extraction, option))
    try:
        if about["answer_type"] == "integer":
            return str(int(float(extraction)))
        if about["answer_type"] == "float":
            return str(round(float(extraction), about["precision"]))
    except (ValueError, OverflowError):
        return None
    return extraction


def scored(question: Question, extraction: str) -> Scored:
    parsed = normalise(extraction, question.about)
    return parsed, float(parsed is not None and parsed.strip() == str(question.reference).strip())


def score(question: Question, answer: str) -> Scored:
    return scored(question, extract(answer.strip(), question.about))


def judged(question: Question, answer: str, judge: Judge) -> Scored:
    done = ready(answer.strip(), question.about)
    return scored(question, judge.ask(_EXTRACTION.format(question.prompt, answer), 64) if done is None else done)


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    skills = sorted({skill for p in predictions for skill in p.question.about["skills"]})
    return {
        "accuracy": accuracy(predictions),
        "by_task": percent_by(predictions, "task"),
        "by_skill": {s: percent([p.score for p in predictions if s in p.question.about["skills"]]) for s in skills},
    }


TASK = Task(
    "mathvista",
    "MathVista (testmini)",
    DATA,
    read,
    score,
    summarise,
    headline="accuracy",
    max_tokens=1024,
    judged=judged,
    rule="MathVista's own code, 2023; without a judge rules of our own for the extraction",
    published=Rule(f"{choices.LMMS_EVAL_OLD}, mathvista_testmini_format", read=read_in_other_words),
)
