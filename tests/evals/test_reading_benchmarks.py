"""MME, ScienceQA, ChartQA, DocVQA, InfographicVQA, OCRBench and VizWiz: their files, prompts and scores by hand."""

import json
from functools import partial

import pytest
from helpers.bench_files import Rule, cell, write_image, write_json, write_parquet

from fusion_jax.errors import UserError
from fusion_jax.evals import chartqa, docvqa, mme, ocrbench, scienceqa, vqa
from fusion_jax.evals.registry import TASKS
from fusion_jax.evals.runner import Output, run_task
from fusion_jax.evals.task import Question

run = partial(run_task, progress=False)
HEADER = {"checkpoint": "x", "folder": "y"}
SHORT = "Answer the question using a single word or phrase."


@pytest.mark.parametrize(
    "answer, said",
    [
        *[(said, "yes") for said in ("Yes", "yes.", "Eyes", "y", "Y.", "..y.es")],
        *[(said, "no") for said in ("No, it", "A no", "not", "n")],
        *[(said, "other") for said in ("It is: yes", "")],
    ],
)
def test_mme_looks_at_four_characters(answer, said):
    assert mme.score(Question("1", "", "yes"), answer)[0] == said


def mme_folder(folder, pairs):
    for kind, images in pairs.items():
        apart = kind == "artwork"
        for name, answers in images.items():
            here = folder / "MME_Benchmark_release_version" / kind
            text = here / ("questions_answers_YN" if apart else "") / f"{name}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            lines = [f"Is {kind} {name} {n}? Please answer yes or no.\t{a}" for n, a in enumerate(answers)]
            text.write_text("\n".join(lines) + "\n")
            write_image(here / ("images" if apart else "") / f"{name}.jpg")


def test_mme_adds_accuracy_and_accuracy_plus(tmp_path):
    """Always yes. existence: 3 of 4, 1 of 2 pictures; artwork: 1 of 2, 0 of 1; code_reasoning: 2 of 2, 1 of 1."""
    pairs = {
        "existence": {"a": ("Yes", "Yes"), "b": ("Yes", "No")},
        "artwork": {"c": ("No", "Yes")},
        "code_reasoning": {"d": ("Yes", "Yes")},
    }
    mme_folder(tmp_path / "MME", pairs)
    result = run(Rule(lambda _: "Yes."), mme.TASK, tmp_path)
    assert result.scores["by_subtask"] == {"existence": 125.0, "artwork": 50.0, "code_reasoning": 200.0}
    assert (result.scores["perception"], result.scores["cognition"], result.scores["total"]) == (175, 200, 375)
    assert result.predictions[0].question.prompt == f"Is existence a 0?\n{SHORT}"
    rows = [
        {"question_id": f"{kind}/{name}", "question": f"Is {kind} {name} {n}?", "answer": a, "category": kind}
        | {"image": cell()}
        for kind, images in pairs.items()
        for name, answers in images.items()
        for n, a in enumerate(answers)
    ]
    write_parquet(tmp_path / "other" / "test.parquet", rows)
    assert run(Rule(lambda _: "Yes."), mme.TASK, tmp_path / "other").scores == result.scores


def test_mme_without_subtasks_says_so(tmp_path):
    with pytest.raises(UserError, match="no subtask's folder"):
        run(Rule(str), mme.TASK, tmp_path)


@pytest.mark.parametrize(
    "answer, letter",
    [
        *[(said, "B") for said in ("B", " B ", "B\n", "B. dog", "The answer is B.", "B.", "(B)", "Answer: B.")],
        *[(said, "FAILED") for said in ("B) dog", "C", "b", "the answer is B", "E", "(C)")],
    ],
)
def test_scienceqa_reads_letters(answer, letter):
    assert scienceqa.parse(answer, ["cat", "dog"]) == letter


