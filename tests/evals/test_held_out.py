"""Scores of the held-out task on hand-made answers."""

import json
from pathlib import Path

import pytest

from fusion_jax.data.sources import Record
from fusion_jax.errors import UserError
from fusion_jax.evals import held_out


class Parrot:
    """Answers with the name of the image it is shown."""

    def answer(self, prompts):
        return [prompt.image_path.stem for prompt in prompts]


def write(folder: Path, answers, kinds):
    records = [
        {
            "id": str(i),
            "image": f"{answer}.png",
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}],
            **({"kinds": [kind]} if kind else {}),
        }
        for i, (answer, kind) in enumerate(zip(answers, kinds))
    ]
    (folder / "held_out.json").write_text(json.dumps(records))


def test_accuracy_ignores_case_and_final_punctuation_only():
    assert held_out.accuracy(["Red.", " top  left", "two"], ["red", "top left", "2"]) == pytest.approx(2 / 3)


def test_majority_is_counted_per_kind():
    assert held_out.majority_accuracy(["a", "a", "b", "x"], ["k", "k", "k", "l"]) == pytest.approx(3 / 4)


def test_every_image_moves_and_none_is_lost():
    records = [Record(str(i), Path(f"{i}.png"), [], "") for i in range(7)]
    moved = held_out.permuted(records)
    assert all(a.image_path != b.image_path for a, b in zip(records, moved))
    assert {r.image_path for r in moved} == {r.image_path for r in records}


def test_a_model_that_looks_is_right_and_loses_it_on_permuted_images(tmp_path):
    write(tmp_path, ["red", "blue", "star", "ring"], ["colour", "colour", "shape", "shape"])
    scores = held_out.run(Parrot(), tmp_path)
    assert scores["held_out_accuracy"] == 1.0
    assert scores["shuffled_image_accuracy"] == 0.0
    assert scores["majority_accuracy"] == 0.5
    assert scores["accuracy_per_kind"] == {"colour": 1.0, "shape": 1.0}
    assert scores["examples"][2]["question"] == "What?" and scores["examples"][2]["expected"] == "star"


def test_records_without_kinds_are_named(tmp_path):
    write(tmp_path, ["red"], [None])
    with pytest.raises(UserError, match="kinds"):
        held_out.run(Parrot(), tmp_path)
