"""MMVP, CV-Bench, AI2D and SEED-Bench: their files, prompts and scores by hand."""

import base64
import csv
import re
from functools import partial

import nasty_answers
import pytest
from helpers.bench_files import Rule, cell, image_bytes, write_image, write_json, write_lines, write_parquet

from fusion_jax.errors import UserError
from fusion_jax.evals import ai2d, choices, cv_bench, mmvp, scienceqa, seed
from fusion_jax.evals.runner import run_task
from fusion_jax.evals.task import Question

run = partial(run_task, progress=False)
LETTER = "Answer with the option's letter from the given choices directly."


def mmvp_folder(folder, answers):
    folder.mkdir(parents=True)
    with open(folder / "Questions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["lndex", "Question", "Options", "Correct Answer"])
        for n, answer in enumerate(answers, 1):
            writer.writerow([n, f"Eyes {n}?", "(a) Open (b) Closed", answer])
            write_image(folder / "MMVP Images" / f"{n}.jpg")


SCRIPTED = {
    "A": (
        "A",
        " A\n",
        "(A)",
        "A.",
        "A, or B",
        "A. Open",
        "Answer: A.",
        "The answer is (A)",
        "I see (A) and (B)",
        "A\nB",
    ),
    "B": ("B", "(b) or (B)", "USB.", "Option B."),
    "": ("a", "A)", "A: Open", "Answer: A", "The answer is A", "Open", "a.", "G.", ""),
}


@pytest.mark.parametrize("task", [mmvp, cv_bench, scienceqa])
def test_letters_are_read_as_in_the_scripts_of_the_published_figures(task):
    question = Question("1", "", "A", about={"options": ["Open", "Closed"]})
    for letter, every in SCRIPTED.items():
        for answer in every:
            said, score = task.score(question, answer)
            assert (said.replace("FAILED", ""), score) == (letter, float(letter == "A")), answer


def test_any_answer_is_read_as_by_the_published_expression():
    for answer in nasty_answers.answers(2000, seed=1):
        matches = re.findall(r"([A-F])\.|([A-F]),|([A-F])\n|\(([A-F])\)", answer)
        letter = answer if answer in [*"ABCDEF"] else "".join(matches[0]) if matches else ""
        assert choices.scripted_letter(answer) == letter, answer


def test_mmvp_counts_pairs(tmp_path):
    mmvp_folder(tmp_path / "MMVP", ["(a)", "(b)", "(a)", "(b)"])
    result = run(Rule(lambda w: "B" if "2?" in w else "A"), mmvp.TASK, tmp_path)
    figures = {"pair_accuracy": 50.0, "accuracy": 75.0, "accuracy (rule=published)": 75.0}
    assert result.scores == {"questions": 4, **figures}
    assert result.predictions[0].question.prompt == f"Eyes 1? Options:\nA. Open\nB. Closed\n{LETTER}"


def cv_rows():
    sources = [("2D", "Count", "ADE20K")] * 2 + [("2D", "Relation", "COCO")] + [("3D", "Depth", "Omni3D")] * 2
    return [
        {"idx": n, "type": kind, "task": task, "source": source, "question": "How many?", "choices": ["1", "2"]}
        | {"prompt": "How many? Select from (A) 1 (B) 2", "answer": "(B)" if n else "(A)"}
        for n, (kind, task, source) in enumerate(sources)
    ]


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_cv_bench_is_the_mean_of_its_sides_and_sources(tmp_path, form):
    """Always B: ADE20K 1 of 2, COCO 1 of 1, Omni3D 2 of 2; 2D 75, 3D 100."""
    for side in ("2D", "3D"):
        rows = [row for row in cv_rows() if row["type"] == side]
        if form == "parquet":
            rows = [{**row, "image": cell()} for row in rows]
            write_parquet(tmp_path / "CVBench" / f"test_{side.lower()}.parquet", rows)
        else:
            rows = [{**row, "filename": f"img/{side}/{row['idx']}.png"} for row in rows]
            write_lines(tmp_path / "CVBench" / f"test_{side.lower()}.jsonl", rows)
            for row in rows:
                write_image(tmp_path / "CVBench" / row["filename"])
    scores = run(Rule(lambda _: "(B)"), cv_bench.TASK, tmp_path).scores
    assert (scores["2D"], scores["3D"], scores["accuracy"]) == (75.0, 100.0, 87.5)
    assert scores["by_source"] == {"ADE20K": 50.0, "COCO": 100.0, "Omni3D": 100.0}
    assert scores["by_task"] == {"Count": 50.0, "Depth": 100.0, "Relation": 100.0}


@pytest.mark.parametrize(
    "answer, read",
    [
        *[(said, "b") for said in ("B", "B.", "B. the sun", "(B)", "b", "B_")],
        (" C. moon", "c"),
        ("the sun", "the sun"),
        ("( B", " b"),  # only marks of ASCII go, and no space
        ("“B”", "“b”"),
    ],
)
def test_ai2d_reads_answers(answer, read):
    assert ai2d.parse(answer) == read


def ai2d_folder(folder, form):
    options = ["root", "leaf", "stem"]
    if form == "parquet":
        rows = [{"question": "Which?", "options": options, "answer": a, "image": cell()} for a in ("1", "2")]
        write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows)
    elif form == "tsv":
        picture = base64.b64encode(image_bytes()).decode()
        lines = ["index\tquestion\tA\tB\tC\tD\tanswer\timage"]
        lines += [f"{n}\tWhich?\troot\tleaf\tstem\t\t{a}\t{picture}" for n, a in enumerate("BC")]
        folder.mkdir(exist_ok=True)
        (folder / "AI2D_TEST.tsv").write_text("\n".join(lines) + "\n")
    else:
        for name, right in (("0", 1), ("3", 0), ("7", 2)):
            question = {"answerTexts": options, "correctAnswer": right, "questionId": f"{name}.png-0"}
            write_json(folder / "questions" / f"{name}.png.json", {"questions": {"Which?": question}})
            write_image(folder / "images" / f"{name}.png")
        (folder / "ai2d_test_ids.csv").write_text("0\n7\n")


