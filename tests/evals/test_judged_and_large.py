"""LLaVA-Bench (In-the-Wild) with a judge by rule, and MME-RealWorld, in the forms in which people download them."""

import base64
import json

import pytest
from helpers.bench_files import Rule, cell, image_bytes, write_image, write_json, write_lines, write_parquet

from fusion_jax.errors import UserError
from fusion_jax.evals import llava_wild, mme_realworld
from fusion_jax.evals.registry import TASKS
from fusion_jax.evals.runner import Output, record, run_task

KINDS = ("conv", "detail", "complex", "conv")


class Grader:
    """Gives these replies in turn, and keeps what it was asked."""

    model = "grader"

    def __init__(self, *replies):
        self.replies, self.prompts = list(replies), []

    def ask(self, prompt, max_tokens, temperature=0.0):
        self.prompts.append(prompt)
        return self.replies.pop(0)


def wild(folder, form):
    if form == "parquet":
        rows = [
            {"question_id": n, "question": f"What is {n}?", "category": kind, "caption": f"seen {n}"}
            | {"gpt_answer": f"reference {n}", "image": cell(), "image_id": "1"}
            for n, kind in enumerate(KINDS)
        ]
        write_parquet(folder / "llava-bench-in-the-wild" / "data" / "train-00000-of-00001.parquet", rows)
        return folder
    folder = folder / "llava_wild"
    rows = [
        {"question_id": n, "image": f"{n}.png", "text": f"What is {n}?", "category": k} for n, k in enumerate(KINDS)
    ]
    write_lines(folder / "questions.jsonl", rows)
    write_lines(
        folder / "context.jsonl",
        [{"id": "1", "image": r["image"], "caption": f"seen {r['question_id']}"} for r in rows],
    )
    write_lines(
        folder / "answers_gpt4.jsonl",
        [{"question_id": r["question_id"], "text": f"reference {r['question_id']}"} for r in rows],
    )
    for r in rows:
        write_image(folder / "images" / r["image"])
    return folder.parent


@pytest.mark.parametrize("form", ["parquet", "release"])
def test_the_models_points_in_percent_of_the_references(tmp_path, form):
    """Sums 8 + 6 + 3 + 7 = 24 of 8 + 10 + 6 + 8 = 32; conv 15 of 16."""
    judge = Grader()
    by_number = {"0": "8 8\nFine.", "1": "10, 6", "2": "6 3", "3": "8 7"}
    judge.ask = lambda prompt, *_: judge.prompts.append(prompt) or by_number[prompt[len("[Context]\nseen ")]]
    answerer = Rule(lambda w: "It is a dog.")
    result = run_task(answerer, llava_wild.TASK, wild(tmp_path, form), judge=judge, progress=False)
    assert result.scores["relative"] == 75.0 and result.scores["conv"] == 100 * 15 / 16
    assert (result.scores["detail"], result.scores["complex"]) == (60.0, 50.0)
    assert (result.scores["reference"], result.scores["model"], result.scores["ungraded"]) == (80.0, 60.0, 0)
    assert result.predictions[1].parsed == [10.0, 6.0] and result.predictions[1].score == 0.6
    asked = sorted(judge.prompts)[0]
    assert asked.startswith("[Context]\nseen 0\n\n[Question]\nWhat is 0?\n\n[Assistant 1]\nreference 0\n\n[End of")
    assert "[Assistant 2]\nIt is a dog.\n\n[End of Assistant 2]\n\n[System]\nWe would like" in asked
    assert answerer.asked[0] == "<image>\nWhat is 0?"


@pytest.mark.parametrize(
    "said, points",
    [
        ("8 7", (8, 7)),
        ("8.5, 7\nAssistant 1 has 3 faults", (8.5, 7)),
        ("\n9;10", (9, 10)),
        ("Scores: 8 7", (8, 7)),
        ("8/10 7/10", None),
        ("Assistant 1: 8, Assistant 2: 7", None),
        ("8", None),
        ("0 7", None),
        ("11 7", None),
        ("-8 7", None),
        ("", None),
    ],
)
def test_two_numbers_in_the_first_line(said, points):
    assert llava_wild.parse(said) == points


def test_a_judge_without_numbers_counts_for_neither_sum(tmp_path):
    question = llava_wild.read(wild(tmp_path, "parquet"))[0]
    judge = Grader("Both are good.", "8/10 7/10", "8 7")
    assert llava_wild.judged(question, "x", judge) == ([8.0, 7.0], 0.7) and len(set(judge.prompts)) == 1
    assert llava_wild.judged(question, "x", Grader(*["Good."] * 3)) == ("no numbers", 0.0)
    judge = Grader(*["Good."] * 3)
    judge.ask = lambda prompt, *_: "8 4" if "What is 1?" in prompt else "Good."
    scores = run_task(Rule(str), llava_wild.TASK, tmp_path, judge=judge, progress=False).scores
    assert scores["relative"] == scores["detail"] == 50.0 and scores["ungraded"] == 3 and "conv" not in scores


