"""MME-RealWorld: large pictures with five options each (Zhang et al., ICLR 2025).

    train-*.parquet        question, multi-choice options (["(A) ...", ...]), answer (a letter), category
                           ("Perception/Remote Sensing"), l2-category, index, bytes (the image as base64)
    MME-RealWorld.tsv      index, question, A, B, C, D, E, answer, category, l2-category, image (base64)
    MME_RealWorld.json     [{"Question_id", "Image" (a file), "Text", "Answer choices", "Ground truth", "Task",
                           "Subtask", "Category"}, ...] beside the folders of images

The pictures are photographs, charts and satellite pictures. There are three versions: the whole in English, which
leaderboards quote, one in Chinese, and `lite`, a tenth of the English one. Prompts are made and answers are read as by
lmms-eval 0.7.3 (mme_realworld), which reads them by the benchmark's own rule.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_jax.evals import choices, files
from fusion_jax.evals.task import Picture, Prediction, Question, Scored, Task, accuracy, percent, percent_by, picture

_LETTERS = "ABCDE"
# For each version the names of its folder, of its TSV and of its JSON.
_VERSIONS = {
    "en": (("MME-RealWorld", "MME-RealWorld-Lmms-eval"), "mme-realworld.tsv", "mme_realworld.json"),
    "cn": (("MME-RealWorld-CN", "MME-RealWorld-CN-Lmms-eval"), "mme-realworld-cn.tsv", "mme_realworld_cn.json"),
    "lite": (
        ("MME-RealWorld-Lite", "MME-RealWorld-lite-lmms-eval"), "mme-realworld-lite.tsv", "mme-realworld-lite.json"
    ),
}  # fmt: skip
_PROMPTS = {
    "en": (
        "{} The choices are listed below:\n{}\nSelect the best answer to the above multiple-choice question based on "
        "the image. Respond with only the letter (A, B, C, D, or E) of the correct option.\nThe best answer is: "
    ),
    "cn": (
        "{} 选项如下所示:\n{}\n根据图像选择上述多项选择题的最佳答案。只需回答正确选项的字母（A, B, C, D 或 E）。\n"
        "最佳答案为： "
    ),
}
_PHRASES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)


def _data(version: str) -> str:
    _, tsv, json = _VERSIONS[version]
    return f"MME-RealWorld ({version}) as the hub's Parquet files, {tsv}, or {json} with its folders of images"


def read(version: str, data_dir: Path) -> list[Question]:
    names, tsv, json = _VERSIONS[version]
    folder = files.open_folder(data_dir, names, _name(version), _data(version))
    if parquet := folder.parquet(("default", ("train",))):
        needed = ("index", "question", "multi-choice options", "answer", "category", "l2-category")
        rows = files.read_parquet(parquet, needed, ("bytes", "image"))
        questions = [_from_parquet(version, row) for row in rows]
    elif folder.find(tsv):
        path = folder.one(tsv)
        table = files.read_images(path, ("question", "A", "B", "answer", "category", "l2-category"))
        values = [row.values for row in table]
        every = choices.read_options(values, _LETTERS, lambda v: f"{path}, index {v['index']}")
        questions = [
            _question(version, row.values, [f"({x}) {text}" for x, text in each.items()], row.picture)
            for row, each in zip(table, every)
        ]
    else:
        questions = list(_from_json(version, folder, json))
    files.check_language(folder, "cn" if version == "cn" else "en", [q.text for q in questions])
    return questions


def _from_parquet(version: str, row: files.ParquetRow) -> Question:
    name = "multi-choice options"
    options = [str(text) for text in choices.listed(row.values[name], f"{row.where}: {name}")]
    return _question(version, row.values, options, row.picture("bytes" if row.has("bytes") else "image"))


def _from_json(version: str, folder: files.Folder, name: str):
    path = folder.one(name)
    keys = ("Question_id", "Image", "Text", "Answer choices", "Ground truth", "Task", "Subtask", "Category")
    for number, line in enumerate(files.read_records(path)):
        v = files.need_keys(line, keys, f"{path}, record {number}")
        row = {"index": v["Question_id"], "question": v["Text"], "answer": v["Ground truth"]}
        row |= {"category": f"{v['Task']}/{v['Subtask']}", "l2-category": v["Category"]}
        options = choices.listed(v["Answer choices"], f"{path}, record {number}: Answer choices")
        yield _question(version, row, options, picture(path.parent / v["Image"]))


def _question(version: str, row: Mapping[str, Any], options: list[str], image: Picture) -> Question:
    """`options` with their letters in brackets."""
    prompt = _PROMPTS["cn" if version == "cn" else "en"].format(row["question"], "\n".join(options))
    whole = str(row["category"])
    kind = str(row["l2-category"]).lower()
    about = {
        "options": options,
        "task": "Perception" if "perception" in whole.lower() else "Reasoning",
        "subtask": whole.split("/")[-1],
        "category": f"{kind.split('/')[0]}/attribute" if "attribute" in kind else kind,
    }
    answer = None if choices.is_blank(row["answer"]) else str(row["answer"]).strip()
    return Question(str(row["index"]), prompt, answer, (image,), str(row["question"]), about)


def parse(answer: str) -> str:
    """The first capital A to E after the usual phrases; "" for over ten words without one.

    For a shorter answer without such a capital, it is the first of `(a)` to `(e)` that contains the whole answer: an
    empty answer is A, as in the benchmark's own code.
    """
    text = answer.strip()
    for phrase in _PHRASES:
        text = text.replace(phrase, "")
    if match := re.search(r"[ABCDE]", text):
        return match[0]
    if len(text.split()) > 10:
        return ""
    return next((letter for letter in _LETTERS if text.lower() in f"({letter})".lower()), "")


def score(question: Question, answer: str) -> Scored:
    parsed = parse(answer)
    return parsed, float(parsed == question.reference)


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Accuracy over all questions, by task, and by subtask, such as `Perception/Monitoring`."""
    tasks = percent_by(predictions, "task")
    by: dict[str, list[float]] = {}
    for p in predictions:
        by.setdefault(f"{p.question.about['task']}/{p.question.about['subtask']}", []).append(p.score)
    return {
        "accuracy": accuracy(predictions),
        **{name.lower(): value for name, value in tasks.items()},
        "by_subtask": {name: percent(scores) for name, scores in sorted(by.items())},
    }


def _name(version: str) -> str:
    return "mme_realworld" if version == "en" else f"mme_realworld_{version}"


def _task(version: str) -> Task:
    title = {"en": "MME-RealWorld", "cn": "MME-RealWorld-CN", "lite": "MME-RealWorld (lite)"}[version]
    reader = functools.partial(read, version)
    figure, rule = "accuracy", choices.LMMS_EVAL
    return Task(_name(version), title, _data(version), reader, score, summarise, figure, max_tokens=16, rule=rule)


TASKS = [_task(version) for version in _VERSIONS]
