"""Scores of the held-out task on hand-made answers."""

import base64
import json

import pytest
from helpers.bench_files import held_out_folder, write_image

from fusion_jax.errors import UserError
from fusion_jax.evals import held_out
from fusion_jax.evals.runner import Output, record, run_task


class Parrot:
    """Answers with the name of the image it is shown."""

    rows, max_tokens = 4, 32

    def answer(self, prompts):
        return [prompt.image_path.stem for prompt in prompts]


def run(folder):
    return run_task(Parrot(), held_out.TASK, folder, progress=False)


def test_score_ignores_case_and_final_punctuation_only(tmp_path):
    held_out_folder(tmp_path, ["red", "top left", "2"], ["a", "b", "c"])
    questions = held_out.read(tmp_path)
    scores = [held_out.score(q, said)[1] for q, said in zip(questions, ["Red.", " top  left", "two"])]
    assert scores == [1.0, 1.0, 0.0]


def test_majority_is_counted_per_kind():
    assert held_out.majority_accuracy(["a", "a", "b", "x"], ["k", "k", "k", "l"]) == pytest.approx(3 / 4)


def test_every_image_moves_and_none_is_lost():
    moved = held_out.others(7)
    assert all(other != i for i, other in enumerate(moved))
    assert sorted(moved) == list(range(7))


def test_a_model_that_looks_is_right_and_loses_it_on_permuted_images(tmp_path):
    held_out_folder(tmp_path, ["red", "blue", "star", "ring"], ["colour", "colour", "shape", "shape"])
    result = run(tmp_path)
    assert result.scores["questions"] == 4
    assert result.scores["held_out_accuracy"] == 1.0
    assert result.scores["shuffled_image_accuracy"] == 0.0
    assert result.scores["majority_accuracy"] == 0.5
    assert result.scores["accuracy_per_topic"] == {"colour": 1.0, "shape": 1.0}
    row = result.predictions[2].row()
    assert row["question"] == "What?" and row["reference"] == "star" and row["answer"] == "star"


def test_records_without_topics_count_as_one(tmp_path):
    held_out_folder(tmp_path, ["red", "blue", "star"], [None, None, None])
    assert run(tmp_path).scores["accuracy_per_topic"] == {"all": 1.0}


def test_a_record_that_cannot_be_used_is_named(tmp_path):
    held_out_folder(tmp_path, ["red", "blue"], ["colour", "colour"])
    records = json.loads((tmp_path / "held_out.json").read_text())
    records[1]["image"] = "../blue.png"
    (tmp_path / "held_out.json").write_text(json.dumps(records))
    with pytest.raises(UserError, match=r"record 1 \(id 1\): the image ../blue.png lies outside"):
        run(tmp_path)


def test_missing_file_says_what_is_expected(tmp_path):
    with pytest.raises(UserError, match=r"there is no held_out.json in .*expected held_out.json in LLaVA format"):
        run(tmp_path)


def test_other_forms_of_records_are_asked_alike(tmp_path):
    write_image(tmp_path / "red.png")
    data = base64.b64encode((tmp_path / "red.png").read_bytes()).decode()
    answer = {"role": "assistant", "content": "red"}
    parts = [{"type": "image", "bytes": data}, {"type": "text", "text": "What?"}]
    records = [
        {"image": "red.png", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}, answer]},
        {"images": ["red.png"], "messages": [answer, {"role": "user", "content": "<image>What?"}, answer]},
    ]
    (tmp_path / "held_out.json").write_text(json.dumps(records))
    questions = held_out.read(tmp_path)[:3]
    assert [(q.prompt, q.reference) for q in questions] == [("What?", "red")] * 3
    asked = [record(held_out.TASK, q) for q in questions]
    assert [one.system for one in asked] == [None, "Be brief.", None]
    assert asked[1].images == ((tmp_path / "red.png").read_bytes(),) and asked[2].images == (tmp_path / "red.png",)
    for images in ([], ["red.png", "red.png"]):
        (tmp_path / "held_out.json").write_text(json.dumps([records[0] | {"image": images}]))
        with pytest.raises(UserError, match=rf"held_out\.json, record 0 has {len(images)} images"):
            held_out.read(tmp_path)


@pytest.mark.parametrize(
    ("topics", "topic"),
    [(["a", "b"], "a"), ("animals", "animals"), ([], "all"), (None, "all"), ([None], "all"), (5, "5")],
)
def test_topics_in_any_form(tmp_path, topics, topic):
    held_out_folder(tmp_path, ["red", "blue"], ["a", "b"])
    records = json.loads((tmp_path / "held_out.json").read_text())
    records[1]["topics"] = topics
    (tmp_path / "held_out.json").write_text(json.dumps(records))
    assert held_out.read(tmp_path)[1].about["topic"] == topic


def test_an_answer_counts_for_the_system_text_that_it_was_given_under(tmp_path):
    class Counting(Parrot):
        asked = 0

        def answer(self, prompts):
            self.asked += len(prompts)
            return super().answer(prompts)

    held_out_folder(tmp_path, ["red", "blue"], ["a", "b"])
    answerer = Counting()
    for system, asked in ((None, 4), (None, 4), ("Be brief.", 8), ("Be brief.", 8), ("Be long.", 12)):
        records = json.loads((tmp_path / "held_out.json").read_text())
        records = [{**one, "system": system} for one in records]
        (tmp_path / "held_out.json").write_text(json.dumps(records))
        run_task(
            answerer,
            held_out.TASK,
            tmp_path,
            Output(tmp_path / "out", {"checkpoint": "x", "folder": "x"}),
            progress=False,
        )
        assert answerer.asked == asked
