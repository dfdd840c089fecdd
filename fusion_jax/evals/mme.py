"""MME: two yes/no questions a picture, ten perception and four cognition subtasks (Fu et al., 2023).

    existence/000000006040.txt   "question<TAB>Yes" on each of two lines, beside 000000006040.jpg; some subtasks keep
                                 them apart, in questions_answers_YN/ and images/
    or Parquet with the columns question_id, question, answer, category, image

A subtask's score is accuracy plus the share of pictures with both answers right, each up to 100.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fusion_jax.evals import choices, files
from fusion_jax.evals.task import Picture, Prediction, Question, Scored, Task, percent, picture
from fusion_jax.files import read_text

DATA = "one folder a subtask (existence/, count/, ...) with texts and images, or MME's Parquet files"
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)


def read(data_dir: Path) -> list[Question]:
    folder = files.open_folder(data_dir, ("mme",), "mme", DATA)
    if parquet := folder.parquet(("default", ("test",))):
        seen = defaultdict(int)
        questions = []
        for row in files.read_parquet(parquet, ("question_id", "question", "answer", "category")):
            v = row.values
            seen[v["question_id"]] += 1
            number = seen[v["question_id"]]
            args = (v["question_id"], number, v["question"], v["answer"], v["category"], row.picture("image"))
            questions.append(_question(*args))
        return questions
    return list(_from_folders(folder))


def _from_folders(folder: files.Folder) -> Iterator[Question]:
    base = next(p for p in (folder.path / "MME_Benchmark_release_version", folder.path) if p.is_dir())
    base = base / "MME_Benchmark" if (base / "MME_Benchmark").is_dir() else base
    any_texts = False
    for name in (*PERCEPTION, *COGNITION):
        here = base / name
        texts = sorted((*here.glob("*.txt"), *here.glob("questions_answers_YN/*.txt")))
        any_texts = any_texts or bool(texts)
        for text in texts:
            images = here / "images" if text.parent.name == "questions_answers_YN" else here
            image = next((p for p in (images / f"{text.stem}{s}" for s in (".jpg", ".png")) if p.is_file()), None)
            image = image or images / f"{text.stem}.jpg"
            for number, line in enumerate(read_text(text).strip().splitlines(), 1):
                words, _, answer = line.rpartition("\t")
                if not words:
                    raise folder.wrong(f"{text}, line {number} has no tab between question and answer")
                yield _question(f"{name}/{text.stem}", number, words, answer, name, picture(image))
    if not any_texts:
        raise folder.wrong("there is no subtask's folder")


def _question(key: str, number: int, text: str, answer: str, category: str, image: Picture) -> Question:
    words = text.strip().replace(" Please answer yes or no.", "")
    prompt = f"{words}\n{choices.SHORT}"
    label = choices.yes_or_no(answer, f"question {key}/{number}")
    return Question(f"{key}/{number}", prompt, label, (image,), words, {"category": category}, key)


def score(question: Question, answer: str) -> Scored:
    """Searches the first four characters without periods for `yes`, then for `no`; `y` or `n` alone counts, too."""
    start = answer.lower().strip().replace(".", "")
    start = {"y": "yes", "n": "no"}.get(start, start[:4])
    parsed = next((word for word in ("yes", "no") if word in start), "other")
    return parsed, float(parsed == question.reference)


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Sums of the subtasks' scores: perception up to 2000, cognition up to 800, and each subtask's."""
    kinds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for p in predictions:
        kinds[p.question.about["category"]][p.question.group].append(p.score)
    scores = {
        kind: percent([s for pair in images.values() for s in pair]) + percent([min(pair) for pair in images.values()])
        for kind, images in kinds.items()
    }
    perception = sum(value for kind, value in scores.items() if kind not in COGNITION)
    return {
        "perception": perception,
        "cognition": sum(scores.values()) - perception,
        "total": sum(scores.values()),
        "by_subtask": scores,
    }


TASK = Task(
    "mme",
    "MME",
    DATA,
    read,
    score,
    summarise,
    headline="perception",
    max_tokens=16,
    rule=choices.LMMS_EVAL,
)