def test_without_a_judge_there_is_a_file_for_the_official_script(tmp_path):
    output = Output(tmp_path / "out", {"checkpoint": "x", "folder": "y"})
    result = run_task(Rule(lambda _: "a dog"), llava_wild.TASK, wild(tmp_path, "release"), output, progress=False)
    assert result.scores == {"questions": 4}
    rows = [json.loads(line) for line in result.files[0].read_text().splitlines()]
    assert rows[0] == {"question_id": "0", "prompt": "What is 0?", "text": "a dog"}


def test_a_question_without_context_or_of_no_category_is_named(tmp_path):
    folder = wild(tmp_path, "release") / "llava_wild"
    write_lines(folder / "context.jsonl", [{"id": "1", "image": "0.png", "caption": "seen"}])
    with pytest.raises(UserError, match=r"questions\.jsonl, line 2: context\.jsonl has nothing for the image '1\.png'"):
        run_task(Rule(str), llava_wild.TASK, tmp_path, progress=False)
    row = {"question_id": 1, "question": "?", "category": "math", "caption": "", "gpt_answer": "x", "image": cell()}
    write_parquet(tmp_path / "other" / "train-0.parquet", [row])
    with pytest.raises(UserError, match="row 0: the category 'math' is none of conv, detail, complex"):
        run_task(Rule(str), llava_wild.TASK, tmp_path / "other", progress=False)


def large_row(number, category="Perception/Remote Sensing", kind="color", answer="B"):
    row = {"index": number, "question": f"Which is {number}?", "answer": answer, "category": category}
    row |= {"multi-choice options": [f"({x}) {x * 2}" for x in "ABCDE"], "l2-category": kind}
    return row | {"bytes": base64.b64encode(image_bytes()).decode(), "path": "x.png"}


def test_mme_realworld_from_the_hub(tmp_path):
    """0 and 2 right of four; reasoning 1 of 1."""
    rows = [large_row(0), large_row(1), large_row(2, "Reasoning/Monitoring"), large_row(3, answer="E")]
    write_parquet(tmp_path / "MME-RealWorld-Lmms-eval" / "data" / "train-00000-of-00001.parquet", rows)
    task = TASKS["mme_realworld"]
    result = run_task(Rule(lambda w: "A" if "is 1?" in w else "(B) BB"), task, tmp_path, progress=False)
    assert result.scores["accuracy"] == 50.0 and result.scores["reasoning"] == 100.0
    assert result.scores["perception"] == pytest.approx(100 / 3)
    assert result.scores["by_subtask"]["Reasoning/Monitoring"] == 100.0
    first = record(task, result.predictions[0].question)
    assert first.images == (image_bytes(),)
    assert first.turns[0]["value"] == (
        "<image>\nWhich is 0? The choices are listed below:\n(A) AA\n(B) BB\n(C) CC\n(D) DD\n(E) EE\nSelect the best "
        "answer to the above multiple-choice question based on the image. Respond with only the letter (A, B, C, D, or "
        "E) of the correct option.\nThe best answer is: "
    )


def test_mme_realworld_release_and_languages(tmp_path):
    rows = [
        {"Question_id": f"q/{n}", "Image": f"ocr/{n}.png", "Text": text, "Ground truth": "C", "Task": "Perception"}
        | {"Answer choices": ["(A) a", "(B) b", "(C) c"], "Subtask": "Monitoring", "Category": "count"}
        for n, text in enumerate(("哪里?", "什么?"))
    ]
    write_json(tmp_path / "MME-RealWorld-CN" / "MME_RealWorld_CN.json", rows)
    for n in range(2):
        write_image(tmp_path / "MME-RealWorld-CN" / "ocr" / f"{n}.png")
    result = run_task(Rule(lambda _: "C"), TASKS["mme_realworld_cn"], tmp_path, progress=False)
    assert result.scores["accuracy"] == 100.0
    assert result.predictions[0].question.prompt.startswith("哪里? 选项如下所示:\n(A) a\n(B) b\n(C) c\n根据图像")
    write_json(tmp_path / "MME-RealWorld" / "MME_RealWorld.json", rows)
    with pytest.raises(UserError, match="the questions are in Chinese, not in English"):
        run_task(Rule(str), TASKS["mme_realworld"], tmp_path, progress=False)


@pytest.mark.parametrize(
    "answer, letter",
    [
        *[(said, "B") for said in ("B", "(B)", "B. bus", "The best answer is B", "The answer is (B).", "b", "(b")],
        ("The answer A or B", "A"),
        ("none of them", ""),
        ("i do not know what this may be, so i say nothing about it", ""),
        ("All of it", "A"),  # the first capital, be it part of a word
        ("", "A"),  # as the benchmark's own code reads it
        ("F", ""),
    ],
)
def test_mme_realworld_letters(answer, letter):
    assert mme_realworld.parse(answer) == letter
