"""The shapes that a server pads its prompts to, by default."""

import dataclasses

import pytest
from helpers import tiny_run
from helpers.generation import config, make_tokenizer, record

from fusion_jax.config import StageConfig
from fusion_jax.data.examples import ExampleMaker
from fusion_jax.data.layout import Measured
from fusion_jax.errors import UserError
from fusion_jax.inference.prompts import Buckets, Prompts, buckets_of_training


def stage(**sizes):
    return StageConfig(name="s", data="", **sizes)


@pytest.mark.parametrize(
    ("longest", "rounds", "questions", "counts"),
    [
        (1024, 16, (64, 256, 1024), (1, 4, 16)),
        (128, 3, (64, 128), (1, 3)),
        (38, 1, (38,), (1,)),
        (300, 2, (64, 300), (1, 2)),
    ],
)
def test_default_shapes_end_with_the_largest_of_training(longest, rounds, questions, counts):
    stages = [stage(max_question_length=longest, max_rounds=rounds), stage(max_question_length=8, max_rounds=1)]
    buckets = buckets_of_training(stages)
    assert (buckets.questions, buckets.rounds) == (questions, counts)


def test_sizes_that_are_given_are_kept():
    buckets = buckets_of_training([stage(max_question_length=1024, max_rounds=16)], (512,), (100, 200), (3,), 2)
    assert buckets.lengths == (512,) and buckets.questions == (100, 200) and buckets.rounds == (3,)


def test_prompt_takes_question_and_rounds_of_its_own_size():
    buckets = buckets_of_training([stage(max_length=512, max_question_length=1024, max_rounds=16)])
    most = Measured(0, 200, 1, 1)
    small = buckets.spec(tiny_run.MODEL, most, 1, 20)
    assert (small.length, small.question_length, small.rounds) == (256, 64, 1)
    large = buckets.spec(tiny_run.MODEL, most._replace(rounds=5), 1, 257)
    assert large == dataclasses.replace(small, question_length=1024, rounds=16)


def test_the_guide_says_whose_questions_the_encoder_reads(tmp_path):
    tokenizer, buckets = make_tokenizer(tmp_path), Buckets((200,), (64,), (2,))
    read, keys = {}, set()
    for guide in ("first_round", "all_rounds"):
        model = dataclasses.replace(tiny_run.MODEL, guide=guide)
        prompts = Prompts(dataclasses.replace(config(), model=model), tokenizer, buckets)
        read[guide] = [prompts.example(record(0, rounds=rounds)).question_ids.tolist() for rounds in (1, 2)]
        keys.add(ExampleMaker(model, tokenizer, "phi3").lengths_key)
    assert read["first_round"][0] == read["first_round"][1] == read["all_rounds"][0] != read["all_rounds"][1]
    assert len(keys) == 2, "lengths stored for one guide would be used for the other"
    with pytest.raises(UserError, match=r"model\.guide='last_round'"):
        dataclasses.replace(tiny_run.MODEL, guide="last_round")
