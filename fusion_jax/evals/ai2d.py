"""AI2D: multiple choice about science diagrams, test split (Kembhavi et al., ECCV 2016).

*test*.parquet      question, options (a list), answer (the right one's number from 0, as text), image
AI2D_TEST.tsv       index, question, A, B, C, D, answer (a letter), image (base64)
the archive         questions/NAME.png.json, images/NAME.png, ai2d_test_ids.csv
"""

import re
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

from fusion_jax.evals import choices, files
from fusion_jax.evals.task import Picture, Question, Scored, Task, picture, summarise_accuracy
from fusion_jax.files import read_text

_NO_MARKS = str.maketrans("", "", string.punctuation)
DATA = "the test split in Parquet files, AI2D_TEST.tsv, or questions/, images/ and ai2d_test_ids.csv"


def read(data_dir: Path) -> list[Question]:
    folder = files.open_folder(data_dir, ("ai2d",), "ai2d", DATA)
    if parquet := folder.parquet(("default", ("test",))):
        rows = files.read_parquet(parquet, ("question", "options", "answer"))
        return [
            _question(str(n), v["question"], *_lettered(v["options"], v["answer"], r.where), r.picture("image"))
            for n, r in enumerate(rows)
            for v in [r.values]
        ]
    if folder.find("ai2d_test.tsv"):
        return _from_tsv(folder.one("ai2d_test.tsv"))
    return list(_from_archive(folder))


def _from_tsv(path: Path) -> list[Question]:
    rows = files.read_images(path, ("question", "A", "answer"))
    every = choices.read_options([row.values for row in rows], choices.LETTERS, lambda v: f"{path}, index {v['index']}")
    questions = []
    for row, options in zip(rows, every):
        v = row.values
        right = [*options][choices.place(v["answer"], [*options], row.where)]
        questions.append(_question(v["index"], v["question"], options, right, row.picture))
    return questions


def _from_archive(folder: files.Folder) -> Iterator[Question]:
    path = folder.one("ai2d_test_ids.csv")
    tests = {line.strip() for line in read_text(path).splitlines()}
    images, annotations = folder.images("images", "ai2d/images"), folder.images("questions", "ai2d/questions")
    for file in sorted(annotations.glob("*.json"), key=lambda p: (len(p.name), p.name)):
        name = file.name.removesuffix(".json")
        if Path(name).stem in tests:
            data = files.need_keys(files.read_json(file), ("questions",), str(file))
            for text, q in data["questions"].items():
                files.need_keys(q, ("answerTexts", "correctAnswer", "questionId"), f"{file}, {text!r}")
                options, right = _lettered(q["answerTexts"], q["correctAnswer"], f"{file}, {text!r}")
                yield _question(q["questionId"], text, options, right, picture(images / name))


def _lettered(options: Sequence[str] | str, right: str | int, where: str) -> tuple[dict[str, str], str]:
    """The options by letter, and the letter of the right one, which the files number from 0."""
    texts = choices.listed(options, f"{where}: options")
    return dict(zip(choices.LETTERS, texts)), choices.numbered(right, where)


def _question(key: str, text: str, options: dict[str, str], right: str, image: Picture) -> Question:
    prompt = f"{text}\n{choices.lettered(options)}\n{choices.BY_LETTER}"
    return Question(key, prompt, right, (image,), text, {"options": options})


def parse(answer: str) -> str:
    """Applies lmms-eval's rule: the capital letter before a period at the start, or else the whole answer without ASCII
    punctuation; in lower case."""
    first = re.match(r"\s*([A-Z])\.", answer)
    return (first[1] if first else answer.strip()).lower().translate(_NO_MARKS)


def score(question: Question, answer: str) -> Scored:
    parsed = parse(answer)
    return parsed, float(parsed == question.reference.lower())


TASK = Task(
    "ai2d", "AI2D", DATA, read, score, summarise_accuracy, headline="accuracy", max_tokens=16, rule=choices.LMMS_EVAL
)
