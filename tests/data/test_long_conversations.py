"""Conversations that lose their last rounds: as many as if dropped one by one, in time linear in their length."""

import dataclasses

import numpy as np
import pytest
from helpers.fixtures import tiny

from fusion_jax.data import conversation
from fusion_jax.data.examples import ExampleMaker, layout_spec
from fusion_jax.data.layout import check_fits
from fusion_jax.data.sources import Record
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import BadRecord
from fusion_jax.synth.tokenizer import train_tokenizer

WORDS = [
    "red",
    "blue",
    "green",
    "cube",
    "ball",
    "cone",
    "left",
    "right",
    "up",
    "down",
    "many",
    "few",
    "what",
    "is",
    "there",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([f"What is {a} {b}? It is {a}." for a in WORDS for b in WORDS], folder, vocab_size=340)
    return load_tokenizer(folder)


def one_by_one(maker, record, spec, latents):
    """The plain way: every shorter conversation is tokenized."""
    example, turns, dropped = maker.text(record), record.turns, 0
    while True:
        try:
            check_fits(example, spec, latents)
            return dataclasses.replace(example, dropped_rounds=dropped)
        except BadRecord:
            if len(turns) < 4 or any(conversation.IMAGE_TAG in turn["value"] for turn in turns[-2:]):
                raise
            turns, dropped = turns[:-2], dropped + 1
            example = maker.text(dataclasses.replace(record, turns=turns))


def drawn(rng, number):
    """A record of up to 14 rounds; images, their places, a greeting and empty questions vary."""

    def said(most):
        return " ".join(rng.choice(WORDS, rng.integers(1, most)))

    rounds, images = int(rng.integers(1, 15)), int(rng.integers(0, 4))
    questions = [said(12) if rng.random() < 0.9 else " " for _ in range(rounds)]
    tagged = rng.integers(0, min(rounds, 1 + int(rng.integers(0, 6))), images)
    if images != 1 or rng.random() < 0.7:  # one image may do without a tag
        for place in tagged:
            questions[place] = f"<image>\n{questions[place]}" if rng.random() < 0.7 else f"{questions[place]} <image>"
    turns = [turn for q in questions for turn in ({"from": "human", "value": q}, {"from": "gpt", "value": said(30)})]
    if rng.random() < 0.2:
        turns.insert(0, {"from": "gpt", "value": "Hello."})
    return Record(f"r{number}", None, turns, f"record {number}", tuple(b"" for _ in range(images)))


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("exchange", [True, False])
def test_the_same_rounds_stay_as_when_they_go_one_by_one(tokenizer, preset, exchange):
    model = tiny(preset, latent_counts=(1, 4), semantic_exchange=exchange, **{"llm.vocab_size": 640})
    maker, rng = ExampleMaker(model, tokenizer, "phi3"), np.random.default_rng(0)
    ends = {"whole": 0, "shorter": 0, "bad": 0}
    for number in range(150):
        record = drawn(rng, number)
        spec = layout_spec(
            model, *(int(rng.integers(low, high)) for low, high in ((60, 900), (4, 120), (1, 12), (1, 5)))
        )
        found = []
        for fit in (lambda *of: maker.fitting(*of), lambda *of: one_by_one(maker, *of)):
            try:
                found.append(fit(record, spec, 4 * exchange))
            except BadRecord as bad:
                found.append(bad)
        ours, plain = found
        if isinstance(plain, BadRecord):
            assert isinstance(ours, BadRecord) and str(ours) == str(plain) and ours.reason == plain.reason
        else:
            for name in ("input_ids", "labels", "question_ids"):
                np.testing.assert_array_equal(getattr(ours, name), getattr(plain, name))
            assert ours.dropped_rounds == plain.dropped_rounds and ours.tilings == plain.tilings
        ends["bad" if isinstance(plain, BadRecord) else "shorter" if plain.dropped_rounds else "whole"] += 1
    assert min(ends.values()) >= 15, ends


@pytest.mark.parametrize("limits", [(2048, 1024, 8), (600, 1024, 400), (10_000, 300, 400), (10_000, 100, 400)])
def test_a_conversation_of_many_rounds_is_tokenized_a_few_times(tokenizer, limits, monkeypatch):
    model = tiny(latent_counts=(4,), **{"llm.vocab_size": 640})
    maker, texts = ExampleMaker(model, tokenizer, "phi3"), []
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "It is red."}]
    turns += [{"from": "human", "value": f"What is {i}?"} if k == 0 else {"from": "gpt", "value": f"It is {i}."}
              for i in range(399) for k in range(2)]  # fmt: skip
    text = ExampleMaker.text
    monkeypatch.setattr(ExampleMaker, "text", lambda *of, **more: texts.append(len(of[1].turns)) or text(*of, **more))
    example = maker.fitting(Record("r", None, turns, "r", (b"",)), layout_spec(model, *limits), 4)
    assert 0 < example.dropped_rounds < 400 and sum(texts) <= 12 * len(turns)
