"""MMBench in English and Chinese: each question is asked with every rotation of its options.

    mmbench_dev_20230712.tsv, MMBench_DEV_EN.tsv and the like: index, question, hint, A, B, C, D, answer, category,
    l2-category, image (base64); or Parquet with the same columns

In circular evaluation (Liu et al., ECCV 2024) a question is right when all its rotations are. The files hold the
rotations: their index is the first one's plus a multiple of a million, and their image may be the index of the row that
has it. For a file without rotations they are made here. The test splits have no answers; theirs are written to a file
for the benchmark's server.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_jax.evals import choices, files
from fusion_jax.evals.task import Picture, Prediction, Question, Rule, Scored, Task, percent

_PASS = 1_000_000
_LAST_LINE = {"en": choices.BY_LETTER, "cn": "请直接回答选项字母。"}
_COLUMNS = ("index", "question", "A", "B")


def _patterns(language: str, split: str, ending: str) -> tuple[str, ...]:
    named = f"*mmbench*{split}*{language}*.{ending}"
    # The first release names no language.
    return (named, f"*mmbench_{split}_2*.{ending}") if language == "en" else (named,)


def _data(language: str, split: str) -> str:
    return f"MMBench's {split} split for {language.upper()} as TSV (such as MMBench_{split}_{language}.tsv) or Parquet"


def read(language: str, split: str, data_dir: Path) -> list[Question]:
    name = f"mmbench_{language}_{split}"
    names = (f"mmbench_{language}", "mmbench-cn" if language == "cn" else "mmbench_en", "mmbench")
    folder = files.open_folder(data_dir, names, name, _data(language, split))
    if folder.find(*_patterns(language, split, "tsv")):
        paths = [folder.one(*_patterns(language, split, "tsv"))]
        rows = [(row.values, row.picture) for row in files.read_images(paths[0], _COLUMNS[1:])]
    else:
        if folder.find(*_patterns(language, split, "parquet")):
            paths = [folder.one(*_patterns(language, split, "parquet"))]
        else:
            paths = folder.parquet((language, (split,)), ("default", (split,)))
        paths = paths or folder.need(*_patterns(language, split, "tsv"))
        rows = [(row.values, row.picture("image")) for row in files.read_parquet(paths, _COLUMNS)]
    values, where = [v for v, _ in rows], functools.partial(_where, paths[0])
    options = choices.read_options(values, choices.LETTERS, where, lambda row: _index(row) % _PASS)
    questions = [_question(language, row, each, image) for (row, image), each in zip(rows, options)]
    files.check_language(folder, language, [q.text for q in questions])
    if all(int(q.id) < _PASS for q in questions):
        questions = [turned for q in questions for turned in _rotations(language, q)]
    return questions


def _index(row: Mapping[str, Any]) -> int:
    return int(choices.as_text(row["index"]))


def _where(path: Path, row: Mapping[str, Any]) -> str:
    return f"{path}, index {row['index']}"


def _question(language: str, row: dict, options: dict[str, str], image: Picture) -> Question:
    hint = "" if choices.is_missing(row.get("hint")) else f"{row['hint']}\n"
    index = _index(row)
    category = row.get("category")
    about = {
        "options": options,
        "words": f"{hint}{row['question']}",
        "hint": hint.strip("\n"),
        "category": "" if choices.is_missing(category) else category,
    }
    answer = None if choices.is_missing(row.get("answer")) else str(row["answer"]).strip()
    return Question(
        str(index),
        _prompt(language, about["words"], options),
        answer,
        (image,),
        str(row["question"]),
        about,
        str(index % _PASS),
    )


def _prompt(language: str, words: str, options: dict[str, str]) -> str:
    return f"{words}\n{choices.lettered(options)}\n{_LAST_LINE[language]}"


def _rotations(language: str, question: Question) -> list[Question]:
    """The question with its options rotated by 0, 1, 2, ... places."""
    letters, options = list(question.about["options"]), list(question.about["options"].values())
    turned = []
    for shift in range(len(options)):
        moved = dict(zip(letters, options[shift:] + options[:shift]))
        answer = question.reference
        if answer is not None:
            answer = letters[(letters.index(answer) - shift) % len(options)]
        about = {**question.about, "options": moved}
        index = str(int(question.id) + shift * _PASS)
        prompt = _prompt(language, about["words"], moved)
        turned.append(Question(index, prompt, answer, question.pictures, question.text, about, question.group))
    return turned


def score(question: Question, answer: str) -> Scored:
    parsed = choices.find_letter(answer, question.about["options"])
    return parsed, None if question.reference is None else float(parsed == question.reference)


def read_in_other_words(language: str, split: str, data_dir: Path) -> list[Question]:
    """The same questions as lmms-eval asks them."""
    lines = {"en": choices.BY_LETTER, "cn": "请直接使用所提供的选项字母作为答案回答。"}
    questions = []
    for q in read(language, split, data_dir):
        hint = f"{q.about['hint']} " if q.about["hint"] else ""
        options = choices.lettered(q.about["options"])
        prompt = f"{hint}{q.text} There are several options:\n{options}\n\n{lines[language]}"
        questions.append(dataclasses.replace(q, prompt=prompt))
    return questions


def static_letter(answer: str, options: dict[str, str]) -> str:
    """Applies lmms-eval's rule for evaluation without a language model (mmbench_en_dev_static).

    1. If exactly one letter from A to E is a word of its own, that is it, except in an answer of over three words that
       has an A among them. The same holds for letters with punctuation after or brackets around, in a fixed order.
    2. If exactly one option's text is in the answer, that is it. 3. Otherwise `choices.ranked_letter` decides.
    """
    words, lowered = answer.split(), answer.lower()
    for before, after in _AROUND:
        named = [x for x in "ABCDE" if f"{before}{x}{after}" in words]
        if len(named) == 1 and not (before == after == "" and "A" in words and len(words) > 3):
            return named[0]
    named = [letter for letter, text in options.items() if text.lower() in lowered]
    return named[0] if len(named) == 1 else choices.ranked_letter(answer, list(options))


_AROUND = [("", after) for after in ("", ".", ",", ":", ")", ").")] + [("(", ")"), ("(", ").")]
_AROUND += [(":", after) for after in ("", ",", ".", ")", ").")]


def static_score(question: Question, answer: str) -> Scored:
    parsed = static_letter(answer.strip(), question.about["options"])
    return parsed, None if question.reference is None else float(parsed == question.reference)


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """`circular`, the published figure; `vanilla`, that of a single pass; and circular accuracy by category."""
    passes: dict[str, list[Prediction]] = defaultdict(list)
    for p in predictions:
        passes[p.question.group].append(p)
    right = {group: float(all(p.score for p in part)) for group, part in passes.items()}
    kinds = defaultdict(list)
    for group, part in passes.items():
        kinds[part[0].question.about["category"]].append(right[group])
    return {
        "circular": percent(list(right.values())),
        "vanilla": percent([p.score for p in predictions if int(p.question.id) < _PASS]),
        "by_category": {kind: percent(values) for kind, values in sorted(kinds.items())},
    }


def submit(predictions: Sequence[Prediction], folder: Path) -> list[Path]:
    """Writes what the server reads: every row's question, options and prediction."""
    letters = sorted({*"ABCD"}.union(*(p.question.about["options"] for p in predictions)))
    rows = []
    for p in predictions:
        options = p.question.about["options"]
        rows.append([int(p.question.id), p.question.text, *(options.get(x, "") for x in letters), p.answer])
    return files.write_table(folder / "submission", ("index", "question", *letters, "prediction"), rows)


def _task(language: str, split: str) -> Task:
    return Task(
        f"mmbench_{language}_{split}",
        f"MMBench-{language.upper()} ({split})",
        _data(language, split),
        functools.partial(read, language, split),
        score,
        summarise,
        headline="circular" if split == "dev" else "",
        max_tokens=1024,
        submit=submit,
        rule="VLMEvalKit, May 2026, exact matching",
        published=Rule(
            f"{choices.LMMS_EVAL}, static",
            static_score,
            read=functools.partial(read_in_other_words, language, split),
            max_tokens={"en": 1024, "cn": 256}[language],
        ),
    )


TASKS = [_task(language, split) for language in ("en", "cn") for split in ("dev", "test")]
