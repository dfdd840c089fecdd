"""ScienceQA, test split: school questions with and without a picture (Lu et al., NeurIPS 2022).

problems.json        {"1": {"question", "choices", "answer" (number), "hint", "image" (a name or null), ...}, ...}
pid_splits.json      {"test": ["4", ...], ...}
images/test/4/image.png
or Parquet with the columns question, choices, answer, hint, image (null without one)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.evals import choices, files
from fusion_jax.evals.task import Picture, Prediction, Question, Rule, Scored, Task, accuracy, percent, picture

DATA = "problems.json and pid_splits.json with images/test/, or the test split in Parquet files"
_CONFIGS = ("ScienceQA-FULL", "default", "ScienceQA-IMG")  # the last holds only the questions with a picture


def read(data_dir: Path) -> list[Question]:
    folder = files.open_folder(data_dir, ("scienceqa",), "scienceqa", DATA)
    if parquet := folder.parquet(*((name, ("test",)) for name in _CONFIGS)):
        rows = files.read_parquet(parquet, ("question", "choices", "answer", "hint"))
        return [
            _question(str(n), row.values, (row.picture("image"),) if row.has("image") else ())
            for n, row in enumerate(rows)
        ]
    problems, splits = folder.one("problems.json"), folder.one("pid_splits.json")
    data = files.read_json(problems)
    pids = files.need_keys(files.read_json(splits), ("test",), str(splits))["test"]
    images = folder.images("images/test", "test", "images", "")
    questions = []
    for pid in pids:
        row = files.need_keys(data.get(pid), ("question", "choices", "answer", "hint", "image"), f"{problems}, {pid}")
        shown = (picture(images / pid / row["image"]),) if row["image"] else ()
        questions.append(_question(pid, row, shown))
    return questions


def _question(key: str, row: dict[str, Any], pictures: tuple[Picture, ...]) -> Question:
    options = choices.listed(row["choices"], f"question {key}: choices")
    context = f"Context: {row['hint']}\n" if not choices.is_missing(row["hint"]) else ""
    prompt = f"{context}{row['question']}\n{choices.lettered(options)}\n{choices.BY_LETTER}"
    answer = choices.numbered(row["answer"], f"question {key}")
    return Question(key, prompt, answer, pictures, row["question"], {"options": options, "image": bool(pictures)})


def parse(answer: str, options: Sequence[str]) -> str:
    """Applies the published scripts' rule; FAILED where no option is named."""
    letter = choices.scripted_letter(answer.strip())
    return letter if letter and letter in choices.LETTERS[: len(options)] else "FAILED"


def score(question: Question, answer: str) -> Scored:
    parsed = parse(answer, question.about["options"])
    return parsed, float(parsed == question.reference)


def strict_score(question: Question, answer: str) -> Scored:
    """Applies lmms-eval's rule: the letter alone in any case, or a capital before a period at the start."""
    text = answer.strip()
    letter = text[0] if text[:1].isupper() and text[1:2] == "." else text
    return letter, float(letter.lower() == question.reference.lower())


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    with_image = [p.score for p in predictions if p.question.about["image"]]
    return {
        "accuracy": accuracy(predictions),
        **({"image_accuracy": percent(with_image)} if with_image else {}),
    }


TASK = Task(
    "scienceqa",
    "ScienceQA",
    DATA,
    read,
    score,
    summarise,
    headline="image_accuracy",
    max_tokens=1024,
    rule=choices.SCRIPTS,
    published=Rule(choices.LMMS_EVAL, strict_score),
)
