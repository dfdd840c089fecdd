"""LLaVA-Bench (In-the-Wild): sixty open questions about 24 pictures (Liu et al., NeurIPS 2023).

    questions.jsonl      {"question_id", "image", "text", "category" (conv, detail or complex)}
    context.jsonl        {"id", "image", "caption"}: a description for the judge, who does not see the picture
    answers_gpt4.jsonl   {"question_id", "text"}: the reference answers
    images/
    or Parquet with the columns question_id, question, image, category, caption, gpt_answer

A language model grades the reference answer and the model's answer with one to ten points each. The figure is the sum
of the model's points in percent of the sum of the references', so it may be above 100. The grading prompt is the
benchmark's, word for word (github.com/haotian-liu/LLaVA, Apache-2.0): another would lead to other scores. Without a
judge, the answers are written to the file that the benchmark's own script reads.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.errors import UserError
from fusion_jax.evals import choices, files
from fusion_jax.evals.judge import Judge
from fusion_jax.evals.task import Picture, Prediction, Question, Rule, Scored, Task, picture

DATA = "questions.jsonl, context.jsonl and answers_gpt4.jsonl with the images in images/, or the Parquet files"
CATEGORIES = ("conv", "detail", "complex")
_ATTEMPTS = 3
_TEMPERATURE = 0.2  # of the official script; the judge's replies vary with it
GRADING = """[Context]
{context}

[Question]
{question}

[Assistant 1]
{reference}

[End of Assistant 1]

[Assistant 2]
{answer}

[End of Assistant 2]

[System]
We would like to request your feedback on the performance of two AI assistants in response to the user question \
displayed above. The user asks the question on observing an image. For your reference, the visual content in the image \
is represented with a few sentences describing the image. \

Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an \
overall score on a scale of 1 to 10, where a higher score indicates better overall performance.
Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, \
respectively. The two scores are separated by a space.
In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential bias and \
ensuring that the order in which the responses were presented does not affect your judgment.

"""


def read(data_dir: Path) -> list[Question]:
    names = ("llava_wild", "llava-bench-in-the-wild", "llava-in-the-wild")
    folder = files.open_folder(data_dir, names, "llava_wild", DATA)
    if parquet := folder.parquet(("default", ("train",)), ("default", ("test",))):
        needed = ("question_id", "question", "category", "caption", "gpt_answer")
        return [
            _question(r.where, v["question_id"], v["question"], v["category"], v["caption"], v["gpt_answer"], image)
            for r in files.read_parquet(parquet, needed)
            for v, image in [(r.values, r.picture("image"))]
        ]
    path, context, answers = (folder.one(f"{name}.jsonl") for name in ("questions", "context", "answers_gpt4"))
    captions = _by(context, "image", "caption")
    references = _by(answers, "question_id", "text")
    images = folder.images("images", "")
    questions = []
    for number, line in enumerate(files.read_records(path), 1):
        where = f"{path}, line {number}"
        row = files.need_keys(line, ("question_id", "image", "text", "category"), where)
        for there, name, key in ((captions, context, "image"), (references, answers, "question_id")):
            if row[key] not in there:
                raise folder.wrong(f"{where}: {name.name} has nothing for the {key} {row[key]!r},")
        caption, reference = captions[row["image"]], references[row["question_id"]]
        image = picture(images / row["image"])
        questions.append(_question(where, row["question_id"], row["text"], row["category"], caption, reference, image))
    return questions


def _by(path: Path, key: str, value: str) -> dict[Any, str]:
    rows = [
        files.need_keys(row, (key, value), f"{path}, line {n}") for n, row in enumerate(files.read_records(path), 1)
    ]
    return {row[key]: row[value] for row in rows}


def _question(where: str, key: Any, text: str, category: str, context: Any, reference: str, image: Picture) -> Question:
    kind = str(category).removeprefix("llava_bench_")
    if kind not in CATEGORIES:
        raise UserError(f"{where}: the category {category!r} is none of {', '.join(CATEGORIES)}.")
    context = "\n".join(context) if isinstance(context, list) else context
    if choices.is_blank(context):
        raise UserError(f"{where}: the caption is empty, by which the judge knows the picture.")
    return Question(str(key), text, reference, (image,), text, {"category": kind, "context": context})


def score(question: Question, answer: str) -> Scored:
    return None, None


def judged(question: Question, answer: str, judge: Judge) -> Scored:
    """Grades one answer: the points of the reference and of the answer, and the latter as a share of ten.

    The request is repeated where the first line of the reply does not hold two numbers. After some attempts the
    question counts in neither sum.
    """
    prompt = GRADING.format(
        context=question.about["context"], question=question.text, reference=question.reference, answer=answer
    )
    for _ in range(_ATTEMPTS):
        if points := parse(judge.ask(prompt, 1024, _TEMPERATURE)):
            return list(points), points[1] / 10
    return "no numbers", 0.0


def parse(reply: str) -> tuple[float, float] | None:
    """The two numbers in the first line, each from 1 to 10; None where there are others, as in `8/10, 7/10`."""
    numbers = [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", reply.strip().split("\n")[0])]
    return (numbers[0], numbers[1]) if len(numbers) == 2 and all(1 <= x <= 10 for x in numbers) else None


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """`relative`, the published figure, over all questions and by category; the mean points of both in percent; and the
    number of questions without points from the judge."""
    graded = [p for p in predictions if isinstance(p.parsed, list)]
    kinds = {kind: [p for p in graded if p.question.about["category"] == kind] for kind in CATEGORIES}
    figures = {"relative": graded, **kinds}
    means = {
        name: 10 * sum(p.parsed[place] for p in graded) / len(graded)
        for place, name in enumerate(("reference", "model"))
        if graded
    }
    return {
        **{name: _relative(part) for name, part in figures.items() if part},
        **means,
        "ungraded": len(predictions) - len(graded),
    }


def _relative(predictions: Sequence[Prediction]) -> float:
    return 100 * sum(p.parsed[1] for p in predictions) / sum(p.parsed[0] for p in predictions)


def submit(predictions: Sequence[Prediction], folder: Path) -> list[Path]:
    """Writes the answers as LLaVA's own grading script reads them."""
    path = folder / "submission.jsonl"
    rows = [{"question_id": p.question.id, "prompt": p.question.text, "text": p.answer} for p in predictions]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8", errors="replace")
    return [path]


TASK = Task(
    "llava_wild",
    "LLaVA-Bench (Wild)",
    DATA,
    read,
    score,
    summarise,
    headline="relative",
    max_tokens=1024,
    judged=judged,
    submit=submit,
    rule="LLaVA's own script, 2023",
    published=Rule(choices.LMMS_EVAL_OLD, max_tokens=4096),
)
