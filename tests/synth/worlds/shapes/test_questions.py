"""Answers are checked by a second reader that knows only the question's text and the things in the grid."""

import random
import re
from collections import Counter

import pytest

from fusion_jax.synth.worlds.shapes import facts, questions
from fusion_jax.synth.worlds.shapes import grid as grids
from fusion_jax.synth.worlds.shapes.grid import CELLS, COLOURS, SHAPES, WORDS, Grid, Thing, Word
from fusion_jax.synth.worlds.shapes.questions import CHOICE_OF, OPTIONS, Target

NUMBERS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4}
PHRASE = re.compile(
    r"(?:the |an? )?(?:(?P<size>small|large) )?(?:(?P<colour>" + "|".join(COLOURS) + r") )?"
    r"(?P<noun>thing|shape|" + "|".join(SHAPES) + r")(?P<many>e?s)?"
    r"(?: (?:at the|on the|in the) (?P<place>(?:top|bottom) (?:left|right)|top|bottom|left|right|center))?"
)


def matching(grid: Grid, phrase: str) -> list[Thing]:
    """The things a noun phrase may mean; a side of the picture ("on the left") takes in its whole row or column."""
    found = PHRASE.fullmatch(phrase)
    assert found, phrase
    sides = {"top": (0, 1, 2), "bottom": (6, 7, 8), "left": (0, 3, 6), "right": (2, 5, 8)}
    things = list(grid.things)
    if found["size"]:
        things = [t for t in things if t.size == found["size"]]
    if found["colour"]:
        things = [t for t in things if t.colour == found["colour"]]
    if found["noun"] in SHAPES:
        things = [t for t in things if t.shape == found["noun"]]
    if found["place"]:
        cells = sides.get(found["place"], (CELLS.index(found["place"]),))
        things = [t for t in things if t.cell in cells]
    return things


# What remains of a question is the noun phrase.
QUESTION_FORMS = (
    ("colour", r"(?:What colour|Which colour) (?:is|are) (.+)\?|Tell me the colour of (.+)\."),
    ("shape", r"(?:What shape|Which shape) (?:is|are) (.+)\?|Tell me the shape of (.+)\."),
    ("place", r"Where is (.+)\?|Where in the image is (.+)\?|Tell me the place of (.+)\."),
    ("size", r"Is (.+) small or large\?|Is (.+) large or small\?|What size is (.+)\?"),
    ("count", r"How many (.+) are there\?|How many (.+) do you see\?|Count the (.+)\."),
    ("exists", r"Is there (.+) in the image\?|Is there (.+)\?|Do you see (.+)\?"),
    ("word", r"What word is written\?|Which word do you see\?|Read the word in the image\."),
)


def true_answer(grid: Grid, question: str) -> str:
    """Answers by looking at the grid; fails where the question fits several answers."""
    question = question.split("\n")[0]
    for kind, form in QUESTION_FORMS:
        found = re.fullmatch(form, question)
        if not found:
            continue
        if kind == "word":
            return grid.word.text
        things = matching(grid, next(group for group in found.groups() if group))
        if kind == "count":
            return list(NUMBERS)[len(things)]
        if kind == "exists":
            return "yes" if things else "no"
        answers = {thing.place if kind == "place" else getattr(thing, kind) for thing in things}
        assert len(answers) == 1, (question, grid)
        plural = " are " in question or re.search(r"of the .*s\.$", question)
        assert len(things) == 1 or plural, (question, grid)
        return answers.pop()
    raise AssertionError(f"unknown question {question}")


def made(count: int = 500, split: str = "train"):
    for index in range(count):
        rng = random.Random(f"{split}/{index}")
        goal = questions.target(index, rng)
        grid, fact = questions.target_grid(goal, rng, split)
        yield goal, grid, fact, rng


@pytest.mark.parametrize("split", grids.SPLITS)
def test_short_answers_are_true(split):
    for goal, grid, fact, rng in made(split=split):
        rounds = questions.short_rounds(grid, fact, rng)
        assert 1 <= len(rounds) <= 2
        assert (rounds[0].kind, rounds[0].answer) == (goal.about or goal.kind, goal.answer)
        assert all(r.answer == true_answer(grid, r.question) for r in rounds)


def test_choices_hold_the_true_answer_once():
    for goal, grid, fact, rng in made():
        (asked,) = questions.choice_rounds(grid, fact, rng)
        assert asked.kind == "choice" and asked.answer == true_answer(grid, asked.question)
        assert fact.kind not in CHOICE_OF or asked.answer == goal.answer
        assert len(set(asked.options)) == OPTIONS and asked.answer in asked.options


