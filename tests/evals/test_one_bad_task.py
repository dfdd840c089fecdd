"""Several tasks in one run, one of them bad: all are read first, and the others keep their answers and figures."""

import csv
import json

import pytest
from helpers.bench_files import Rule, cell, image_bytes, pope_folder, write_image, write_json, write_parquet

from fusion_jax.errors import RunAgain
from fusion_jax.evals import published, report, summary
from fusion_jax.evals.registry import TASKS, find_tasks
from fusion_jax.evals.runner import Output
from fusion_jax.evals.several import answer_tasks, failure, prepare_tasks

HEADER = {"checkpoint": "c0ffee", "folder": "runs/a/100"}
NAMES = ["chartqa", "mmvet", "pope", "realworldqa", "scienceqa"]


@pytest.fixture
def data(tmp_path):
    """pope and scienceqa are good; realworldqa has a bad index, chartqa an image that is damaged behind its header; and
    mmvet needs a judge."""
    folder = tmp_path / "data"
    pope_folder(folder / "pope", {"random": ["yes"], "popular": ["no"], "adversarial": ["yes"]})
    science = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": cell()}
    write_parquet(folder / "scienceqa" / "ScienceQA-IMG" / "test-0.parquet", [science] * 2)
    (folder / "realworldqa").mkdir()
    (folder / "realworldqa" / "RealWorldQA.tsv").write_text("index\tquestion\tanswer\timage\n0.0\t?\tA\tx\n")
    damaged = {"bytes": image_bytes(size=(300, 300), kind="JPEG")[:-600], "path": "a.jpg"}
    rows = [{"type": "human_test", "question": f"{n}?", "answer": "1", "image": cell()} for n in range(5)]
    write_parquet(folder / "chartqa" / "test-0.parquet", [*rows, rows[0] | {"question": "last?", "image": damaged}])
    vet = {"imagename": "a.png", "question": "x?", "answer": "a dog", "capability": ["rec"]}
    write_json(folder / "mm-vet" / "mm-vet.json", {"v1_0": vet})
    write_image(folder / "mm-vet" / "images" / "a.png")
    return folder


class Opens(Rule):
    """Opens images, as a model does."""

    def answer(self, prompts):
        from fusion_jax.data.image import load_image

        for prompt in prompts:
            for image in prompt.images:
                load_image(image, prompt.where)
        return super().answer(prompts)


def run(data, output, judge=None, answerer=None, names=NAMES):
    failed, results = {}, {}
    answerer = answerer or Opens(lambda w: "B", rows=2)
    prepared = prepare_tasks(find_tasks(names), data, failed)
    assert not answerer.asked
    for one, result in answer_tasks(answerer, prepared, failed, output, judge, progress=False):
        results[one.task.name] = result
        report.write(output.folder, HEADER, [result] if result else [], failed)
    return results, failed


def test_the_others_have_their_figures_after_each_task(data, tmp_path, endpoint):
    output = Output(tmp_path / "out", HEADER)
    server = endpoint(401)
    results, failed = run(data, output, server.judge())
    assert list(failed) == ["realworldqa", "chartqa", "mmvet"]
    assert "row 0: the index '0.0' is not a whole number" in failed["realworldqa"]
    assert "chartqa, question 5: cannot decode the image" in failed["chartqa"] and "status 401" in failed["mmvet"]
    assert results["pope"].scores["questions"] == 3 and results["scienceqa"].scores["image_accuracy"] == 100.0
    there = json.loads((output.folder / "summary.json").read_text())["tasks"]
    assert "error" in there["mmvet"] and "scores" not in there["mmvet"] and "error" not in there["pope"]
    assert there["scienceqa"]["data"]["config"] == "config ScienceQA-IMG, split test"
    assert there["scienceqa"]["data"]["files"] == ["ScienceQA-IMG/test-0.parquet"]
    text = (output.folder / "summary.md").read_text()
    assert text.index("## Failed") < text.index("| POPE") and "- MM-Vet: The judge grader at" in text
    assert "- ScienceQA: config ScienceQA-IMG, split test: ScienceQA-IMG/test-0.parquet in " in text
    page = (output.folder / "report.html").read_text()
    assert "RealWorldQA failed: realworldqa: " in page and '<a href="#pope">' in page

    # Mended and started again, only what is missing is asked; a good result takes the error away.
    rows = [{"type": "human_test", "question": f"{n}?", "answer": "1", "image": cell()} for n in range(6)]
    write_parquet(data / "chartqa" / "test-0.parquet", rows)
    again = Opens(lambda w: "1")
    server.replies = ["1.0"]
    results, failed = run(data, output, server.judge(), again)
    assert list(failed) == ["realworldqa"] and results["mmvet"].scores["total"] == 100.0
    assert len(again.asked) == 2 and all("?\n" in words for words in again.asked)
    there = json.loads((output.folder / "summary.json").read_text())["tasks"]
    assert "error" not in there["mmvet"] and there["chartqa"]["scores"]["questions"] == 6


def test_earlier_figures_stay_beside_a_later_error(data, tmp_path):
    output = Output(tmp_path / "out", HEADER)
    run(data, output, names=["pope"])
    (data / "pope" / "coco_pope_random.json").unlink()
    _, failed = run(data, output, names=["pope", "scienceqa"])
    assert "no file coco_pope_random.json" in failed["pope"]
    report.write(output.folder, HEADER, [], failed)
    there = json.loads((output.folder / "summary.json").read_text())["tasks"]["pope"]
    assert there["scores"]["questions"] == 3 and "no file coco_pope_random.json" in there["error"]


