"""Cells that hold nothing, in the benchmarks besides MMBench: nothing is asked or scored that nobody wrote."""

import base64

import pytest
from helpers.bench_files import Rule, cell, image_bytes, write_image, write_json, write_lines, write_parquet

from fusion_jax.errors import UserError
from fusion_jax.evals import ai2d, chartqa, mathvista, mmmu, pope, realworldqa, scienceqa, seed
from fusion_jax.evals.choices import is_blank, is_missing
from fusion_jax.evals.runner import run_task
from fusion_jax.evals.task import Prediction, Question, percent_by

PICTURE = base64.b64encode(image_bytes()).decode()
NAN = float("nan")


def test_what_is_blank_and_what_says_so():
    for value in (None, NAN, "", " \t"):
        assert is_blank(value) and is_missing(value)
    for value in ("nan", "None", " none "):
        assert not is_blank(value) and is_missing(value)
    for value in (0, 0.0, False, "N", "no", [], ["nan"]):
        assert not is_blank(value) and not is_missing(value)


def table(path, columns, *rows):
    lines = ["\t".join(map(str, line)) for line in (columns, *rows)]
    path.write_text("\n".join(lines) + "\n")


AI2D = ("index", "question", "A", "B", "C", "D", "answer", "image")


def test_ai2d(tmp_path):
    path = tmp_path / "AI2D_TEST.tsv"
    table(
        path,
        AI2D,
        (1, "Which?", "leaf", "None", "root", "", "C", PICTURE),
        (2, "What?", "a", "b", "nan", "", "B", PICTURE),
        (3, "Who?", "leaf", "", "root", "none", "D", PICTURE),
    )
    first, second, third = ai2d.read(tmp_path)
    assert first.prompt.startswith("Which?\nA. leaf\nB. None\nC. root\nAnswer") and first.reference == "C"
    assert second.about["options"] == {"A": "a", "B": "b", "C": "nan"}
    assert third.prompt.startswith("Who?\nA. leaf\nC. root\nD. none\nAnswer") and third.reference == "D"
    for cells, message in (
        (("leaf", "", "root", "", "B"), "index 1: the answer 'B' is not one of its 2 options"),
        (("leaf", "stem", "", "", ""), "index 1: the answer '' is not one of its 2 options"),
        (("leaf", "stem", "", "", "D"), "index 1: the answer 'D' is not one of its 2 options"),
    ):
        table(path, AI2D, (1, "Which?", *cells, PICTURE))
        with pytest.raises(UserError, match=message):
            run_task(Rule(str), ai2d.TASK, tmp_path, progress=False)


def test_realworldqa(tmp_path):
    rows = [(1, "How many?", "", "", "", "", "3", PICTURE), (2, "Where?", "None", "left", "right", "", "B", PICTURE)]
    table(tmp_path / "RealWorldQA.tsv", AI2D, *rows)
    questions = realworldqa.read(tmp_path)
    assert questions[0].prompt == "How many?"
    assert questions[1].prompt.startswith("Where?\nA. None\nB. left\nC. right\n")
    table(tmp_path / "RealWorldQA.tsv", AI2D, (2, "Where?", "up", "down", "", "", "C", PICTURE))
    with pytest.raises(UserError, match="the answer 'C' is not one of its 2 options"):
        run_task(Rule(str), realworldqa.TASK, tmp_path, progress=False)


def test_scienceqa(tmp_path):
    row = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "nan", "image": cell()}
    write_parquet(
        tmp_path / "test-0.parquet", [row, row | {"hint": None}, row | {"hint": " "}, row | {"hint": "Look."}]
    )
    assert [q.prompt.startswith("Which?") for q in scienceqa.read(tmp_path)] == [True, True, True, False]
    for n, (changes, message) in enumerate(
        [
            ({"question": None}, r"test-0\.parquet, row 0: question is empty"),
            ({"choices": ["a", None]}, "question 0: an option is empty"),
            ({"answer": 4}, "question 0: the answer 'E' is not one of its 2 options"),
        ]
    ):
        write_parquet(tmp_path / str(n) / "test-0.parquet", [row | changes])
        with pytest.raises(UserError, match=message):
            run_task(Rule(str), scienceqa.TASK, tmp_path / str(n), progress=False)


def test_seed(tmp_path):
    row = {f"choice_{letter}": letter * 3 for letter in "abc"} | {"choice_d": None, "answer": "A", "data_type": "image"}
    row |= {"question_id": 1, "question": "Who?", "data_id": "1.png"}
    write_image(tmp_path / "SEED-Bench-image" / "1.png")
    write_json(tmp_path / "SEED-Bench.json", {"questions": [row]})
    with pytest.raises(UserError, match="seed_image, question 1: an option is empty"):
        run_task(Rule(str), seed.TASK, tmp_path, progress=False)


def test_an_empty_label_of_pope_is_no_yes(tmp_path):
    write_image(tmp_path / "val2014" / "1.jpg")
    for split in pope.SPLITS:
        write_lines(tmp_path / f"coco_pope_{split}.json", [{"image": "1.jpg", "text": "Is it?", "label": ""}])
    with pytest.raises(UserError, match=r"coco_pope_random\.json, line 1: label is empty"):
        run_task(Rule(str), pope.TASK, tmp_path, progress=False)


def test_an_empty_label_of_chartqa_is_not_none(tmp_path):
    write_image(tmp_path / "test" / "png" / "1.png")
    for kind, label in (("human", None), ("augmented", "2")):
        write_json(
            tmp_path / "test" / f"test_{kind}.json", [{"imgname": "1.png", "query": "How many?", "label": label}]
        )
    with pytest.raises(UserError, match=r"test_human\.json, record 0: label is empty"):
        run_task(Rule(str), chartqa.TASK, tmp_path, progress=False)


def test_mathvista_and_mmmu(tmp_path):
    row = {"pid": "1", "question": "How long?", "choices": None, "unit": "nan", "precision": NAN, "answer": "3"}
    row |= {"question_type": "free_form", "answer_type": "integer", "query": NAN, "metadata": None}
    made = mathvista._question(row, None)
    assert made.prompt.endswith("Question: How long?") and made.about["precision"] == 0 and made.reference == "3"
    assert mathvista._question(row | {"answer": NAN}, None).reference is None
    values = {"id": "validation_Art_1", "question": "Who?", "options": "[]", "answer": "None", "question_type": "open"}
    references = []
    for n, answer in enumerate(("None", " ", "?")):
        folder = tmp_path / str(n)
        write_parquet(folder / "validation-0.parquet", [values | {"answer": answer}])
        references.append(mmmu.read("validation", folder)[0].reference)
    assert references == ["None", None, None]


def test_rows_that_are_too_short_have_no_question(tmp_path):
    (tmp_path / "AI2D_TEST.tsv").write_text(
        "\t".join(("index", "image", "A", "B", "answer", "question")) + "\n1\tx\ta\n"
    )
    with pytest.raises(UserError, match=r"AI2D_TEST\.tsv, row 0: question is empty"):
        ai2d.read(tmp_path)


def test_an_empty_category_has_no_name():
    cells = (None, NAN, "", "None", "math")
    rows = [
        Prediction(Question(str(k), "", "A", about={"category": cell}), "A", "A", 1.0) for k, cell in enumerate(cells)
    ]
    assert percent_by(rows, "category") == {"": 100.0, "math": 100.0}
