"""MM-Vet: open questions that need several abilities, graded by a judge (Yu et al., ICML 2024).

    mm-vet.json   {"v1_0": {"imagename", "question", "answer", "capability": ["ocr", "math"], ...}, ...}
    images/       the images
    or Parquet with the columns question_id, question, answer, capability, image

Without a judge, the answers are written to the file that the benchmark's own evaluator reads. The grading prompt below
is the benchmark's, word for word (github.com/yuweihao/MM-Vet, Apache-2.0): another would lead to other scores.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.evals import choices, files
from fusion_jax.evals.judge import Judge
from fusion_jax.evals.task import Picture, Prediction, Question, Rule, Scored, Task, accuracy, percent, picture

DATA = "mm-vet.json with the images in images/, or MM-Vet's Parquet files"
_ATTEMPTS = 5
_REASON = (
    "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
)
_MEME = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the countries Iceland and "
    "Greenland are misleading. Despite its name, Iceland is known for its beautiful green landscapes, while Greenland "
    "is mostly covered in ice and snow. The meme is saying that the person has trust issues because the names of these "
    "countries do not accurately represent their landscapes. | "
)
GRADING = f"""Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. \
<AND> in the ground truth means it is totally right only when all elements in the ground truth are present in the \
prediction, and <OR> means it is totally right when any one element in the ground truth is present in the prediction. \
The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). \
Just complete the last space of the correctness score.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0
What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0
{_MEME}The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not very icy \
and Greenland isn't very green. | 0.4
{_MEME}The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, despite \
its name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This is why I have \
trust issues' is a playful way to suggest that these contradictions can lead to distrust or confusion. The humor in \
this meme is derived from the unexpected contrast between the names of the countries and their actual physical \
characteristics. | 1.0
"""


def read(data_dir: Path) -> list[Question]:
    folder = files.open_folder(data_dir, ("mm-vet", "mmvet"), "mmvet", DATA)
    if parquet := folder.parquet(("default", ("test",))):
        rows = files.read_parquet(parquet, ("question_id", "question", "answer", "capability"))
        return [_question(r.values["question_id"], r.values, r.picture("image")) for r in rows]
    path = folder.one("mm-vet.json")
    images = folder.images("images", "mm-vet/images")
    questions = []
    for key, row in files.read_json(path).items():
        files.need_keys(row, ("imagename", "question", "answer", "capability"), f"{path}, {key}")
        questions.append(_question(key, row, picture(images / row["imagename"])))
    return questions


def _question(key: str, row: dict[str, Any], image: Picture) -> Question:
    abilities = row["capability"]
    abilities = abilities.split(",") if isinstance(abilities, str) else list(abilities)
    about = {"capability": [name.strip() for name in abilities]}
    return Question(str(key), row["question"], row["answer"], (image,), row["question"], about)


def read_with_reasoning(data_dir: Path) -> list[Question]:
    """The questions as lmms-eval asks them."""
    return [dataclasses.replace(q, prompt=f"{_REASON}{q.prompt}") for q in read(data_dir)]


def score(question: Question, answer: str) -> Scored:
    return None, None


def judged(question: Question, answer: str, judge: Judge) -> Scored:
    """Grades an answer with the judge's number. A reply without one is requested again at rising temperatures; in the
    end the score is 0."""
    truth = question.reference.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    prompt = f"{GRADING}\n{' | '.join([question.text, truth, answer, ''])}"
    temperature = 0.0
    for attempt in range(_ATTEMPTS):
        reply = judge.ask(prompt, 3, temperature)
        try:
            grade = float(reply.split(" ")[0].strip())
        except ValueError:
            grade = -1.0
        if 0 <= grade <= 1:
            return reply.strip(), grade
        temperature = 0.5 * attempt
        prompt = f"{prompt}\nPredict the correctness of the answer (digit): " if not attempt else prompt
    return "no number", 0.0


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The total, and figures by ability and by set of abilities."""
    single, joint = defaultdict(list), defaultdict(list)
    for p in predictions:
        abilities = p.question.about["capability"]
        joint["_".join(sorted(abilities))].append(p.score)
        for name in set(abilities):
            single[name].append(p.score)
    return {
        "total": accuracy(predictions),
        "by_capability": {name: percent(scores) for name, scores in sorted(single.items())},
        "by_integration": {name: percent(scores) for name, scores in sorted(joint.items())},
    }


def submit(predictions: Sequence[Prediction], folder: Path) -> list[Path]:
    return files.write_json(folder / "submission.json", {p.question.id: p.answer for p in predictions})


TASK = Task(
    "mmvet",
    "MM-Vet",
    DATA,
    read,
    score,
    summarise,
    headline="total",
    max_tokens=1024,
    judged=judged,
    submit=submit,
    rule="MM-Vet's own evaluator, 2023",
    published=Rule(choices.LMMS_EVAL, read=read_with_reasoning),
)
