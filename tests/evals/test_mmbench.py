"""MMBench: circular passes, images that other rows hold, reading of answers, and the server's file."""

import base64
import csv

import pytest
from helpers.bench_files import Rule, cell, image_bytes, write_parquet

from fusion_jax.errors import UserError
from fusion_jax.evals.choices import find_letter
from fusion_jax.evals.registry import TASKS
from fusion_jax.evals.runner import record, run_task

DEV, TEST = TASKS["mmbench_en_dev"], TASKS["mmbench_en_test"]
COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "image")
PICTURE = base64.b64encode(image_bytes()).decode()


def row(index, answer, options=("cat", "dog", "cow", ""), hint="", category="animals", image=PICTURE):
    return dict(zip(COLUMNS, (index, f"Which one is {index}?", hint, *options, answer, category, "x", image)))


def write_tsv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


OPTIONS = {"A": "a red bus", "B": "a dog", "C": "the sky"}


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("B.", "B"),
        ("B is what I see in it", ""),  # not one of the last four words
        ("In it I see what is B", "B"),
        ("(B) a dog", "B"),
        ("The answer is B: a dog", "B"),
        ("A or B", ""),  # two letters, and no text
        ("I see a dog", "B"),
        ("A DOG", "A"),  # the article is read as the letter, as the official rule does
        ("a dog and the sky", ""),
        ("b", ""),
        ("Cannot determine the answer", "Z"),
        ("Z", "Z"),
        ("a dog " * 20, ""),  # too long to be searched for texts
        ("", ""),
    ],
)
def test_letters_are_found_by_the_official_rule(answer, letter):
    assert find_letter(answer, OPTIONS) == letter


