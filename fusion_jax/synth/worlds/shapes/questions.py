"""Writes captions, questions and answers about a grid of shapes, which are true by construction.

    grid --facts.facts--> facts of a kind, each with its answer
         --pick---------> one fact, rare answers as often as common ones
         --wording------> "What colour is the star?"   short answer "red"   sentence "The star is red."

Answers are balanced to measure how much a model uses the image: the accuracy of a model that ignores it should not
exceed one over the number of possible answers.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence

from fusion_jax.synth.worlds.shapes.facts import (
    ANSWERS,
    NUMBERS,
    PLACE_PHRASES,
    ROW_PHRASES,
    Fact,
    facts,
    noun_phrase,
    plural,
)
from fusion_jax.synth.worlds.shapes.grid import SHAPES, Grid, Thing, random_grid
from fusion_jax.synth.worlds.words import capital

# There are few questions with two answers, because half of them are right without seeing the image.
SHARES = {"colour": 8, "shape": 6, "place": 8, "count": 7, "word": 6, "choice": 5, "exists": 4, "size": 4}

# Further rounds cannot choose their grid, and few grids have a word; with these weights stage 2 has the `SHARES`.
ROUND_SHARES = {"colour": 7, "shape": 8, "place": 8, "count": 4, "word": 25, "exists": 2, "size": 1}
SENTENCE_SHARES = {"colour": 7, "shape": 7, "place": 7, "count": 6, "word": 10, "exists": 5, "size": 4, "describe": 5}

# Every grid has zero of something: without these weights a third of the further rounds would have that answer.
ANSWER_WEIGHTS = {"zero": 0.3, "one": 0.3, "two": 1.2, "three": 1.8, "four": 2.2}

CHOICE_OF = ("colour", "shape", "place", "count", "word")  # kinds of facts that a multiple choice question may be about
OPTIONS = 3

# {s} is the subject, {be} is "is" or "are". Stage 1.5, stage 2 and the held-out questions share the wordings.
WORDINGS = {
    "colour": ("What colour {be} {s}?", "Which colour {be} {s}?", "Tell me the colour of {s}."),
    "shape": ("What shape {be} {s}?", "Which shape {be} {s}?", "Tell me the shape of {s}."),
    "place": ("Where is {s}?", "Where in the image is {s}?", "Tell me the place of {s}."),
    "count": ("How many {s} are there?", "How many {s} do you see?", "Count the {s}."),
    "word": ("What word is written?", "Which word do you see?", "Read the word in the image."),
    "exists": ("Is there {s}?", "Do you see {s}?", "Is there {s} in the image?"),
    "size": ("Is {s} small or large?", "Is {s} large or small?", "What size is {s}?"),
    "describe": ("What is {s}?", "What do you see {s}?", "Tell me what is {s}."),
}


@dataclasses.dataclass(frozen=True)
class Round:
    """One question, one answer; a multiple choice question (`kind` "choice") has options, one of them the answer."""

    kind: str
    question: str
    answer: str
    options: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Target:
    """The question for which a picture is drawn: grids are made until one has this answer.

    For "choice", `about` is the kind of its fact and `answer` that fact's answer.
    """

    kind: str
    answer: str
    about: str = ""


def pick(candidates: Sequence[Fact], rng: random.Random, answer: str | None = None) -> Fact | None:
    """Picks an answer (unless it is passed), then a form, then a fact; None where nothing fits."""
    if answer is None:
        answers = sorted({fact.answer for fact in candidates})
        if not answers:
            return None
        answer = rng.choices(answers, [ANSWER_WEIGHTS.get(a, 1.0) for a in answers])[0]
    fitting = [fact for fact in candidates if fact.answer == answer]
    if not fitting:
        return None
    form = rng.choice(sorted({fact.form for fact in fitting}))
    return rng.choice([fact for fact in fitting if fact.form == form])


def wording(fact: Fact, rng: random.Random) -> str:
    """Writes a question about the fact in one of `WORDINGS`."""
    return rng.choice(WORDINGS[fact.kind]).format(s=fact.subject, be="are" if fact.plural else "is")


def short_round(fact: Fact, rng: random.Random) -> Round:
    """Makes a question with the short answer."""
    return Round(fact.kind, wording(fact, rng), fact.answer)


def sentence_round(fact: Fact, rng: random.Random) -> Round:
    """Makes a question with the answer as a sentence."""
    return Round(fact.kind, wording(fact, rng), fact.statement)


def choice_round(fact: Fact, rng: random.Random) -> Round:
    """Makes a multiple choice question of the fact; the wrong options are other answers of its kind."""
    wrong = [answer for answer in ANSWERS[fact.kind] if answer != fact.answer]
    options = [fact.answer, *rng.sample(wrong, OPTIONS - 1)]
    rng.shuffle(options)
    return Round("choice", wording(fact, rng), fact.answer, tuple(options))


def caption(grid: Grid, rng: random.Random) -> str:
    """Writes a caption with the size, colour, shape and place of every thing, and the word."""
    groups: dict[str, list[Thing]] = {}
    for thing in grid.things:
        groups.setdefault(noun_phrase(thing, ("size", "colour", "shape")), []).append(thing)
    parts = []
    for noun, group in groups.items():
        places = [PLACE_PHRASES[thing.place] for thing in group]
        parts.append(f"{_number_of(len(group), noun)} {_listed(places)}")
    # It has no other words: they would dilute the gradient of the shapes and colours, which are to be learned.
    sentence = f"{capital(_listed(parts))}."
    if grid.word is None:
        return sentence
    place = ROW_PHRASES[grid.word.row]
    written = rng.choice(("The word {w} is written {p}.", "It says {w} {p}.")).format(w=grid.word.text, p=place)
    return f"{sentence} {written}"


def _number_of(number: int, noun: str) -> str:
    return f"a {noun}" if number == 1 else f"{NUMBERS[number]} {plural(noun)}"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def target(index: int, rng: random.Random) -> Target:
    """The question for which picture `index` is drawn; kinds and answers alternate, so that long runs are balanced."""
    cycle = _cycle()
    turn, slot = divmod(index, len(cycle))
    kind = cycle[slot]
    nth = turn * SHARES[kind] + cycle[:slot].count(kind)
    if kind != "choice":
        return Target(kind, ANSWERS[kind][nth % len(ANSWERS[kind])])
    about = CHOICE_OF[nth % len(CHOICE_OF)]
    return Target("choice", rng.choice(ANSWERS[about]), about)


def _cycle() -> tuple[str, ...]:
    """Kinds in the proportions of `SHARES`, one after the other."""
    rounds = itertools.zip_longest(*([kind] * share for kind, share in SHARES.items()))
    return tuple(kind for cycle in rounds for kind in cycle if kind is not None)


def target_grid(goal: Target, rng: random.Random, split: str = "train") -> tuple[Grid, Fact]:
    """Makes grids until one fits the question of `goal`; returns it with the fact to ask about."""
    kind = goal.about or goal.kind
    while True:
        grid = random_grid(rng, split)
        fact = pick(facts(grid, kind, split), rng, goal.answer)
        if fact is not None:
            return grid, fact


_SINGULAR = {plural(noun): noun for noun in (*SHAPES, "thing", "shape")}


def _words(text: str) -> set[str]:
    bare = (word.strip(".,:?") for word in text.split())
    return {_SINGULAR.get(word, word) for word in bare}


_PLAIN = {"a", "an", "the", "thing", "shape"}


def _given_away(fact: Fact, history: set[str]) -> bool:
    """Whether earlier rounds may reveal the answer: the round would teach to read the text instead of the image."""
    revealing = fact.subject if fact.kind in ("exists", "count") else fact.answer
    return bool((_words(revealing) - _PLAIN) & history) or bool(_words(fact.answer) & history)


def _more_rounds(
    grid: Grid,
    count: int,
    start: Sequence[Round],
    shares: dict[str, int],
    rng: random.Random,
    make: Callable[[Fact, random.Random], Round],
) -> list[Round]:
    rounds = list(start)
    kinds = [kind for kind in shares if kind not in {r.kind for r in rounds}]
    while len(rounds) < count and kinds:
        kind = rng.choices(kinds, [shares[k] for k in kinds])[0]
        kinds.remove(kind)  # one of each kind, so that two rounds are about two things
        history = set().union(*(_words(f"{r.question} {r.answer}") for r in rounds))
        left = [fact for fact in facts(grid, kind) if not _given_away(fact, history)]
        if kind == "exists" and len({fact.answer for fact in left}) < 2:
            continue  # things in the picture are often named already: the rest would mostly be "no"
        fact = pick(left, rng)
        if fact is not None:
            rounds.append(make(fact, rng))
    return rounds


def _some(rng: random.Random) -> int:
    """Draws the number of rounds of a conversation."""
    return rng.choices((1, 2), (0.3, 0.7))[0]


def sentence_rounds(grid: Grid, rng: random.Random) -> list[Round]:
    """Makes one or two questions answered in sentences."""
    return _more_rounds(grid, _some(rng), (), SENTENCE_SHARES, rng, sentence_round)


def short_rounds(grid: Grid, first: Fact, rng: random.Random) -> list[Round]:
    """Asks about the fact for which the picture was drawn and maybe about another, with answers of a word or two."""
    return _more_rounds(grid, _some(rng), (short_round(first, rng),), ROUND_SHARES, rng, short_round)


def choice_rounds(grid: Grid, first: Fact, rng: random.Random) -> list[Round]:
    """Makes one multiple choice question, about the fact for which the picture was drawn, or about another where that
    fact has too few other answers."""
    if first.kind in CHOICE_OF:
        return [choice_round(first, rng)]
    return _more_rounds(grid, 1, (), dict.fromkeys(CHOICE_OF, 1), rng, choice_round)
