"""MMMU, MMStar, RealWorldQA, HallusionBench and MathVista: reading of answers, figures and files by hand."""

import base64
import json
from functools import partial

import pytest
from helpers.bench_files import Rule, cell, image_bytes, write_image, write_json, write_parquet

from fusion_jax.evals import choices, hallusion, mathvista, mmmu, mmstar, realworldqa
from fusion_jax.evals.registry import TASKS
from fusion_jax.evals.runner import Output, record, run_task
from fusion_jax.evals.task import Question

run = partial(run_task, progress=False)
OPTIONS = ["a cat", "a dog", "a red house"]


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("B.", "B"),
        ("B. dog", "B"),
        ("(B)", "B"),
        ("(A) or rather (C)", "C"),  # the last one counts
        ("first A then B", "B"),
        ("(A) is not B", "A"),  # brackets win over words
        ("I think it is a red house over there", "C"),
        ("there is a dog and then there is a cat", "A"),
    ],
)
def test_mmmu_choices(answer, letter):
    assert mmmu.parse_choice(answer, OPTIONS, "id") == letter


@pytest.mark.parametrize("answer", ["", "B) dog", "a red house", "b"])
def test_mmmu_draws_where_the_official_rule_does_and_always_the_same(answer):
    draws = {mmmu.parse_choice(answer, OPTIONS, f"id {n}") for n in range(30)}
    assert draws == {"A", "B", "C"}
    assert len({mmmu.parse_choice(answer, OPTIONS, "one id") for _ in range(5)}) == 1


@pytest.mark.parametrize(
    "answer, read",
    [
        ("3", {3.0}),
        ("The answer is 3.456", {3.46}),
        ("x = 1,000", {1000.0, 0.0}),  # the official patterns find the three zeros as well
        ("so it is 5 apples", {"5 apples", 5.0}),
        ("1e3 m", {"1e3 m", 1000.0, 3.0}),
        ("It is blue.\nThus red", {"blue.", "red"}),
        ("a", {" a", "a "}),
        ("", {""}),
    ],
)
def test_mmmu_open_answers(answer, read):
    assert set(mmmu.parse_open(answer)) == read


@pytest.mark.parametrize(
    "answer, reference, right",
    [
        ("The result is 3.14159", "3.14", True),
        ("3.1", "3.14", False),
        ("It is a red house", "red house", True),
        ("a house", "red house", False),
        ("0.5", ["1/2", "0.50"], True),
        ("1,200", "1200", True),
        ("the answer is max", "x", False),  # a single letter must stand beside a space
        ("answer is x or y", "x", True),
    ],
)
def test_mmmu_open_matches(answer, reference, right):
    assert mmmu.matches(mmmu.parse_open(answer), reference) is right


def mmmu_row(name, kind="multiple-choice", answer="B", question="What is <image 1>?", options="['x', 'y']", **images):
    images = {f"image_{n}": images.get(f"image_{n}") for n in range(1, 8)}
    return {"id": name, "question": question, "options": options, "answer": answer, "question_type": kind, **images}


