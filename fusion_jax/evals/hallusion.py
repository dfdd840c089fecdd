"""HallusionBench: yes/no questions with true, changed, or no pictures (Guan et al., CVPR 2024).

    HallusionBench.json               a list with category (VD, VS), subcategory, set_id, figure_id, question_id,
                                      question, visual_input ("0": no picture), gt_answer ("1": yes), gt_answer_details,
                                      filename
    hallusion_bench/VD/figure/...     the images
    or Parquet with the same columns and `image`

An answer is right (1), wrong (0) or unclear (2). In the official evaluation a language model decides; without one the
words yes and no do. Unclear counts as right where a question about a missing picture (VS, figure 0) has no answer.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.evals import choices, files, vqa
from fusion_jax.evals.judge import Judge
from fusion_jax.evals.task import Picture, Prediction, Question, Scored, Task, accuracy, percent, picture

DATA = "HallusionBench.json with the images in hallusion_bench/, or HallusionBench's Parquet files"
# Files with and without the questions that have no picture, or one file for both.
_SPLITS = (("default", ("image", "non_image")), ("default", ("image",)), ("default", ("test",)))
_PLACE = ("category", "subcategory", "set_id", "figure_id", "question_id")
_COLUMNS = (*_PLACE, "question", "visual_input", "gt_answer", "gt_answer_details")
_WORDS = {"1": "yes", "0": "no"}
# The benchmark's own prompt (github.com/tianyi-lab/HallusionBench, BSD-3-Clause): another would judge differently.
_GRADING = (
    "Imagine you are an intelligent teacher. Thoroughly read the question, reference answer and the prediction answer "
    "to ensure a clear understanding of the information provided. Assess the correctness of the predictions. If the "
    "prediction answer does not conflict with the reference answer, please generate “correct”. If the prediction "
    "answer conflict with the reference answer, please generate “incorrect”. If the prediction answer is unclear "
    'about the answer, please generate "unclear". \n\n Question:{}\nReference answer: {}\nPrediction answer:{}\nOutput:'
)


def read(data_dir: Path) -> list[Question]:
    folder = files.open_folder(data_dir, ("hallusion_bench", "hallusionbench"), "hallusion_bench", DATA)
    # The archive's image folder has the benchmark's name as well.
    if folder.path != data_dir and (data_dir / "HallusionBench.json").is_file():
        folder = files.Folder(data_dir, folder.task, folder.expects)
    if parquet := folder.parquet(*_SPLITS):
        return [
            _question(r.values, (r.picture("image"),) if r.has("image") else ())
            for r in files.read_parquet(parquet, _COLUMNS)
        ]
    path = folder.one("HallusionBench.json")
    images = folder.images("hallusion_bench", "images", "")
    questions = []
    for number, line in enumerate(files.read_records(path)):
        row = files.need_keys(line, _COLUMNS, f"{path}, record {number}")
        name = f"{row['category']}/{row['subcategory']}/{row['set_id']}_{row['figure_id']}.png"
        shown = () if choices.as_text(row["visual_input"]) == "0" else (picture(images / name),)
        questions.append(_question(row, shown))
    return questions


def _question(row: dict[str, Any], pictures: tuple[Picture, ...]) -> Question:
    row = {**row, **{key: choices.as_text(row[key]) for key in (*_PLACE, "visual_input", "gt_answer")}}
    about = {key: row[key] for key in (*_PLACE, "visual_input")} | {"details": row["gt_answer_details"]}
    key = "_".join(row[name] for name in _PLACE)
    reference = choices.yes_or_no(_WORDS.get(row["gt_answer"], row["gt_answer"]), f"question {key}")
    group = "_".join(row[name] for name in _PLACE[:3])
    return Question(key, row["question"], reference, pictures, row["question"], about, group)


def _scored(question: Question, verdict: int) -> Scored:
    unseen = question.about["category"] == "VS" and question.about["figure_id"] == "0"
    return verdict, float(verdict == 1 or (unseen and verdict == 2))


def score(question: Question, answer: str) -> Scored:
    """Applies VLMEvalKit's rule: the word yes or no decides; an answer with both or neither is unclear."""
    words = {"yes", "no"} & set(vqa.punctuation(answer.lower(), vqa.ONE_COMMA).split())
    return _scored(question, 2 if len(words) != 1 else int(words == {question.reference}))


def judged(question: Question, answer: str, judge: Judge) -> Scored:
    verdict = judge.ask(_GRADING.format(question.text, question.about["details"], answer), 16).lower()
    return _scored(question, 0 if "incorrect" in verdict else 1 if "correct" in verdict else 2)


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """`aAcc` by question, `fAcc` by figure and `qAcc` by question over all its figures, for all questions, and for only
    those with a picture, which some leaderboards show."""
    with_image = [p for p in predictions if p.question.pictures]
    figures = _figures(predictions)
    return figures | ({f"{key}_images_only": v for key, v in _figures(with_image).items()} if with_image else {})


def _figures(predictions: Sequence[Prediction]) -> dict[str, float]:
    by_figure, by_question = defaultdict(list), defaultdict(list)
    for p in predictions:
        category, subcategory, group, figure, number = (p.question.about[key] for key in _PLACE)
        by_question[category, subcategory, group, number].append(p.score)
        if (category, figure) != ("VS", "0"):  # there is no figure
            by_figure[category, subcategory, group, figure].append(p.score)
    return {
        "aAcc": accuracy(predictions),
        "fAcc": percent([min(scores) for scores in by_figure.values()]),
        "qAcc": percent([min(scores) for scores in by_question.values()]),
    }


TASK = Task(
    "hallusion_bench",
    "HallusionBench",
    DATA,
    read,
    score,
    summarise,
    headline="aAcc",
    max_tokens=128,
    judged=judged,
    rule="HallusionBench's own, 2023; without a judge VLMEvalKit, May 2026",
)
