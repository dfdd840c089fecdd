"""Answers, verdicts and benchmark files that nobody expects: they cost no time, no file and no rerun."""

import dataclasses
import json
from pathlib import Path

import pytest
from helpers.bench_files import Rule, write_image, write_json
from helpers.cpu_time import takes_less_than
from helpers.judge_endpoint import Endpoint

from fusion_jax.errors import UserError
from fusion_jax.evals import (
    ai2d,
    chartqa,
    choices,
    docvqa,
    files,
    hallusion,
    mathvista,
    mme,
    mmmu,
    mmstar,
    mmvet,
    mmvp,
    pope,
    predictions,
    realworldqa,
    report,
    scienceqa,
    vqa,
)
from fusion_jax.evals.runner import Output, Result, run_task
from fusion_jax.evals.task import Prediction, Question

ODD = "1.0 \ud800\x00"
OPTIONS = ["a brown dog on the lawn", "8/11"]
LONG = [
    "9",
    "1.",
    "1,",
    ",111",
    "-",
    "is ",
    "= ",
    'The answer is "',
    "[1",
    "(a",
    "A. ",
    "answer: ",
    "\n",
    " ",
    "é",
    "a b ",
]


def about(question_type, answer_type):
    return {"question_type": question_type, "answer_type": answer_type, "options": OPTIONS, "precision": 2}


def mathvista_reads(kind, answer_type):
    question = Question("1", "?", "x", about=about(kind, answer_type))
    return lambda answer: mathvista.score(question, answer)


READERS = {
    "ai2d": ai2d.parse,
    "chartqa": lambda answer: chartqa.relaxed(answer, "12%"),
    "letter": lambda answer: choices.find_letter(answer, dict(zip("AB", OPTIONS))),
    "docvqa": lambda answer: docvqa.anls(answer, OPTIONS),
    "hallusion": lambda answer: hallusion.score(
        Question("1", "?", "yes", about={"category": "VS", "figure_id": "0"}), answer
    ),
    "mathvista, choice": mathvista_reads("multi_choice", "text"),
    "mathvista, integer": mathvista_reads("free_form", "integer"),
    "mathvista, float": mathvista_reads("free_form", "float"),
    "mathvista, list": mathvista_reads("free_form", "list"),
    "mme": lambda answer: mme.score(Question("1", "?", "yes"), answer),
    "mmmu, choice": lambda answer: mmmu.parse_choice(answer, OPTIONS, "1"),
    "mmmu, open": lambda answer: mmmu.matches(mmmu.parse_open(answer), OPTIONS),
    "mmstar": lambda answer: mmstar.score(Question("1", "?", "A"), answer),
    "mmvp": lambda answer: mmvp.score(Question("1", "?", "A", about={"options": OPTIONS}), answer),
    "pope": pope.parse,
    "realworldqa": lambda answer: realworldqa.parse(answer, "?\nA. dog\nB. cat"),
    "scienceqa": lambda answer: scienceqa.parse(answer, OPTIONS),
    "vqa": vqa.normalise,
}