def test_mmmu_files_pictures_and_subjects(tmp_path):
    art = mmmu_row("validation_Art_Theory_1", image_1=cell("red"), image_2=cell("blue"))
    art["options"] = "['<image 2>', 'y']"
    opened = mmmu_row("validation_Math_9", "open", "['24/7', '3.429']", "Slope in <image 1>?", "[]", image_1=cell())
    write_parquet(tmp_path / "MMMU" / "Art_Theory" / "validation-00000-of-00001.parquet", [art])
    write_parquet(tmp_path / "MMMU" / "Math" / "validation-00000-of-00001.parquet", [opened])
    task = TASKS["mmmu"]
    result = run(Rule(lambda w: "It is 3.429" if "Slope" in w else "A"), task, tmp_path)
    assert result.scores == {"questions": 2, "accuracy": 50.0, "by_subject": {"Art_Theory": 0.0, "Math": 100.0}}
    asked = record(task, result.predictions[0].question)
    assert asked.images == (image_bytes("red"), image_bytes("blue"))
    assert asked.turns[0]["value"] == (
        "<image>\n<image>\nWhat is <image 1>?\nA. <image 2>\nB. y\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert result.predictions[1].question.reference == ["24/7", "3.429"]


def test_mmmu_test_split_becomes_a_submission(tmp_path):
    write_parquet(tmp_path / "data" / "test-0.parquet", [mmmu_row("test_Art_1", answer="?", image_1=cell())])
    output = Output(tmp_path / "out", {"checkpoint": "x", "folder": "y"})
    result = run(Rule(lambda _: "(B)"), TASKS["mmmu_test"], tmp_path / "data", output)
    assert result.scores == {"questions": 1}
    assert json.loads(result.files[0].read_text()) == {"test_Art_1": "B"}


@pytest.mark.parametrize(
    "answer, right",
    [
        *[(said, 1) for said in ("B", "b: dog", "(B) dog", "option B", "The answer is B", "Both")],
        *[(said, 0) for said in ("Answer: B", "It is B", "", "(", "A", "The answer is (B)")],
    ],
)
def test_mmstar_looked_at_the_start(answer, right):
    assert mmstar.first_letter_score(Question("1", "", "B"), answer)[1] == right


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *[
            (said, "B")
            for said in (
                "B",
                "(B) dog",
                "It is B",
                "The answer is (B)",
                "a dog, or B",
                "BOTH",
                "답은 B",
                "It is A) or (B)",
            )
        ],
        *[(said, "") for said in ("b", "", "(", "option b")],
        ("A dog is what I see", "A"),  # at the start counts most, article or not
        ("answer is D, no, the answer is C here", "C"),  # the last one behind any phrase
    ],
)
def test_the_letter_in_the_most_trusted_form(answer, letter):
    assert choices.ranked_letter(answer, "ABCD") == letter


@pytest.mark.parametrize("form", ["parquet", "tsv"])
def test_mmstar_files(tmp_path, form):
    rows = [
        {"index": n, "question": "Q?\nOptions: A: x, B: y", "answer": "A", "category": c, "l2_category": c + "!"}
        for n, c in enumerate(("math", "logic"))
    ]
    if form == "parquet":
        write_parquet(tmp_path / "mmstar.parquet", [{**row, "image": cell()} for row in rows])
    else:
        picture = base64.b64encode(image_bytes()).decode()
        lines = ["\t".join([*rows[0], "image"])]
        lines += ["\t".join([f'"{v}"' for v in row.values()] + [picture]) for row in rows]
        (tmp_path / "MMStar.tsv").write_text("\n".join(lines) + "\n")
    result = run(Rule(lambda _: "A"), mmstar.TASK, tmp_path)
    assert result.scores["average"] == result.scores["average (rule=published)"] == 100.0
    assert result.scores["accuracy"] == 100.0 and result.scores["by_category"] == {"logic": 100.0, "math": 100.0}
    assert result.predictions[0].question.prompt.endswith(
        "B: y\nAnswer with the option's letter from the given choices directly"
    )


