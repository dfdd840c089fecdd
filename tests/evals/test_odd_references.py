"""References and lists in other forms than the benchmark's own: a sentence, or the same questions; no wrong figures."""

import pytest
from helpers.bench_files import Rule, cell, write_parquet

from fusion_jax.errors import UserError
from fusion_jax.evals.prepare import prepare
from fusion_jax.evals.registry import TASKS
from fusion_jax.evals.runner import run_task

COMMON = {"question": "Which?", "image": cell()}
CHOICES = COMMON | {"choices": ["a", "None", "x, y"], "answer": 1, "hint": ""}
CV = COMMON | {"task": "Count", "prompt": "Which?", "choices": ["0", "1"], "answer": "(B)"}
STAR = COMMON | {"index": 1, "answer": "A", "A": "x", "B": "1", "category": "c", "l2_category": "d"}
SEED = COMMON | {"question_id": 1, "answer": "A", "data_type": "image"} | {f"choice_{x}": x * 3 for x in "abcd"}
REAL = COMMON | {"index": 1, "multi-choice options": ["(A) x", "(B) y"], "answer": "B"}
REAL |= {"category": "Perception/c", "l2-category": "d"}
PEOPLE = COMMON | {"question_id": 1, "answers": ["one", "two"]}
HALLUSION = COMMON | {"category": "VD", "subcategory": "figure", "set_id": "1", "figure_id": "1", "question_id": "0"}
HALLUSION |= {"visual_input": "1", "gt_answer": "1", "gt_answer_details": "It is."}
POPE = COMMON | {"answer": "yes", "category": "random"}
MME = COMMON | {"question_id": "1", "answer": "Yes", "category": "count"}
OCR = COMMON | {"dataset": "x", "question_type": "y", "answer": ["z"]}
CHART = COMMON | {"type": "human_test", "answer": "5"}
NAMES = {"mmstar": "val", "vizwiz": "val", "mme_realworld": "train", "textvqa": "validation", "docvqa": "validation"}


def write(folder, task, row):
    if task == "cv_bench":
        rows = [row | {"idx": n, "type": side, "source": side} for n, side in enumerate(("2D", "3D"))]
        for side, one in zip(("2d", "3d"), rows):
            write_parquet(folder / f"test_{side}.parquet", [one])
    else:
        write_parquet(folder / f"{NAMES.get(task, 'test')}-00000-of-00001.parquet", [row])


@pytest.mark.parametrize(
    ("task", "row", "column"),
    [
        ("scienceqa", CHOICES, "choices"),
        ("cv_bench", CV, "choices"),
        ("ai2d", COMMON | {"options": ["a", "b"], "answer": "1"}, "options"),
        ("mme_realworld", REAL, "multi-choice options"),
        ("textvqa", PEOPLE, "answers"),
        ("vizwiz", PEOPLE, "answers"),
        ("docvqa", COMMON | {"questionId": 1, "answers": ["one"]}, "answers"),
    ],
)
def test_a_list_as_text_is_that_list(tmp_path, task, row, column):
    """pandas writes lists so. A text that is no list would be taken for one of its characters."""
    for name, value in (("list", row[column]), ("text", str(row[column])), ("odd", "one")):
        write(tmp_path / name, task, row | {column: value})
    first, second = (prepare(TASKS[task], tmp_path / name).questions for name in ("list", "text"))
    assert [(q.prompt, q.reference, q.about) for q in first] == [(q.prompt, q.reference, q.about) for q in second]
    with pytest.raises(UserError, match=f"{column}: 'one' is not a list"):
        prepare(TASKS[task], tmp_path / "odd")