def test_scienceqa_with_and_without_pictures(tmp_path):
    common = {"choices": ["cat", "dog"], "answer": 1}
    problems = {
        "4": {**common, "question": "Which?", "hint": "Look.", "image": "image.png"},
        "5": {**common, "question": "And?", "hint": "", "image": None},
        "6": {**common, "question": "Train", "hint": "", "image": None},
    }
    write_json(tmp_path / "scienceqa" / "problems.json", problems)
    write_json(tmp_path / "scienceqa" / "pid_splits.json", {"train": ["6"], "test": ["4", "5"]})
    write_image(tmp_path / "scienceqa" / "images" / "test" / "4" / "image.png")
    result = run(Rule(lambda w: "B" if "Look" in w else "A"), scienceqa.TASK, tmp_path)
    figures = {"accuracy": 50.0, "image_accuracy": 100.0, "image_accuracy (rule=published)": 100.0}
    assert result.scores == {"questions": 2, **figures}
    assert result.predictions[0].question.prompt == (
        "Context: Look.\nWhich?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    )
    assert result.predictions[1].question.pictures == ()
    rows = [{**problems["4"], "image": cell()}, problems["5"]]
    write_parquet(tmp_path / "other" / "test-0.parquet", rows)
    other = run(Rule(lambda w: "B" if "Look" in w else "A"), scienceqa.TASK, tmp_path / "other")
    assert other.scores == result.scores


@pytest.mark.parametrize(
    "answer, reference, right",
    [
        ("95", "100", True),
        ("94.9", "100", False),
        ("105", "100", True),
        ("5%", "0.05", True),
        ("5%", "5", False),
        ("0.0", "0", False),  # a reference of 0 is compared as text
        ("0", "0", True),
        ("Yes", "yes", True),
        ("yes.", "yes", False),
        ("1,000", "1000", False),  # not a number to the rule
        ("-5", "-5.2", True),
    ],
)
def test_chartqa_relaxed_accuracy(answer, reference, right):
    assert chartqa.relaxed(answer, reference) is right


def test_chartqa_files(tmp_path):
    for kind, label in (("human", "10"), ("augmented", "Asia")):
        rows = [{"imgname": f"{kind}.png", "query": f"Which {kind}?", "label": label}]
        write_json(tmp_path / "ChartQA" / "test" / f"test_{kind}.json", rows)
        write_image(tmp_path / "ChartQA" / "test" / "png" / f"{kind}.png")
    result = run(Rule(lambda w: "9.6" if "human" in w else "Europe"), chartqa.TASK, tmp_path)
    assert result.scores == {"questions": 2, "relaxed_accuracy": 50.0, "human": 100.0, "augmented": 0.0}
    assert result.predictions[0].question.prompt == "Which human?\nAnswer the question with a single word."


@pytest.mark.parametrize(
    "answer, references, value",
    [
        ("Nokia", ["nokia"], 1.0),
        ("nokla", ["nokia"], 0.8),
        ("nok", ["nokia"], 0.6),
        ("no", ["nokia"], 0.0),  # 0.4 is below the threshold
        ("ab", ["abcd"], 0.5),
        ("x", ["abcd", "X"], 1.0),
        ("new  york", ["New York"], 1.0),
        ("new   yorc", ["new york"], 0.9),  # one of ten characters, spaces counted
        ("", ["a"], 0.0),
    ],
)
def test_anls(answer, references, value):
    assert docvqa.anls(answer, references) == pytest.approx(value)


@pytest.mark.parametrize("a, b, steps", [("", "", 0), ("kitten", "sitting", 3), ("ab", "ba", 2), ("", "abc", 3)])
def test_edit_distance(a, b, steps):
    assert docvqa.edit_distance(a, b) == steps == docvqa.edit_distance(b, a)


def test_docvqa_and_infovqa_files(tmp_path):
    row = {"questionId": 7, "question": "Who?", "answers": ["Ann", "Ann Lee"], "image": "documents/p_1.png"}
    write_json(tmp_path / "docvqa" / "val_v1.0_withQT.json", {"data": [row]})
    write_image(tmp_path / "docvqa" / "spdocvqa_images" / "p_1.png")
    result = run(Rule(lambda _: "ann le"), TASKS["docvqa"], tmp_path)
    assert result.scores["anls"] == pytest.approx(100 * (1 - 1 / 7))
    assert result.files == [] and result.predictions[0].question.prompt == f"Who?\n{SHORT}"
    row = {"questionId": 8, "question": "How many?", "image_local_name": "1.jpeg"}
    write_json(tmp_path / "infovqa" / "infographicsVQA_test_v1.0.json", {"data": [row]})
    write_image(tmp_path / "infovqa" / "infographicsvqa_images" / "1.jpeg")
    result = run(Rule(lambda _: "4"), TASKS["infovqa_test"], tmp_path, Output(tmp_path / "out", HEADER))
    assert result.scores == {"questions": 1}
    assert json.loads(result.files[0].read_text()) == [{"questionId": 8, "answer": "4"}]


def test_docvqa_parquet_of_both_in_one_folder(tmp_path):
    for name, answer in (("DocVQA", "a"), ("InfographicVQA", "b")):
        row = {"questionId": "1", "question": "?", "answers": [answer], "image": cell()}
        write_parquet(tmp_path / name / "validation-00000-of-00001.parquet", [row])
    for name, value in (("docvqa", 100.0), ("infovqa", 0.0)):
        assert run(Rule(lambda _: "A"), TASKS[name], tmp_path).scores["anls"] == value


def ocr_rows():
    return [
        ("IIIT5K", "Regular Text Recognition", ["CENTRE"], "The word is Centre."),
        ("HME100k", "Handwritten Mathematical Expression Recognition", ["x ^ 2 + Y"], "x^2+Y = 1"),
        ("HME100k", "Handwritten Mathematical Expression Recognition", ["X + 1"], "x+1"),  # case counts in formulas
        ("docVQA", "Doc-oriented VQA", ["two lines", "2"], "two\nlines"),
        ("FUNSD", "Key Information Extraction", "a b", "ab"),
    ]


def test_ocrbench_finds_references_inside_answers(tmp_path):
    rows = [
        {"dataset_name": d, "type": kind, "question": f"{n}?", "answers": refs, "image_path": f"{n}.png"}
        for n, (d, kind, refs, _) in enumerate(ocr_rows())
    ]
    write_json(tmp_path / "OCRBench" / "OCRBench.json", rows)
    for n in range(len(rows)):
        write_image(tmp_path / "OCRBench" / "OCRBench_Images" / f"{n}.png")
    said = {f"{n}?": answer for n, (_, _, _, answer) in enumerate(ocr_rows())}
    result = run(Rule(lambda w: said[w.split("\n")[-1]]), ocrbench.TASK, tmp_path)
    assert [p.score for p in result.predictions] == [1.0, 1.0, 0.0, 1.0, 0.0]
    assert result.scores["final_score"] == 3 and result.scores["text_recognition"] == 1
    assert result.predictions[0].question.prompt == "0?"


def test_vizwiz_compares_with_what_people_wrote(tmp_path):
    """The model's answer is normalised, the people's are not: `Two` agrees with `2` alone."""
    people = ["2"] * 3 + ["two"] * 7
    row = {"image": "v.jpg", "question": "how many?", "answers": [{"answer": a} for a in people]}
    write_json(tmp_path / "vizwiz" / "val.json", [row])
    write_json(tmp_path / "vizwiz" / "test.json", [{"image": "t.jpg", "question": "what?"}])
    for split in ("val", "test"):
        write_image(tmp_path / "vizwiz" / split / f"{split[0]}.jpg")
    result = run(Rule(lambda _: "Two."), TASKS["vizwiz"], tmp_path)
    assert result.scores["accuracy"] == pytest.approx(90.0)
    assert result.scores["accuracy (rule=published)"] == pytest.approx(100.0)
    assert result.predictions[0].question.prompt == (
        f"How many?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}"
    )
    result = run(Rule(lambda _: "The Can."), TASKS["vizwiz_test"], tmp_path, Output(tmp_path / "out", HEADER))
    assert json.loads(result.files[0].read_text()) == [{"image": "t.jpg", "answer": "can"}]


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Dont", "don’t"),
        ("couldnt", "couldn't"),  # the official table is straight here
        ("1,000", "1000"),
        ("1,,2", "1 2"),
        ("1,,2 3,4", "12 34"),
        ("The Can’t", "can’t"),
        ("it's", "it's"),
    ],
)
def test_vizwiz_normalises_with_its_own_slips(answer, read):
    assert vqa.normalise_for_vizwiz(answer) == read


