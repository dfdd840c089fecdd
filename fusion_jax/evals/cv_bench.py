"""CV-Bench: counts, places, depths and distances, 2D and 3D (Cambrian-1, NeurIPS 2024).

    test_2d.parquet, test_3d.parquet   idx, type, task, source, question, choices, answer ("(C)"), prompt, image
    or test_2d.jsonl, test_3d.jsonl    the same with `filename` (img/2D/...) in place of the image

2D is the mean of its two sources, ADE20K and COCO; 3D has one, Omni3D; the score is the mean of 2D and 3D.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.evals import choices, files
from fusion_jax.evals.task import Prediction, Question, Scored, Task, percent_by, picture

DATA = "test_2d.parquet and test_3d.parquet, or the same as .jsonl with the images in img/"
_COLUMNS = ("idx", "type", "task", "source", "prompt", "choices", "answer")


def read(data_dir: Path) -> list[Question]:
    folder = files.open_folder(data_dir, ("cv_bench", "CVBench", "CV-Bench"), "cv_bench", DATA)
    sides = folder.joined_parquet(("2D", "3D"), "test")  # where a README or folders distinguish them
    wanted = (("default", ("test_2d", "test_3d")), ("default", ("test",)))
    if parquet := sides or folder.parquet(*wanted):
        rows = files.read_parquet(parquet, _COLUMNS)
        questions = [_question(row.values, row.picture("image")) for row in rows]
    else:
        questions = []
        for path in (folder.one("test_2d.jsonl"), folder.one("test_3d.jsonl")):
            for number, line in enumerate(files.read_records(path)):
                row = files.need_keys(line, (*_COLUMNS, "filename"), f"{path}, line {number + 1}")
                questions.append(_question(row, picture(path.parent / row["filename"])))
    if missing := {"2D", "3D"} - {q.about["type"] for q in questions}:
        raise folder.wrong(f"there are no {min(missing)} questions, and the figure is the mean of 2D and 3D,")
    return questions


def _question(row: dict, image) -> Question:
    prompt = f"{row['prompt']}\n{choices.BY_LETTER}"
    options = choices.listed(row["choices"], f"question {row['idx']}: choices")
    about = {key: row[key] for key in ("type", "task", "source")} | {"options": options}
    answer = row["answer"].strip("()")
    return Question(f"{row['type']}/{row['idx']}", prompt, answer, (image,), row.get("question") or "", about)


def score(question: Question, answer: str) -> Scored:
    parsed = choices.scripted_letter(answer.strip())
    return parsed, float(parsed == question.reference)


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """`accuracy` as the mean of 2D and 3D (as far as present), each of the two, and accuracy by source and task."""
    sources = percent_by(predictions, "source")
    means = {}
    for side in ("2D", "3D"):
        of_side = sorted({p.question.about["source"] for p in predictions if p.question.about["type"] == side})
        if of_side:
            means[side] = sum(sources[name] for name in of_side) / len(of_side)
    total = sum(means.values()) / len(means)
    return {"accuracy": total, **means, "by_source": sources, "by_task": percent_by(predictions, "task")}


TASK = Task(
    "cv_bench",
    "CV-Bench",
    DATA,
    read,
    score,
    summarise,
    headline="accuracy",
    max_tokens=1024,
    rule=choices.SCRIPTS,
)