def test_circular_and_vanilla_from_a_file_with_rotations(tmp_path):
    """Question 7 is right in both passes, question 8 in the first only; its second image is the first one's index."""
    rows = [
        row(7, "A", hint="Look closely."),
        row(8, "B", category="count"),
        row(1_000_007, "C", options=("dog", "cow", "cat", "")),
        row(1_000_008, "A", options=("dog", "cow", "cat", ""), category="count", image="8"),
    ]
    write_tsv(tmp_path / "mmbench" / "mmbench_dev_20230712.tsv", rows)
    answerer = Rule(lambda w: "C" if "1000007" in w else "A" if "is 7" in w else "B")
    result = run_task(answerer, DEV, tmp_path, progress=False)
    assert result.scores == {
        "questions": 4,
        "circular": 50.0,
        "vanilla": 100.0,
        "by_category": {"animals": 100.0, "count": 0.0},
    }
    first = result.predictions[0].question
    assert first.prompt == (
        "Look closely.\nWhich one is 7?\nA. cat\nB. dog\nC. cow\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert {record(DEV, p.question).images[0] for p in result.predictions} == {image_bytes()}


def test_rotations_are_made_where_the_file_has_none(tmp_path):
    write_tsv(tmp_path / "MMBench_DEV_EN.tsv", [row(3, "B"), row(4, "B")])

    def always_the_dog(prompt):
        return "D" if "is 4" in prompt and "A. dog" in prompt else next(x for x in "ABC" if f"{x}. dog" in prompt)

    result = run_task(Rule(always_the_dog), DEV, tmp_path, progress=False)
    assert result.scores["questions"] == 6 and result.scores["circular"] == 50.0 and result.scores["vanilla"] == 100.0
    assert [p.question.reference for p in result.predictions] == ["B", "A", "C", "B", "A", "C"]


def test_limit_keeps_all_passes_of_a_question(tmp_path):
    write_tsv(tmp_path / "MMBench_DEV_EN.tsv", [row(n, "B") for n in range(10)])
    result = run_task(Rule(lambda _: "B"), DEV, tmp_path, limit=6, progress=False)
    assert len({p.question.group for p in result.predictions}) == 2 and len(result.predictions) == 6


def test_test_split_becomes_a_submission(tmp_path):
    from fusion_jax.evals.runner import Output

    openpyxl = pytest.importorskip("openpyxl", reason="needs openpyxl: pip install 'fusion_jax[eval]'")
    rows = [row(5, "", options=("=1+1", "dog", "", "")), row(1_000_005, "", options=("dog", "=1+1", "", ""))]
    write_tsv(tmp_path / "data" / "MMBench_TEST_EN_legacy.tsv", rows)
    result = run_task(
        Rule(lambda _: "B"), TEST, tmp_path / "data", Output(tmp_path, {"checkpoint": "x"}), progress=False
    )
    assert result.scores == {"questions": 2}
    tsv, xlsx = result.files
    assert tsv.read_text().splitlines()[1] == "5\tWhich one is 5?\t=1+1\tdog\t\t\tB"
    values = list(openpyxl.load_workbook(xlsx).active.iter_rows(values_only=True))
    assert values[0] == ("index", "question", "A", "B", "C", "D", "prediction")
    assert values[1][0] == 5 and values[1][2] == "=1+1" and values[2][-1] == "B"
    assert openpyxl.load_workbook(xlsx).active["C2"].data_type == "s"  # no formula


def test_chinese_prompt_and_parquet(tmp_path):
    rows = [{**row(1, "B"), "image": cell()}, {**row(1_000_001, "A", ("dog", "cat", "nan", "nan")), "image": cell()}]
    write_parquet(tmp_path / "mmbench_cn" / "data" / "dev-00000-of-00001.parquet", rows)
    result = run_task(Rule(lambda w: "A" if "A. dog" in w else "B"), TASKS["mmbench_cn_dev"], tmp_path, progress=False)
    assert result.scores["circular"] == 100.0
    assert result.predictions[1].question.prompt.endswith("A. dog\nB. cat\n请直接回答选项字母。")


def test_test_file_as_dev_is_refused(tmp_path):
    write_tsv(tmp_path / "MMBench_DEV_EN.tsv", [row(1, "")])
    with pytest.raises(UserError, match="questions without an answer"):
        run_task(Rule(str), DEV, tmp_path, progress=False)


NONE = {  # options of some rows, and those that are asked
    "None is an answer like others": ([("None", "one", "two", "")], [("None", "one", "two")]),
    "and the last one": (
        [("one", "two", "three", "None"), ("a", "b", "", "")],
        [("one", "two", "three", "None"), ("a", "b")],
    ),
    "in lower case": ([("one", "none", "two", "")], [("one", "none", "two")]),
    "nan before others": ([("naan", "nan", "pita", "")], [("naan", "nan", "pita")]),
    "nan at the end": ([("a", "b", "c", "nan"), ("a", "b", "NaN", "")], [("a", "b", "c", "nan"), ("a", "b", "NaN")]),
    "nan for nothing": ([("a", "b", "c", "nan"), ("a", "b", "nan", "nan")], [("a", "b", "c"), ("a", "b")]),
    "words for nothing": (
        [("null", "NA", "none", "nan"), ("-", "False", "", "0")],
        [("null", "NA", "none", "nan"), ("-", "False", "0")],
    ),
    "a gap": ([("a", "b", "", "d")], [("a", "b", "d")]),
    "two": ([("", "yes", "", "no")], [("yes", "no")]),
    "None for nothing": ([("a", "b", "None", "None"), ("a", "b", "c", "None")], [("a", "b"), ("a", "b", "c")]),
    "white space": ([("a", "b", " ", "")], [("a", "b")]),
}


@pytest.mark.parametrize(("rows", "asked"), NONE.values(), ids=NONE)
def test_options_that_say_none(tmp_path, rows, asked):
    write_tsv(tmp_path / "MMBench_DEV_EN.tsv", [row(n, "B", options) for n, options in enumerate(rows)])
    questions = DEV.read(tmp_path)
    first = {q.group: tuple(q.about["options"].values()) for q in reversed(questions)}
    assert [first[str(n)] for n in range(len(rows))] == asked
    assert len(questions) == sum(map(len, asked))


def test_a_word_for_nothing_is_an_option_where_a_rotation_shows_it(tmp_path):
    rows = [row(1, "B", ("inf", "0", "nan", "")), row(1_000_001, "A", ("0", "nan", "inf", ""))]
    rows += [row(2, "C", ("inf", "0", "nan", "")), row(3, "A", ("a", "b", "nan", "nan"))]
    write_tsv(tmp_path / "MMBench_DEV_EN.tsv", rows)
    options = [tuple(q.about["options"].values()) for q in DEV.read(tmp_path)]
    assert options == [("inf", "0", "nan"), ("0", "nan", "inf"), ("inf", "0", "nan"), ("a", "b")]


def test_empty_cells_of_parquet(tmp_path):
    numbers = ((1.0, 2.0, None, None), (1.5, 2.0, 3.0, float("nan")))
    rows = [{**row(n, "B", options, hint=float("nan")), "image": cell()} for n, options in enumerate(numbers)]
    write_parquet(tmp_path / "mmbench_en" / "dev-0.parquet", rows)
    questions = DEV.read(tmp_path)
    assert [list(q.about["options"].values()) for q in questions[::2]][:2] == [["1", "2"], ["1.5", "2", "3"]]
    assert questions[0].prompt.startswith("Which one is 0?\nA. 1\nB. 2\nAnswer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"B": "", "C": "c"}, "MMBench_DEV_EN.tsv, index 1: the answer 'B' is not one of its 2 options"),
        ({"A": "", "B": "", "C": ""}, "index 1 has 0 options; a question has at least two"),
        ({"B": "", "C": ""}, "index 1 has 1 options"),
        ({"answer": "D"}, "index 1: the answer 'D' is not one of its 3 options"),
        ({"answer": "AB"}, "index 1: the answer 'AB' is not one of its 3 options"),
        ({"question": " "}, "row 0: question is empty"),
        ({"image": "x\ty\tz"}, "row 0 has more cells"),
    ],
)
def test_empty_cells_that_leave_no_question(tmp_path, changes, message):
    path = tmp_path / "MMBench_DEV_EN.tsv"
    write_tsv(path, [{**row(1, "B"), **changes}])
    path.write_text(path.read_text().replace('"', ""))
    with pytest.raises(UserError, match=message):
        run_task(Rule(str), DEV, tmp_path, progress=False)


def test_two_files_that_fit_are_refused(tmp_path):
    for name in ("MMBench_DEV_EN.tsv", "MMBench_DEV_EN_V11.tsv"):
        write_tsv(tmp_path / name, [row(1, "A")])
    with pytest.raises(UserError, match=r"several such files: MMBench_DEV_EN.tsv, MMBench_DEV_EN_V11.tsv"):
        run_task(Rule(str), DEV, tmp_path, progress=False)


def test_missing_column_is_named(tmp_path):
    (tmp_path / "MMBench_DEV_EN.tsv").write_text("index\tquestion\tA\n")
    with pytest.raises(UserError, match=r"no column 'B'; it has index, question, A; expected MMBench's dev split"):
        run_task(Rule(str), DEV, tmp_path, progress=False)