def test_a_fault_of_the_program_is_logged_with_its_lines_and_ends_one_task(data, tmp_path, caplog, monkeypatch):
    def fails(predictions):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("fusion_jax.evals.pope.measure", fails)
    results, failed = run(data, Output(tmp_path / "out", HEADER), names=["pope", "scienceqa"])
    assert failed == {"pope": "ZeroDivisionError: division by zero"} and results["scienceqa"] is not None
    assert "Traceback" in caplog.text and "pope stopped with an unexpected error" in caplog.text


def test_what_ends_the_command_is_no_tasks_failure(data, tmp_path):
    def stops(_):
        raise RunAgain("stopped")

    with pytest.raises(RunAgain):
        run(data, Output(tmp_path / "out", HEADER), answerer=Opens(stops), names=["pope", "scienceqa"])


def test_the_sentence_of_a_run_that_is_not_whole():
    assert str(failure({"pope": "pope: no file."}, 1)) == "pope: no file."
    said = str(failure({"pope": "pope: no file.", "mmvet": "The judge sleeps."}, 3))
    assert said == "2 of 3 tasks failed: pope: no file. mmvet: The judge sleeps."


def test_the_whole_published_table_stands_beside_ones_own():
    scores = {
        "mme": {"questions": 2374, "perception": 1500.0, "cognition": 300.0},
        "ocrbench": {"questions": 1000, "final_score": 550, "accuracy": 55.0},
        "mmvp": {"questions": 300, "pair_accuracy": 40.0, "accuracy": 70.0},
        "pope_published": {"questions": 9000, "f1": 90.0},
        "pope": {"questions": 9000, "f1": 80.0, "accuracy": 81.0},
        "cv_bench": {"questions": 2638, "accuracy": 60.0, "accuracy (rule=published)": 61.0},
        "mmvet": {"questions": 218},
        "infovqa": {"questions": 2801, "anls": 30.0},
    }
    tasks = {name: {"scores": figures} for name, figures in scores.items() if name in TASKS}
    heads, lines = summary.table({**HEADER, "tasks": tasks})
    rows = {line.cells[0]: dict(zip(heads, line.cells)) for line in reversed(lines)}
    assert len(published.ROWS) == 23 and {r.title for r in published.ROWS} <= rows.keys()
    assert {r.task for r in published.ROWS} <= TASKS.keys()
    assert rows["MME perception"]["this checkpoint"] == "1500.0" and rows["MME cognition"]["FUSION-L 8B"] == "338.9"
    assert rows["OCRBench"]["this checkpoint"] == "55.0" and rows["OCRBench"]["FUSION-X 8B"] == "66.6"
    assert rows["MMVP"]["this checkpoint"] == "70.0" and rows["MMVP"]["FLARE-X 8B"] == ""
    assert rows["CV-Bench"]["this checkpoint"] == "61.0" and rows["CV-Bench"]["figure"] == "accuracy (rule=published)"
    assert rows["MM-Vet"]["this checkpoint"] == "" and rows["MM-Vet"]["FLARE-X 3B"] == "61.9"
    extra = [line.cells[:3] for line in lines[1 + len(published.ROWS) :]]
    assert ["MMVP", "pair_accuracy", "40.0"] in extra and ["OCRBench", "final_score", "550"] in extra
    assert rows["InfographicVQA (val)"]["this checkpoint"] == "30.0"
    assert rows["visual tokens"]["FUSION-L 3B"] == "308"
    pope = next(row for row in published.ROWS if row.task == "pope")
    assert pope.own(scores) == (90.0, "pope_published", "f1")
    assert all(len(row.values) == len(published.MODELS) == 9 for row in published.ROWS)
    assert sum(value is not None for row in published.ROWS for value in row.values) == 23 * 6 + 7 * 3


def test_a_part_is_seen_to_be_one_where_no_release_has_a_known_size(tmp_path):
    """MMBench's releases differ in their rotations, and a held-out question is also asked with another image."""
    row = {"question": "Which?", "A": "a", "B": "b", "answer": "A", "image": cell()}
    write_parquet(tmp_path / "data" / "mmbench_en" / "dev-0.parquet", [row | {"index": n} for n in range(3)])
    records = [
        {"id": str(n), "image": "a.png", "conversations": [{"from": "human", "value": "<image>\n?"}]} for n in range(4)
    ]
    for record in records:
        record["conversations"].append({"from": "gpt", "value": "b"})
    write_json(tmp_path / "data" / "held_out" / "held_out.json", records)
    write_image(tmp_path / "data" / "held_out" / "a.png")
    output, questions = Output(tmp_path / "out", HEADER), {}
    for limit in (4, 0):
        prepared = prepare_tasks(find_tasks(["mmbench_en_dev", "held_out"]), tmp_path / "data", {}, limit)
        results = [result for _, result in answer_tasks(Rule(lambda _: "A"), prepared, {}, output, progress=False)]
        there, _ = summary.write(output.folder, HEADER, results, {})
        questions[limit] = {line.task: line.cells[-1] for line in summary.table(there)[1]}
    assert [questions[n]["mmbench_en_dev"] for n in (4, 0)] == ["4 of 6", "6"]
    assert [questions[n]["held_out"] for n in (4, 0)] == ["2 of 4", "4"]


def test_a_table_for_spreadsheets(data, tmp_path):
    output = Output(tmp_path / "out", HEADER)
    run(data, output, names=["pope"])
    with open(output.folder / "summary.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][:4] == ["task", "benchmark", "figure", "this checkpoint"] and len({len(row) for row in rows}) == 1
    assert next(row for row in rows if row[0] == "pope")[-1] == "3 of 9000 or 8910"