def test_sentences_say_the_true_answer():
    for _, grid, _, rng in made():
        for r in questions.sentence_rounds(grid, rng):
            assert r.answer[0].isupper() and r.answer.endswith(".")
            if r.kind == "describe":
                size, colour, shape = re.match(r"An? (\w+) (\w+) (\w+) ", r.answer).groups()
                (thing,) = matching(grid, "the thing " + re.search(r"(at|on|in) the [a-z ]+", r.question)[0])
                assert (thing.size, thing.colour, thing.shape) == (size, colour, shape)
                continue
            answer = true_answer(grid, r.question)
            said = r.answer.lower().replace(" no ", " zero ") if r.kind == "count" else r.answer
            assert re.search(rf"\b{answer}(e?s)?\b", said, re.IGNORECASE), (r, answer)


def test_rounds_do_not_give_later_answers_away():
    for _, grid, fact, rng in made(300):
        rounds = questions.short_rounds(grid, fact, rng)
        for i, r in enumerate(rounds[1:], 1):
            if r.kind in ("colour", "shape", "place", "word"):
                before = " ".join(f"{earlier.question} {earlier.answer}" for earlier in rounds[:i])
                assert not re.search(rf"\b{r.answer}(e?s)?\b", before)


def test_captions_mention_everything():
    for _, grid, _, rng in made(300):
        caption = questions.caption(grid, rng)
        for thing in grid.things:
            assert re.search(rf"{thing.size} {thing.colour} {thing.shape}(e?s)?\b", caption)
            assert re.search(rf"(at|on|in) the {thing.place}\b", caption)
        assert (grid.word is None) == (not any(word in caption.split() for word in WORDS))
        assert grid.word is None or f" {grid.word.text} " in caption


def test_a_caption_word_for_word():
    things = (Thing("star", "red", "large", 0), Thing("ring", "orange", "small", 1), Thing("star", "red", "large", 3))
    grid = Grid(things, Word("CAT", 2), 0)
    said = {questions.caption(grid, random.Random(seed)) for seed in range(30)}
    shapes = "Two large red stars at the top left and on the left and a small orange ring at the top"
    assert said == {f"{shapes}. It says CAT at the bottom.", f"{shapes}. The word CAT is written at the bottom."}


def test_sides_are_named_only_when_one_thing_lies_there():
    corner, side = Thing("star", "red", "large", 0), Thing("ring", "blue", "small", 3)
    subjects = {fact.subject for fact in facts.facts(Grid((corner, side), None, 0), "colour")}
    assert "the thing at the top left" in subjects and "the thing on the left" not in subjects
    subjects = {fact.subject for fact in facts.facts(Grid((side,), None, 0), "colour")}
    assert "the thing on the left" in subjects


def test_training_text_never_names_a_held_out_pair():
    pairs = re.compile("|".join(f"{colour} {shape}" for colour, shape in grids.UNSEEN))
    for _, grid, fact, rng in made():
        rounds = [*questions.short_rounds(grid, fact, rng), *questions.sentence_rounds(grid, rng)]
        rounds += questions.choice_rounds(grid, fact, rng)
        assert not any(pairs.search(" ".join((r.question, r.answer, *r.options))) for r in rounds)
        assert not pairs.search(questions.caption(grid, rng))


def test_kinds_and_answers_take_turns():
    goals = [questions.target(index, random.Random(index)) for index in range(480)]
    kinds = Counter(goal.kind for goal in goals)
    two_answers = (kinds["exists"] + kinds["size"]) / len(goals)
    assert 0.14 < two_answers < 0.18
    for kind, answers in facts.ANSWERS.items():
        given = Counter(goal.answer for goal in goals if goal.kind == kind)
        assert set(given) == set(answers) and max(given.values()) - min(given.values()) <= 1
        share = questions.SHARES[kind] / sum(questions.SHARES.values())
        assert abs(kinds[kind] / len(goals) - share) < 0.01


def test_stage_2_is_balanced_as_a_whole():
    answers: dict[str, Counter] = {kind: Counter() for kind in facts.ANSWERS}
    for _, grid, fact, rng in made(1500):
        for r in questions.short_rounds(grid, fact, rng):
            answers[r.kind][r.answer] += 1
    total = sum(sum(given.values()) for given in answers.values())
    for kind, given in answers.items():
        count, fair = sum(given.values()), 1 / len(facts.ANSWERS[kind])
        assert max(given.values()) / count < 1.45 * fair, (kind, given)
        share = questions.SHARES[kind] / (sum(questions.SHARES.values()) - questions.SHARES["choice"])
        assert 0.7 * share < count / total < 1.25 * share, kind


def test_a_target_is_met():
    grid, fact = questions.target_grid(Target("choice", "FISH", "word"), random.Random(0))
    assert grid.word.text == "FISH"
    assert questions.choice_rounds(grid, fact, random.Random(0))[0].answer == "FISH"
