"""POPE's reading of answers and figures, and the VQA accuracy with its normaliser, on cases done by hand."""

import pytest
from helpers.bench_files import Rule, cell, pope_folder, write_image, write_json, write_parquet

from fusion_jax.errors import UserError
from fusion_jax.evals import pope, textvqa, vqa
from fusion_jax.evals.runner import run_task


@pytest.mark.parametrize(
    "answer, said",
    [
        ("Yes", "yes"),
        ("no", "no"),
        ("No.", "no"),
        ("No, there is none", "no"),  # the comma goes
        ("NO", "yes"),  # only `no`, `No` and `not` count
        ("There is not a dog", "no"),
        ("Yes. But there is no cat", "yes"),  # only the first sentence counts
        ("I do not know", "no"),
        ("nothing", "yes"),  # whole words
        ("Yes\nno", "yes"),  # words are cut at spaces alone
        ("", "yes"),
    ],
)
def test_pope_reads_answers(answer, said):
    assert pope.parse(answer) == said


def test_pope_figures_by_hand(tmp_path):
    """random: 2 true yes, 1 true no, 1 wrong yes; popular: nothing but no."""
    folder = pope_folder(
        tmp_path, {"random": ["yes", "yes", "no", "no"], "popular": ["yes", "no"], "adversarial": ["no", "yes"]}
    )
    said = {"random 0": "yes", "random 1": "yes", "random 2": "no", "random 3": "yes", "adversarial": "yes"}

    def rule(prompt):
        return next((answer for key, answer in said.items() if key in prompt), "no")

    scores = run_task(Rule(rule), pope.TASK, folder, progress=False).scores
    assert scores["random_accuracy"] == 75 and scores["random_recall"] == 100
    assert scores["random_precision"] == pytest.approx(200 / 3)
    assert scores["random_f1"] == pytest.approx(80) and scores["random_yes_ratio"] == 75
    assert (scores["popular_accuracy"], scores["popular_f1"], scores["popular_yes_ratio"]) == (50, 0, 0)
    assert scores["adversarial_precision"] == 50 and scores["adversarial_f1"] == pytest.approx(200 / 3)
    assert scores["f1"] == pytest.approx((80 + 0 + 200 / 3) / 3)


def test_pope_from_parquet_is_the_same(tmp_path):
    labels = {"random": ["yes", "no"], "popular": ["no"], "adversarial": ["yes"]}
    rows = [
        {"question": f"Is there a {split} {n} dog?", "answer": label, "category": split, "image": cell()}
        for split, part in labels.items()
        for n, label in enumerate(part)
    ]
    write_parquet(tmp_path / "a" / "data" / "test-00000-of-00001.parquet", rows)
    pope_folder(tmp_path / "b", labels)
    a, b = (
        run_task(Rule(lambda w: "no" if "1" in w else "yes"), pope.TASK, tmp_path / x, progress=False) for x in "ab"
    )
    assert a.scores == b.scores
    assert [p.question.prompt for p in a.predictions] == [p.question.prompt for p in b.predictions]


@pytest.mark.parametrize(
    "said, normal",
    [
        ("The Red Car", "red car"),
        ("a an the", ""),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("5.", "5"),
        ("e.g.", "eg"),
        (".5", ".5"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),  # the official table says so
        ("John's", "john 's"),
        ("it's", "it 's"),
        ("a-b", "b"),  # a mark between words is a space, and then `a` is an article
        ("x/y", "x y"),
        ("x / y", "x y"),
        ("x- y/z", "x y z"),  # each mark for itself: `- ` is there, `/ ` is not
        ("yes!", "yes"),
        ("$5", "$5"),
        ("what?\nno", "what no"),
        ("." * 40, "." * 8),  # at most 32 periods go
    ],
)
def test_vqa_normaliser(said, normal):
    assert vqa.normalise(said) == normal


@pytest.mark.parametrize("agreeing, accuracy", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_leaves_one_out(agreeing, accuracy):
    people = ["stop"] * agreeing + [f"other {n}" for n in range(10 - agreeing)]
    assert vqa.accuracy("stop", people) == pytest.approx(accuracy)


def test_textvqa_end_to_end(tmp_path):
    answers = [["nokia"] * 10, ["Stop"] * 3 + ["go"] * 7, ["1,000"] * 2 + ["none"] * 8]
    data = [
        {"question_id": 30 + n, "question": "WHAT is it?", "image_id": f"img{n}", "answers": people}
        for n, people in enumerate(answers)
    ]
    write_json(tmp_path / "textvqa" / "TextVQA_0.5.1_val.json", {"data": data})
    for n in range(3):
        write_image(tmp_path / "textvqa" / "train_images" / f"img{n}.jpg")
    said = iter(["The Nokia.", "stop!", "1000"])
    result = run_task(Rule(lambda _: next(said), rows=1), textvqa.TASK, tmp_path, progress=False)
    assert [p.score for p in result.predictions] == pytest.approx([1.0, 0.9, 0.6])
    assert result.scores["accuracy"] == pytest.approx(250 / 3)
    assert result.predictions[0].question.prompt == "What is it?\nAnswer the question using a single word or phrase."


def test_textvqa_from_parquet_takes_the_validation_split(tmp_path):
    row = {"question_id": 1, "question": "what", "answers": ["x"] * 10, "image": cell()}
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", [row])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [{**row, "answers": [""] * 10}])
    result = run_task(Rule(lambda _: "X"), textvqa.TASK, tmp_path, progress=False)
    assert result.scores == {"questions": 1, "accuracy": 100.0}


def test_textvqa_with_other_keys_names_the_missing_one(tmp_path):
    write_json(tmp_path / "TextVQA_0.5.1_val.json", {"data": [{"question": "q"}]})
    with pytest.raises(UserError, match=r"no key 'question_id'"):
        run_task(Rule(str), textvqa.TASK, tmp_path, progress=False)