@pytest.mark.parametrize(
    ("task", "row", "answer", "message"),
    [
        ("mmstar", STAR, "1", "the answer '1' is not one of its 2 options"),
        ("mmstar", STAR, "x", "the answer 'x' is not one of its 2 options"),
        ("mmstar", STAR, "None", "the answer 'None' is not one of its 2 options"),
        ("cv_bench", CV, "(1)", "the answer '1' is not one of its 2 options"),
        ("seed_image", SEED | {"image": [cell()]}, "0", "the answer '0' is not one of its 4 options"),
        ("mme_realworld", REAL, "(B) y", r"the answer '\(B\) y' is not one of its 2 options"),
        ("pope", POPE, "", "the answer '' is neither yes nor no"),
        ("pope", POPE, "1", "the answer '1' is neither yes nor no"),
        ("mme", MME, "maybe", "the answer 'maybe' is neither yes nor no"),
        ("chartqa", CHART, None, "the answer is empty"),
        ("ocrbench", OCR, [""], "the answer is empty"),
        ("scienceqa", CHOICES, "B", "question 0: the answer 'B' is not the number of an option; the first is 0"),
        ("scienceqa", CHOICES, 0.5, "question 0: the answer 0.5 is not the number of an option"),
        ("scienceqa", CHOICES, -3, "question 0: the answer -3 is not the number of an option"),
        (
            "ai2d",
            COMMON | {"options": ["a", "b"]},
            "B",
            r"parquet, row 0: the answer 'B' is not the number of an option",
        ),
    ],
)
def test_an_answer_that_none_can_equal(tmp_path, task, row, answer, message):
    write(tmp_path, task, row | {"answer": answer})
    with pytest.raises(UserError, match=message):
        run_task(Rule(lambda _: pytest.fail("asked")), TASKS[task], tmp_path, progress=False)


def test_the_right_answers_of_hallusion_bench(tmp_path):
    """Numbers become floats where a table has an empty cell in the column."""
    for n, (value, word) in enumerate((("1", "yes"), (1, "yes"), (1.0, "yes"), ("Yes", "yes"), (0.0, "no"))):
        write(tmp_path / str(n), "hallusion_bench", HALLUSION | {"gt_answer": value})
        assert [q.reference for q in prepare(TASKS["hallusion_bench"], tmp_path / str(n)).questions] == [word]
    write(tmp_path / "odd", "hallusion_bench", HALLUSION | {"gt_answer": "true"})
    with pytest.raises(UserError, match="the answer 'true' is neither yes nor no"):
        prepare(TASKS["hallusion_bench"], tmp_path / "odd")


def test_hallusion_bench_knows_a_question_without_a_figure_by_a_number_too(tmp_path):
    row = HALLUSION | {"category": "VS", "figure_id": 0.0, "set_id": 1.0, "visual_input": 0.0, "image": None}
    write(tmp_path, "hallusion_bench", row)
    result = run_task(Rule(lambda _: "I cannot say."), TASKS["hallusion_bench"], tmp_path, progress=False)
    assert result.scores["aAcc"] == 100 and result.predictions[0].question.id == "VS_figure_1_0_0"


def test_a_picture_that_a_question_of_mmmu_names_must_be_there(tmp_path):
    row = {"id": "validation_Art_1", "question": "<image 1>?", "options": "['x', 'y']", "answer": "A"}
    row |= {"question_type": "multiple-choice", "image_1": None, "image_2": cell()}
    write_parquet(tmp_path / "validation-0.parquet", [row])
    with pytest.raises(UserError, match=r"question validation_Art_1: .*row 0: the column image_1 holds no image"):
        prepare(TASKS["mmmu"], tmp_path)


def test_a_judge_is_told_what_is_in_the_picture(tmp_path):
    row = COMMON | {"question_id": 1, "category": "conv", "caption": None, "gpt_answer": "A dog."}
    write_parquet(tmp_path / "train-0.parquet", [row])
    with pytest.raises(UserError, match="row 0: the caption is empty"):
        prepare(TASKS["llava_wild"], tmp_path)


def test_the_published_rule_can_score_every_question_too(tmp_path):
    write(tmp_path, "vizwiz", PEOPLE | {"answers": ["one", None]})
    with pytest.raises(UserError, match=r"no answer to the question 1\.jpg can be scored"):
        prepare(TASKS["vizwiz"], tmp_path)


def test_an_empty_reference_of_ocrbench_is_in_no_answer(tmp_path):
    write(tmp_path, "ocrbench", OCR | {"answer": ["z", ""]})
    assert run_task(Rule(lambda _: "b"), TASKS["ocrbench"], tmp_path, progress=False).scores["accuracy"] == 0