@pytest.mark.parametrize("form", ["parquet", "tsv", "archive"])
def test_ai2d_in_all_three_formats(tmp_path, form):
    ai2d_folder(tmp_path, form)
    result = run(Rule(lambda _: "B. leaf"), ai2d.TASK, tmp_path)
    assert [p.question.reference for p in result.predictions] == ["B", "C"]
    assert result.scores == {"questions": 2, "accuracy": 50.0}
    assert result.predictions[0].question.prompt == f"Which?\nA. root\nB. leaf\nC. stem\n{LETTER}"


def seed_rows():
    common = {f"choice_{letter}": f"option {letter}" for letter in "abcd"}
    return [
        {"question_id": str(n), "question": "Where?", "answer": answer, "data_type": kind, "question_type_id": number}
        | common
        for n, (answer, kind, number) in enumerate([("A", "image", 1), ("B", "image", 1), ("A", "image", 2)])
    ] + [{"question_id": "v", "question": "?", "answer": "A", "data_type": "video", "question_type_id": 10, **common}]


def test_seed_takes_images_only_and_the_first_letter(tmp_path):
    rows = [{**row, "data_id": f"1_{n}"} for n, row in enumerate(seed_rows())]
    names = {"Scene Understanding": 1, "Instance Identity": 2, "Action": 10}
    write_json(tmp_path / "seed_bench" / "SEED-Bench.json", {"questions": rows, "question_type": names})
    for n in range(3):
        write_image(tmp_path / "seed_bench" / "SEED-Bench-image" / f"1_{n}.png")
        (tmp_path / "seed_bench" / "SEED-Bench-image" / f"1_{n}.png").rename(
            tmp_path / "seed_bench" / "SEED-Bench-image" / f"1_{n}"
        )
    result = run(Rule(lambda _: "A. option a"), seed.TASK, tmp_path)
    assert result.scores["questions"] == 3 and result.scores["accuracy"] == pytest.approx(200 / 3)
    assert result.scores["by_category"] == {"Instance Identity": 100.0, "Scene Understanding": 50.0}
    prompt = "Where?\nA. option a\nB. option b\nC. option c\nD. option d\n" + LETTER
    assert result.predictions[0].question.prompt == prompt


def test_seed_from_parquet(tmp_path):
    write_parquet(tmp_path / "test-00000-of-00001.parquet", [{**row, "image": [cell()]} for row in seed_rows()])
    assert run(Rule(lambda _: "a"), seed.TASK, tmp_path).scores["accuracy"] == pytest.approx(200 / 3)


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "test.parquet").write_bytes(b"not at all")
    with pytest.raises(UserError, match=r"test.parquet is not a Parquet file"):
        run(Rule(str), seed.TASK, tmp_path)
