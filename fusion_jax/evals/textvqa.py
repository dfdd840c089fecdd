"""TextVQA, validation split: questions about text in the picture (Singh et al., CVPR 2019).

    TextVQA_0.5.1_val.json   {"data": [{"question_id", "question", "image_id", "answers": [ten of them], ...}]}
    train_images/            the images, named by image_id
    or Parquet with the columns question_id, question, answers, image

By default questions are asked without OCR tokens. The published figures were measured with those of Rosetta in the
prompt (rule=published): the Parquet files have them as `ocr_tokens`, and LLaVA's evaluation folder has the whole
prompts in llava_textvqa_val_v051_ocr.jsonl.
"""

import dataclasses
from pathlib import Path

from fusion_jax.evals import choices, files, vqa
from fusion_jax.evals.task import Question, Rule, Scored, Task, picture, summarise_accuracy

DATA = "TextVQA_0.5.1_val.json with the images in train_images/, or the validation split in Parquet files"
_OCR_PROMPTS = "llava_textvqa_val*_ocr.jsonl"


def read(data_dir: Path) -> list[Question]:
    folder = files.open_folder(data_dir, ("textvqa",), "textvqa", DATA)
    if parquet := folder.parquet(("default", ("validation",)), ("default", ("val",))):
        rows = files.read_parquet(parquet, ("question_id", "question", "answers"))
        return [_question(row.values, row.picture("image")) for row in rows]
    path = folder.one("TextVQA_*val*.json")
    images = folder.images("train_images", "train_val_images/train_images", "images", "")
    data = files.need_keys(files.read_json(path), ("data",), str(path))["data"]
    questions = []
    for number, row in enumerate(data):
        files.need_keys(row, ("question_id", "question", "image_id", "answers"), f"{path}, data {number}")
        questions.append(_question(row, picture(images / f"{row['image_id']}.jpg")))
    return questions


def _question(row: dict, image) -> Question:
    prompt = f"{row['question'].capitalize()}\n{choices.SHORT}"
    about = {"image": str(row.get("image_id", "")), "ocr_tokens": list(row.get("ocr_tokens") or ())}
    answers = choices.listed(row["answers"], f"question {row['question_id']}: answers")
    return Question(str(row["question_id"]), prompt, answers, (image,), row["question"], about)


def read_with_ocr(data_dir: Path) -> list[Question]:
    """The same questions with the OCR tokens of their images."""
    folder = files.open_folder(data_dir, ("textvqa",), "textvqa", f"{DATA}, and OCR tokens")
    prompts = {}
    for path in folder.find(_OCR_PROMPTS):
        for number, line in enumerate(files.read_records(path)):
            row = files.need_keys(line, ("question_id", "text"), f"{path}, line {number + 1}")
            prompts[str(row["question_id"]), row["text"].partition("\n")[0].lower()] = row["text"]
    questions = []
    for q in read(data_dir):
        words, _, last = q.prompt.rpartition("\n")
        tokens = ", ".join(q.about["ocr_tokens"])
        prompt = f"{words}\nReference OCR token: {tokens}\n{last}"
        if not tokens and (prompt := prompts.get((q.about["image"], q.text.lower()))) is None:
            raise folder.wrong(
                f"there are no OCR tokens for the question {q.id}: no column ocr_tokens, no {_OCR_PROMPTS}"
            )
        questions.append(dataclasses.replace(q, prompt=prompt))
    return questions


def score(question: Question, answer: str) -> Scored:
    parsed = vqa.normalise(answer)
    return parsed, vqa.accuracy(parsed, [vqa.normalise(person) for person in question.reference])


TASK = Task(
    "textvqa",
    "TextVQA",
    DATA,
    read,
    score,
    summarise_accuracy,
    headline="accuracy",
    max_tokens=128,
    rule=choices.LMMS_EVAL,
    published=Rule(choices.SCRIPTS, read=read_with_ocr),
)
