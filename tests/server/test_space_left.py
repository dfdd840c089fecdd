"""What the page says about how much more fits, against what really does."""

import dataclasses
import re

import pytest
from helpers import tiny_run
from helpers.generation import QUESTIONS, config, picture

from fusion_jax.data.sources import Record
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import BadRecord
from fusion_jax.inference.prompts import Buckets, Prompts
from fusion_jax.server.space_left import space_left
from fusion_jax.synth.tokenizer import train_tokenizer

QUESTION = "Which of the two people in this picture is closer to the camera, and what is she holding in her hand?"


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    folder = train_tokenizer([*QUESTIONS, "A red circle and a blue star."], tmp_path_factory.mktemp("t"), 600)
    tokenizer = load_tokenizer(folder)

    def make(length, question=64, rounds=3, **model):
        run = dataclasses.replace(config(), model=dataclasses.replace(tiny_run.MODEL, **model))
        return Prompts(run, tokenizer, Buckets((length,), (question,), (rounds,), (0, 1)))

    return make


def record(questions, image=True):
    turns = []
    for question in questions:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": "A star."}]
    return Record("page", None, turns[:-1], "the page", (picture(1),) if image else (), literal=True)


@pytest.mark.parametrize(
    ("length", "question", "rounds", "rounds_used", "image", "sentence"),
    [
        (400, 500, 3, 1, True, r"Round 1 of 3; about \d+ words fit\."),
        (400, 500, 3, 2, True, r"Round 2 of 3; about \d+ more words fit\."),
        (400, 500, 3, 3, True, r"Round 3 of 3, the last one; about \d+ more words fit\."),
        (400, 500, 3, 4, True, r"All 3 rounds of this conversation are used: press New conversation to go on\."),
        (400, 500, 1, 1, True, r"Round 1 of 1; about \d+ words fit\."),
        (400, 500, 1, 2, True, r"The one round of a conversation is used: press New conversation to go on\."),
        (50, 500, 3, 2, True, r"No more words fit: press New conversation to go on\."),
        (400, 8, 3, 2, True, r"(No more words fit: press .*|Round 2 of 3; about [12] more words? fits?)\."),
        (20, 500, 3, 1, True, r"No question fits beside this image\."),
        (400, 8, 3, 1, False, r".*bout \d\d+ words fit, fewer beside an image\."),
    ],
)
def test_the_space_left_is_given_in_words(make, length, question, rounds, rounds_used, image, sentence):
    text = space_left(
        make(length, question, rounds), record(["Which colour is the star?"] * (rounds_used - 1) + ["?"], image)
    )
    assert re.fullmatch(sentence, text), text


def test_only_the_first_question_counts_where_it_alone_guides(make):
    long = record([" ".join(["red"] * 20)] * 2)
    assert space_left(make(400, 24), long).startswith("No more words fit")
    assert space_left(make(400, 24, guide="first_round"), long).startswith("Round 2 of 3; about")


@pytest.mark.parametrize("before", [[], ["Which colour is the star?"]])
def test_so_many_words_do_fit_and_not_many_more(make, before):
    prompts = make(300, 500)
    words = int(
        next(word for word in space_left(prompts, record([*before, "?"])).split() if word.isdigit() and int(word) > 5)
    )
    like = QUESTION.split()
    for count, fits in ((words - 2, True), (2 * words, False)):
        longer = record([*before, " ".join((like * count)[:count])])
        if fits:
            prompts.example(longer)
        else:
            with pytest.raises(BadRecord):
                prompts.example(longer)
