"""Texts of the embedded backend keep the rules of `english.py`, and no form of question gives its answer away."""

import itertools
import re
from collections import Counter

import english
import pytest

from fusion_jax.synth.backends import embedded
from fusion_jax.synth.kinds import KINDS
from fusion_jax.synth.worlds.scenes.lexicon import COLOURS, NOUNS

PER_KIND = 45
CAPTIONS = list(embedded.captions(PER_KIND * 5, 23))


def made(kind: str, number: int) -> tuple[list[str], list[dict]]:
    """Descriptions and pairs of a caption's sample."""
    model = embedded.LanguageModel()
    data = {"kind": kind, "caption": CAPTIONS[number % len(CAPTIONS)]}
    reply = model.chat([], None, number, "describe", data)
    data |= {"descriptions": KINDS[kind].descriptions(reply.parsed), "state": reply.state}
    if KINDS[kind].ask is None:
        return data["descriptions"], []
    return data["descriptions"], model.chat([], None, number, "qa", data).parsed["pairs"]


def test_captions_of_the_pool_are_right_english():
    assert not [fault for caption in CAPTIONS for fault in english.faults(caption)]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_right_english(kind):
    found = Counter()
    for number in range(PER_KIND):
        descriptions, pairs = made(kind, number)
        for text in (*descriptions, *(pair["question"] for pair in pairs)):
            found.update(english.faults(text))
        for pair in pairs:
            found.update(english.faults(pair["answer"], sentences=pair["answer"].endswith(".")))
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "Below there is two boards.",
        "The ground is brown boards of wood. The ground is brown boards of wood.",
        "The cats sits on the left.",
        "A cat stand on the left.",
        "There are a cat.",
        "Do the cat have a hat?",
        "Is the cats on the left?",
        "A orange ball.",
        "An red ball.",
        "The sign is blue. It is blue.",
        "What colour is it?",
        "the sign is blue.",
        "The sign is blue",
        "The the sign is blue.",
        "Three cat sit there.",
        "A small red cats can be seen.",
        "The cat is to the left of the duck. The gray duck stands to the right of the cat.",
        "There is a cat and a duck and a hat further back.",
        "The lanterns are high up on the left. The lanterns hang on the left-hand side high up.",
    ],
)
def test_the_rules_find_what_they_are_for(text):
    assert english.faults(text)


_NAMES = {word for noun in NOUNS.values() for word in (noun.name, noun.plural)}


def _form(question: str) -> str:
    """A question without what differs from picture to picture: "be the N to the left of the N"."""
    said = re.sub(r"\b(?:is|are|do|does|a|an)\b", "be", question.lower()).rstrip("?").split()
    return " ".join("N" if word in _NAMES else "C" if word in COLOURS else word for word in said)


@pytest.mark.parametrize("kind", ["conv_short", "conv_long", "multi_choice", "contrast_short", "reasoning"])
def test_no_form_of_question_has_one_sided_answers(kind):
    yes: dict[str, Counter] = {}
    first: Counter = Counter()
    letters: dict[int, Counter] = {}
    for number in range(PER_KIND * 5):
        _, pairs = made(kind, number)
        for pair in pairs:
            answer = pair["answer"]
            word = answer.split()[0].strip(",.").lower()
            if "claims to see" in pair["question"]:
                word = "no" if "not right" in answer else "yes"
            if word in ("yes", "no"):
                yes.setdefault(_form(pair["question"]), Counter())[word] += 1
            if kind != "conv_long" and ": " in pair["question"] and " or " in pair["question"]:
                options = pair["question"].split(": ")[1].rstrip("?").split(" or ")
                first[options[0] == answer] += len(options) == 2 and answer in options
        if kind == "multi_choice":
            for pair, (_, letter) in zip(pairs, KINDS[kind].turns(pairs, number), strict=True):
                letters.setdefault(len(pair["options"]), Counter())[letter] += 1
    for form, counts in yes.items():
        if counts.total() >= 40:
            assert 0.35 < counts["yes"] / counts.total() < 0.65, (form, counts)
    if first.total() >= 40:
        assert 0.35 < first[True] / first.total() < 0.65, first
    for options, counts in letters.items():
        if counts.total() >= 100:
            assert len(counts) == options and max(counts.values()) < 1.4 * min(counts.values()), letters


@pytest.mark.parametrize(
    ("kinds", "asked"),
    [
        (("conv_short", "multi_choice"), ("How many", "Is the scene", "Where", "In w", "What color")),
        (("contrast_short",), ("How many", "Which image")),
    ],
)
def test_no_form_has_an_answer_that_is_nearly_always_right(kinds, asked):
    answers: dict[str, Counter] = {}
    for number, kind in itertools.product(range(PER_KIND * 5), kinds):
        for pair in made(kind, number)[1]:
            if pair["question"].startswith(asked):
                answers.setdefault(_form(pair["question"]), Counter())[pair["answer"]] += 1
    assert sum(counts.total() for counts in answers.values()) > 400
    for form, counts in answers.items():
        if counts.total() >= 40:
            assert max(counts.values()) < (0.65 if len(counts) < 3 else 0.6) * counts.total(), (form, counts)
    shown = sum((counts for form, counts in answers.items() if form.startswith("which image")), Counter())
    if shown:
        assert 0.5 < shown["the left image"] / shown["the right image"] < 2, shown
