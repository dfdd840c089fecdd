"""Which rule a task follows, and the published figures' own rule beside it or in its place."""

import pytest
from helpers.bench_files import Rule, cell, pope_folder, write_image, write_json, write_lines, write_parquet

from fusion_jax.errors import UserError
from fusion_jax.evals import textvqa
from fusion_jax.evals.registry import TASKS, find_tasks
from fusion_jax.evals.runner import evaluate_tasks, run_task
from fusion_jax.evals.task import Question

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def test_every_task_names_its_rule_and_the_published_one_has_a_name_of_its_own():
    for task in TASKS.values():
        assert task.rule or task.name == "held_out"
        other = task.as_published()
        assert (other is task) == (task.published is None)
        assert TASKS[other.name].rule == other.rule
    assert [task.name for task in find_tasks(["pope", "mme", "pope"], "published")] == ["pope_published", "mme"]
    assert find_tasks(["pope_published"]) == find_tasks(["pope_published"], "published") == [TASKS["pope_published"]]


def test_lengths_are_the_official_ones():
    lengths = {"mmvet": 1024, "mmbench_cn_dev_published": 256, "chartqa": 16, "mmmu": 128, "mmmu_published": 16}
    lengths |= {"docvqa": 32, "ocrbench": 128, "cv_bench": 1024, "scienceqa": 1024}
    assert {name: TASKS[name].max_tokens for name in lengths} == lengths


def test_both_figures_are_shown_where_the_answers_are_the_same(tmp_path):
    """`Yes.` is a yes to POPE's script, and to lmms-eval no answer at all: nothing hit, nothing missed."""
    folder = pope_folder(tmp_path, {"random": ["yes", "no"], "popular": ["yes", "no"], "adversarial": ["yes", "no"]})
    said = Rule(lambda w: "Yes." if "0 dog" in w else "no")
    scores = run_task(said, TASKS["pope"], folder, progress=False).scores
    assert (scores["f1"], scores["f1 (rule=published)"]) == (100.0, 0.0)
    flat = evaluate_tasks(said, ["pope"], folder, rule="published")
    assert flat["pope_published/random_accuracy"] == 50.0 and flat["pope_published/f1"] == 0.0
    assert flat["pope_published/recall"] == 0.0 and "pope_published/f1 (rule=published)" not in flat


def asked(name, folder):
    return [q.prompt for q in TASKS[name].read(folder)]


def test_mmbench_as_lmms_eval_asks_it(tmp_path):
    row = {"index": 3, "question": "Which?", "hint": "Look.", "A": "cat", "B": "nan", "C": None, "D": "cow"}
    row |= {"answer": "D", "category": "x", "l2-category": "y", "image": cell()}
    write_parquet(tmp_path / "dev-0.parquet", [row, row | {"index": 1_000_003, "hint": None}])
    for name, last in (("en", LETTER), ("cn", "请直接使用所提供的选项字母作为答案回答。")):
        here = tmp_path if name == "en" else tmp_path / "mmbench_cn"
        write_parquet(here / "dev-0.parquet", [row, row | {"index": 1_000_003, "hint": None}])
        words = f"There are several options:\nA. cat\nB. nan\nD. cow\n\n{last}"
        assert asked(f"mmbench_{name}_dev_published", here) == [f"Look. Which? {words}", f"Which? {words}"]


def test_mmvet_as_lmms_eval_asks_it(tmp_path):
    write_json(
        tmp_path / "mm-vet.json", {"v1_0": {"imagename": "a.png", "question": "x?", "answer": "a", "capability": []}}
    )
    write_image(tmp_path / "images" / "a.png")
    reason = "First please perform reasoning, and think step by step to provide best answer to the following question: "
    assert asked("mmvet", tmp_path) == ["x?"] and asked("mmvet_published", tmp_path) == [f"{reason}\n\nx?"]


@pytest.mark.parametrize(
    ("changes", "last"),
    [
        ({"answer_type": "integer"}, "Answer the question using a single integer number."),
        (
            {"answer_type": "float", "precision": 2.0},
            "Answer the question using a single floating-point number with two decimal places.",
        ),
        ({"answer_type": "list"}, "Answer the question using a Python list."),
        ({"question_type": "multi_choice", "choices": ["a", "None"]}, f"A. a\nB. None\n{LETTER}"),
    ],
)
def test_mathvista_as_lmms_eval_asks_it(tmp_path, changes, last):
    row = {"pid": "1", "question": "How long?", "question_type": "free_form", "answer_type": "text", "answer": "1"}
    row |= {"choices": None, "unit": "cm", "precision": None, "metadata": None, "decoded_image": cell()}
    write_parquet(tmp_path / "testmini-0.parquet", [row | changes])
    assert asked("mathvista_published", tmp_path) == [f"How long? (Unit: cm)\n{last}"]


def textvqa_folder(folder):
    data = [{"question_id": 7, "question": "WHAT is it?", "image_id": "i1", "answers": ["nokia"] * 10}]
    write_json(folder / "TextVQA_0.5.1_val.json", {"data": data})
    write_image(folder / "train_images" / "i1.jpg")


def test_textvqa_with_ocr_tokens(tmp_path):
    row = {"question_id": 1, "question": "WHAT is it?", "answers": ["x"] * 10, "image": cell()}
    write_parquet(tmp_path / "validation-0.parquet", [row | {"ocr_tokens": ["NOKIA", "3310"]}])
    prompt = f"What is it?\nReference OCR token: NOKIA, 3310\n{SHORT}"
    assert asked("textvqa", tmp_path) == [f"What is it?\n{SHORT}"]
    assert asked("textvqa_published", tmp_path) == [prompt]


def test_textvqa_with_the_prompts_of_llava(tmp_path):
    textvqa_folder(tmp_path)
    with pytest.raises(UserError, match="no OCR tokens for the question 7: no column ocr_tokens, no llava_textvqa"):
        textvqa.read_with_ocr(tmp_path)
    prompt = f"what is it?\nReference OCR token: NOKIA\n{SHORT}"
    other = {"question_id": "i1", "text": f"who?\nReference OCR token: NOKIA\n{SHORT}"}
    write_lines(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", [other, {"question_id": "i1", "text": prompt}])
    assert asked("textvqa_published", tmp_path) == [prompt]


def test_the_static_rule_takes_an_article_for_no_letter():
    options = {"A": "a red bus", "B": "a dog"}
    score = TASKS["mmbench_en_dev_published"].score
    for said, right in (("A dog is there", 1), ("(B).", 1), ("B is right", 1), ("E", 0), ("A, no: E.", 0)):
        assert score(Question("1", "", "B", about={"options": options}), said)[1] == right, said