def test_ocrbench_folds_full_width_characters_but_not_in_formulas():
    about = {"dataset": "IIIT5K", "category": ""}
    assert ocrbench.score(Question("1", "", ["ab 1"], about=about), "ＡＢ　１")[1] == 1.0
    assert ocrbench.lower_case_score(Question("1", "", ["ab 1"], about=about), "ＡＢ　１")[1] == 0.0
    formula = Question("1", "", ["X + 1"], about=about | {"dataset": "HME100k"})
    assert (ocrbench.score(formula, "X+1")[1], ocrbench.lower_case_score(formula, "X+1")[1]) == (1.0, 0.0)


def test_rows_of_several_groups_keep_their_own_pictures(tmp_path):
    """Three row groups of two rows: the picture of each row is the one in that row."""
    from helpers.bench_files import COLOURS, image_bytes

    rows = [
        {"questionId": str(n), "question": f"{n}?", "answers": ["a"], "image": cell(colour)}
        for n, colour in enumerate(COLOURS[:6])
    ]
    write_parquet(tmp_path / "DocVQA" / "validation-0.parquet", rows)
    questions = TASKS["docvqa"].read(tmp_path)
    assert [q.pictures[0].load() for q in reversed(questions)] == [image_bytes(c) for c in reversed(COLOURS[:6])]