BEHIND = ["answer is", "the Answer is", "the correct answer is", "best answer is", "my answer is", "correct option is"]
BEHIND += [
    "the best option is",
    "choice is",
    "the choice is",
    "correct choice is",
    "my choice is",
    "I choose",
    "I select",
]
BEHIND += ["I pick", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"]


@pytest.mark.parametrize("phrase", BEHIND)
def test_a_letter_behind_a_phrase_is_trusted_more_than_one_in_brackets(phrase):
    assert choices.ranked_letter(f"so (C)? {phrase} A here", "ABCD") == "A"
    assert choices.ranked_letter("so (C)? is A here", "ABCD") == "C"


def test_mmstar_with_options_in_columns_of_their_own(tmp_path):
    columns = ("index", "question", "A", "B", "C", "D", "answer", "category", "l2_category", "image")
    row = (1, "Which?", "None", "", "nan", "0", "D", "math", "geometry", base64.b64encode(image_bytes()).decode())
    (tmp_path / "MMStar.tsv").write_text("\n".join("\t".join(map(str, line)) for line in (columns, row)) + "\n")
    (question,) = mmstar.read(tmp_path)
    assert question.prompt.startswith("Which?\nOptions: A: None, C: nan, D: 0\nAnswer") and question.reference == "D"

    # Where another row shows that the file writes `nan` for nothing, it is no last option in this one.
    rows = [
        ("1", "Which?", "x", "y", "z", "nan", "A", *row[-3:]),
        ("2", "Which?", "x", "y", "nan", "nan", "A", *row[-3:]),
    ]
    (tmp_path / "MMStar.tsv").write_text("\n".join("\t".join(map(str, line)) for line in (columns, *rows)) + "\n")
    assert [[*q.about["options"]] for q in mmstar.read(tmp_path)] == [["A", "B", "C"], ["A", "B"]]


CAR = "Which way?\nA. Left\nB. Turn right\nC. Right\nPlease answer directly with only the letter."


@pytest.mark.parametrize(
    "answer, question, read",
    [
        ("B.", CAR, "B"),
        ("Left", CAR, "A"),
        ("You may turn: Right", CAR, "C"),
        ("Two", "How many?", "2"),
        ("two cars", "How many?", "two cars"),
        ("2.", "How many?", "2"),
    ],
)
def test_realworldqa_reads_answers(answer, question, read):
    assert realworldqa.parse(answer, question) == read


def test_realworldqa_end_to_end(tmp_path):
    rows = [
        {"question": CAR, "answer": "C", "image": cell()},
        {"question": "How many?", "answer": "2", "image": cell()},
    ]
    write_parquet(tmp_path / "data" / "test-0.parquet", rows)
    result = run(Rule(lambda w: "Right" if "way" in w else "Two"), realworldqa.TASK, tmp_path)
    assert result.scores["accuracy"] == 0.0 and result.scores["accuracy (rule=published)"] == 100.0
    result = run(Rule(lambda w: "(C)" if "way" in w else "2."), realworldqa.TASK, tmp_path)
    assert result.scores["accuracy"] == 100.0 and result.predictions[0].question.prompt == CAR


def hallusion_row(category, figure, number, answer, visual="1", group="0"):
    return {
        "category": category,
        "subcategory": "chart",
        "set_id": group,
        "figure_id": figure,
        "question_id": number,
        "question": f"{category} {figure} {number}?",
        "visual_input": visual,
        "gt_answer": answer,
        "gt_answer_details": "because",
        "filename": "ignored",
    }


def test_hallusion_figures_by_hand(tmp_path):
    """VS: figure 0 has no picture. Question 0 is right without (unclear) and with it; question 1 is wrong with it.

    VD: one figure, two questions, one of them unclear and therefore wrong.
    """
    rows = [
        hallusion_row("VS", "0", "0", "1", visual="0"),
        hallusion_row("VS", "1", "0", "1"),
        hallusion_row("VS", "0", "1", "0", visual="0"),
        hallusion_row("VS", "1", "1", "0"),
        hallusion_row("VD", "0", "0", "1"),
        hallusion_row("VD", "0", "1", "1"),
    ]
    write_json(tmp_path / "HallusionBench.json", rows)
    for place in ("VS/chart/0_1", "VD/chart/0_0"):
        write_image(tmp_path / "hallusion_bench" / f"{place}.png")
    said = {"VS 0 0?": "I cannot tell", "VS 1 0?": "Yes.", "VS 0 1?": "No", "VS 1 1?": "yes", "VD 0 0?": "Yes, it is"}
    result = run(Rule(lambda w: said.get(w.split("\n")[-1], "yes and no")), hallusion.TASK, tmp_path)
    assert [p.parsed for p in result.predictions] == [2, 1, 1, 0, 1, 2]
    assert result.scores["aAcc"] == pytest.approx(400 / 6)
    assert result.scores["fAcc"] == 0.0  # both figures have a wrong answer
    assert result.scores["qAcc"] == pytest.approx(50.0)  # VS 0 and VD 0 of four
    assert result.scores["aAcc_images_only"] == 50.0 and result.scores["qAcc_images_only"] == 50.0
    assert result.predictions[0].question.pictures == ()


@pytest.mark.parametrize(
    "said, verdict", [("Correct", 1), ("“incorrect”", 0), ("unclear", 2), ("I do not know", 2), ("correct.", 1)]
)
def test_hallusion_judge_words(said, verdict):
    class Judge:
        def ask(self, prompt, max_tokens):
            assert "Question:Why?\nReference answer: because\nPrediction answer:so\nOutput:" in prompt
            return said

    about = {"category": "VD", "figure_id": "0", "details": "because"}
    question = Question("1", "Why?", "yes", text="Why?", about=about)
    assert hallusion.judged(question, "so", Judge()) == (verdict, float(verdict == 1))


def about(kind, answer_type, options=(), precision=0):
    return {"question_type": kind, "answer_type": answer_type, "options": list(options), "precision": precision}


CHOICE = about("multi_choice", "text", ["7", "14 cm", "21"])
WHOLE, TENTHS, LIST = about("free_form", "integer"), about("free_form", "float", (), 1), about("free_form", "list")


@pytest.mark.parametrize(
    "extraction, kind, value",
    [
        ("B", CHOICE, "14 cm"),
        ("(b) 14 cm", CHOICE, "14 cm"),
        ("14cm", CHOICE, "14 cm"),  # the nearest text
        ("D", CHOICE, "7"),  # no such letter: the nearest text, the first of equals
        ("14.7", WHOLE, "14"),
        ("1e2", WHOLE, "100"),
        ("many", WHOLE, None),
        ("3.14159", TENTHS, "3.1"),
        ("3", TENTHS, "3.0"),
        ("[1, 2]", LIST, "[1, 2]"),
    ],
)
def test_mathvista_normalises_extractions(extraction, kind, value):
    assert mathvista.normalise(extraction, kind) == value


@pytest.mark.parametrize(
    "answer, kind, extraction",
    [
        ("14 cm", CHOICE, "14 cm"),
        ("The correct one is (B).", CHOICE, "B"),
        ('The answer is "21".', CHOICE, "21"),
        ("14", WHOLE, "14"),
        ("There are 3 rows of 4, so 1,200.", WHOLE, "1200"),
        ("no idea", WHOLE, ""),
        ("about -2.5 degrees", TENTHS, "-2.5"),
        ("It lies in [1, 2], or [2, 3].", LIST, "[2, 3]"),
    ],
)
def test_mathvista_extracts_by_rules(answer, kind, extraction):
    assert mathvista.extract(answer, kind) == extraction


def mathvista_row(pid, **changes):
    row = {
        "pid": pid,
        "question": "How long?",
        "question_type": "free_form",
        "answer_type": "float",
        "answer": "1.5",
        "choices": None,
        "unit": "cm",
        "precision": 1.0,
        "metadata": {"task": "geometry", "skills": ["algebraic reasoning"]},
    }
    return {**row, **changes}


def test_mathvista_files_and_query(tmp_path):
    choice = mathvista_row(
        "2", question_type="multi_choice", answer_type="text", answer="b", choices=["a", "b"], unit=""
    )
    data = {row["pid"]: {**row, "image": f"images/{row['pid']}.jpg"} for row in (mathvista_row("1"), choice)}
    write_json(tmp_path / "MathVista" / "data" / "testmini.json", data)
    for pid in data:
        write_image(tmp_path / "MathVista" / "images" / f"{pid}.jpg")
    result = run(Rule(lambda w: "1.46 cm" if "Unit" in w else "B"), mathvista.TASK, tmp_path)
    assert result.scores["accuracy"] == 100.0 and result.scores["by_skill"] == {"algebraic reasoning": 100.0}
    assert result.predictions[0].question.prompt == (
        "Hint: Please answer the question requiring a floating-point number with one decimal place and provide the "
        "final value, e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: How long? (Unit: cm)"
    )
    assert result.predictions[1].question.prompt.endswith("Question: How long?\nChoices:\n(A) a\n(B) b")


def test_mathvista_asks_the_judge_only_where_it_must():
    class Judge:
        asked = 0

        def ask(self, prompt, max_tokens):
            self.asked += 1
            assert prompt.endswith("Question: How long?\nResponse: It is one and a half.\nAnswer:")
            return "1.5"

    judge = Judge()
    question = Question("1", "How long?", "1.5", about=TENTHS)
    assert mathvista.judged(question, "1.5", judge)[1] == 1.0 and judge.asked == 0
    assert mathvista.judged(question, "It is one and a half.", judge)[1] == 1.0 and judge.asked == 1
