"""Conversations against those of the published system, id for id, and what it does not show."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from fusion_jax.data.conversation import IMAGE, LATENTS, encode_conversation, encode_prompt
from fusion_jax.data.templates import TEMPLATES, find_template
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import BadRecord, UserError

MODELS = Path(os.environ.get("FUSION_GOLDENS", Path(__file__).parents[2] / ".." / "shared" / "goldens" / "models"))
FOLDER = MODELS.parent / "conversations"
NAMES = ("phi3", "llama3")
FILES = {name: FOLDER / f"conversations_{name}.json" for name in NAMES}
GOLDENS = {name: json.loads(path.read_text()) for name, path in FILES.items() if path.is_file()}
ROWS = [pytest.param(name, row, id=f"{name}-{row['record']['id']}") for name, g in GOLDENS.items() for row in g["rows"]]

pytestmark = pytest.mark.skipif(
    len(GOLDENS) < len(NAMES), reason=f"no golden conversations in {FOLDER} (set FUSION_GOLDENS)"
)


@pytest.fixture(scope="module")
def loaded():
    return {name: load_tokenizer(FOLDER / "tokenizers" / name) for name in NAMES}


def turns(*values):
    return [{"from": ("human", "gpt")[k % 2], "value": value} for k, value in enumerate(values)]


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer(loaded, name):
    keys = ("vocab_size", "pad_id", "bos_id", "vision_start_id", "vision_end_id")
    assert {k: getattr(loaded[name], k) for k in keys} == {k: GOLDENS[name][k] for k in keys}


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_training_row(loaded, name, row):
    record = row["record"]
    got = encode_conversation(record["conversations"], loaded[name], TEMPLATES[name], "image" in record)
    assert got.prompt == row["prompt"]
    for key in ("input_ids", "labels", "instructs"):
        assert getattr(got, key).dtype == np.int32
        assert getattr(got, key).tolist() == row[key], key
    assert got.rounds == row["labels"].count(-400)


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_prompt_is_the_front_of_the_training_row(loaded, name, row):
    record = row["record"]
    got = encode_prompt(record["conversations"][:-1], loaded[name], TEMPLATES[name], "image" in record)
    last = len(row["labels"]) - row["labels"][::-1].index(-400)
    assert got.input_ids.tolist() == row["input_ids"][:last]
    assert got.labels.tolist() == row["labels"][:last]
    assert got.instructs.tolist() == row["instructs"]
    assert got.rounds == row["labels"].count(-400)
    assert row["prompt"].startswith(got.prompt)


@pytest.mark.parametrize("name", NAMES)
def test_latent_options(loaded, name):
    def count(has_image, **options):
        ids = encode_conversation(turns("a", "b", "c", "d"), loaded[name], TEMPLATES[name], has_image, **options)
        ids = ids.input_ids.tolist()
        assert ids.count(loaded[name].vision_start_id) == ids.count(LATENTS) + ids.count(IMAGE)
        return ids.count(LATENTS), ids.count(IMAGE)

    assert count(True) == (2, 1)
    assert count(False) == (2, 0)
    assert count(False, latents_without_image=False) == (0, 0)
    assert count(True, latents_without_image=False) == (2, 1)
    assert count(True, latents=False) == (0, 1)
    assert count(False, latents=False) == (0, 0)


def test_place_of_the_image(loaded):
    def prompt(*values):
        return encode_conversation(turns(*values), loaded["phi3"], TEMPLATES["phi3"], True).prompt

    assert prompt("Why?", "b") == prompt("<image>\nWhy?", "b") == prompt("Why? <image>", "b")
    late = prompt("Why?", "b", "And <image> how?", "d")
    assert late.index("Why?") < late.index("<image><vision_end>\nAnd  how?")
    assert "<image><vision_end>\n<|end|>" in prompt("<image>", "b")


def test_tags_of_the_prompt_mean_nothing_in_a_text(loaded):
    got = encode_conversation(turns("What is <latent_image>?", "b"), loaded["phi3"], TEMPLATES["phi3"], True)
    assert got.input_ids.tolist().count(LATENTS) == 1


@pytest.mark.parametrize(
    ("conversation", "has_image", "reason"),
    [
        ([], True, "empty_conversation"),
        ([{"from": "gpt", "value": "a"}], True, "empty_conversation"),
        ("text", True, "bad_turns"),
        (["text"], True, "bad_turns"),
        ([{"from": "system", "value": "a"}], True, "bad_turns"),
        ([{"from": "human", "value": None}, {"from": "gpt", "value": "a"}], True, "bad_turns"),
        ([{"from": "human"}], True, "bad_turns"),
        (turns("a", "b\ud800"), True, "bad_turns"),
        (turns("a", "b") + turns("c")[:1] * 2, True, "bad_turns"),
        (turns("a", "b") + turns("x", "c")[1:], True, "bad_turns"),
        (turns("a"), True, "no_answer"),
        (turns("a", "b", "c"), True, "no_answer"),
        (turns("a", " \n"), True, "no_answer"),
        (turns("a", "see <image>"), True, "image_tag_in_answer"),
        (turns("<image>a", "b", "<image>c", "d"), True, "several_images"),
        (turns("<image><image>a", "b"), True, "several_images"),
        (turns("<image>a", "b"), False, "image_tag_without_image"),
    ],
)
def test_unusable_conversations(loaded, conversation, has_image, reason):
    with pytest.raises(BadRecord) as e:
        encode_conversation(conversation, loaded["phi3"], TEMPLATES["phi3"], has_image, where="f.json, record 3")
    assert e.value.reason == reason
    assert e.value.where == "f.json, record 3"


def test_a_prompt_ends_with_a_question(loaded):
    with pytest.raises(BadRecord, match="must end with a human turn"):
        encode_prompt(turns("a", "b"), loaded["phi3"], TEMPLATES["phi3"], False)
    # An earlier answer may be empty or odd: the model said it.
    assert encode_prompt(turns("a", "", "b", "<image>", "c"), loaded["phi3"], TEMPLATES["phi3"], True).rounds == 3


def test_unknown_template():
    assert find_template("phi3") is TEMPLATES["phi3"]
    with pytest.raises(
        UserError, match=r"'phi4' is unknown; allowed: phi3, llama3, chatml, mistral.*did you mean phi3"
    ):
        find_template("phi4")