@pytest.mark.parametrize("name", READERS)
def test_long_answers_are_read_in_a_moment(name):
    for piece in LONG:
        with takes_less_than(2, piece):
            READERS[name](piece * (200_000 // len(piece)) + "x\x00")


@pytest.fixture
def data(tmp_path):
    row = {"imagename": "a.png", "question": "x?\ud800", "answer": "a", "capability": ["ocr"]}
    write_json(tmp_path / "mm-vet" / "mm-vet.json", {"v1_\udfff": row})
    write_image(tmp_path / "mm-vet" / "images" / "a.png")
    return tmp_path


def test_half_a_surrogate_pair_ends_neither_an_evaluation_nor_its_rerun(data):
    """In the benchmark's file, the judge's reply, and verdicts that an earlier run has kept."""
    output, endpoint = Output(data / "out", {"checkpoint": "x", "folder": "y"}), Endpoint([ODD])
    for _ in range(2):
        result = run_task(Rule(lambda _: "dog"), mmvet.TASK, data, output, judge=endpoint.judge(), progress=False)
        assert result.scores["total"] == 100.0 and result.predictions[0].parsed == "1.0 ?\x00"
    assert len(endpoint.requests) == 1
    kept = data / "out" / "mmvet" / "verdicts.jsonl"
    kept.write_text(kept.read_text().replace("?", "\\ud800"))
    result = run_task(Rule(lambda _: "dog"), mmvet.TASK, data, output, judge=endpoint.judge(), progress=False)
    assert len(endpoint.requests) == 1
    row = json.loads((data / "out" / "mmvet" / "predictions.jsonl").read_text("utf-8"))
    assert (row["id"], row["question"], row["parsed"]) == ("v1_?", "x??", "1.0 ?\x00")
    wrong = dataclasses.replace(result, predictions=[dataclasses.replace(result.predictions[0], score=0.0)])
    for path in report.write(data / "out", output.header, [wrong]):
        path.read_text("utf-8")
    endpoint.server.shutdown()
    endpoint.server.server_close()


def test_every_file_takes_every_text(tmp_path):
    rows = [{"id": ODD, "answer": ODD}]
    predictions.write_rows(tmp_path / "rows.jsonl", rows)
    assert json.loads((tmp_path / "rows.jsonl").read_text("utf-8"))["id"] == "1.0 ?\x00"
    part = predictions.Part(tmp_path, 0, 1, {"checkpoint": ODD})
    part.add(ODD, ODD, ODD)
    part.close()
    assert predictions.read_answers(tmp_path) == {("1.0 ?\x00", predictions.digest(ODD)): "1.0 ?\x00"}
    written = [*files.write_json(tmp_path / "a.json", rows), *files.write_table(tmp_path / "t", [ODD], [[ODD], [1]])]
    assert "?" in written[0].read_text("utf-8") and written[1].read_text("utf-8").count("1.0 ?") == 2
    question = Question("1", "?", ODD, text=ODD)
    result = Result(mmvet.TASK, [Prediction(question, ODD, ODD, 0.0)], {"questions": 1, "by": {ODD: 1.0}}, 0.0)
    (tmp_path / "mmvet").mkdir()
    for path in report.write(tmp_path, {"checkpoint": "x", "folder": ODD}, [result]):
        path.read_text("utf-8")


def test_a_table_for_people_takes_every_text(tmp_path):
    openpyxl = pytest.importorskip("openpyxl", reason="needs openpyxl: pip install -e '.[eval]'")
    _, xlsx = files.write_table(tmp_path / "t", ["a"], [[ODD], ["x" * 100_000]])
    assert openpyxl.load_workbook(xlsx).active["A2"].value == "1.0 ?"


@pytest.mark.parametrize(
    ("options", "answer", "message"),
    [
        ("(a) Open (b) Closed", "(c)", "question 1: the answer 'C' is not one of its 2 options"),
        ("", "(a)", "Index 1 has 0 options"),
        ("(a) Open", "(a)", "Index 1 has 1 options"),
    ],
)
def test_a_question_that_cannot_be_scored_is_named_before_any_is_asked(tmp_path, options, answer, message):
    row = {"Index": "1", "Question": "Open?", "Options": options, "Correct Answer": answer}
    folder: Path = tmp_path / "MMVP"
    write_image(folder / "MMVP Images" / "1.jpg")
    (folder / "Questions.csv").write_text(",".join(row) + "\n" + ",".join(f'"{cell}"' for cell in row.values()) + "\n")
    model = Rule(lambda _: pytest.fail("asked"))
    with pytest.raises(UserError, match=message):
        run_task(model, mmvp.TASK, tmp_path, progress=False)


def test_the_distance_of_a_long_answer_is_the_right_one():
    for a, b, steps in (("", "", 0), ("", "ab", 2), ("kitten", "sitting", 3), ("a" * 300, "b" * 200, 300)):
        assert docvqa.edit_distance(a, b) == docvqa.edit_distance(b, a) == steps
    assert docvqa.edit_distance("x" * 1000 + "flaw" + "x" * 1000, "x" * 1000 + "lawn" + "x" * 1000) == 2
