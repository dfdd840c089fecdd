"""Captions, questions and answers about a scene, true by construction.

    scene --facts--> what may be asked of it, kind by kind, and the answer
          --pick---> one fact, rare answers as often as common ones
          --wording-> "What colour is the star?"   short answer "red"   sentence "The star is red."

A fact is kept only where the scene leaves one answer: "the star" needs a single star, "the thing on the left" a left
column with one thing in it. Answers are balanced because what counts is how much a model owes to the image: a model
that never looks should come no further than one over the number of possible answers.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence

from fusion_jax.synth.worlds.shapes import scene as scenes
from fusion_jax.synth.worlds.shapes.scene import CELLS, COLOURS, SHAPES, SIZES, WORDS, Scene, Thing

KINDS = ("colour", "shape", "place", "count", "word", "choice", "exists", "size")
NUMBERS = ("zero", "one", "two", "three", "four")

ANSWERS = {
    "colour": COLOURS,
    "shape": SHAPES,
    "place": CELLS,
    "count": NUMBERS,
    "word": WORDS,
    "exists": ("yes", "no"),
    "size": SIZES,
}

# Questions of two answers are few: half of them come right without looking.
SHARES = {"colour": 8, "shape": 6, "place": 8, "count": 7, "word": 6, "choice": 5, "exists": 4, "size": 4}

# Further rounds cannot choose their scene, and few find a word to ask about: these weights bring stage 2 to `SHARES`.
ROUND_SHARES = {"colour": 7, "shape": 8, "place": 8, "count": 4, "word": 25, "exists": 2, "size": 1}
SENTENCE_SHARES = {"colour": 7, "shape": 7, "place": 7, "count": 6, "word": 10, "exists": 5, "size": 4, "describe": 5}

# Every scene has a count of zero of something; without this it would be the answer to a third of the further rounds.
ANSWER_WEIGHTS = {"zero": 0.3, "one": 0.3, "two": 1.2, "three": 1.8, "four": 2.2}

CHOICE_OF = ("colour", "shape", "place", "count", "word")  # what a multiple choice question may be about
OPTIONS = 3

PLACE_PHRASES = {
    "top left": "at the top left",
    "top": "at the top",
    "top right": "at the top right",
    "left": "on the left",
    "center": "in the center",
    "right": "on the right",
    "bottom left": "at the bottom left",
    "bottom": "at the bottom",
    "bottom right": "at the bottom right",
}
ROW_PHRASES = ("at the top", "in the middle", "at the bottom")

# {s} is what is asked about, {be} is or are. Stage 1.5, stage 2 and the held-out questions share the wordings.
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
class Fact:
    """Something that may be asked of a scene.

    Attributes:
      kind: one of `KINDS` but "choice", or "describe" (sentences only).
      form: how the subject is named; facts of one kind are picked form by form so that none crowds out another.
      subject: the words for what is asked about ("the star", "squares", "a red ring"), empty for the word.
      answer: the short answer.
      statement: the answer as a sentence.
      plural: the subject takes "are".
    """

    kind: str
    form: str
    subject: str
    answer: str
    statement: str
    plural: bool = False


@dataclasses.dataclass(frozen=True)
class Round:
    """One question, one answer; a multiple choice question (`kind` "choice") has options, one of them the answer."""

    kind: str
    question: str
    answer: str
    options: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Target:
    """The question a picture is drawn for: a scene is drawn again until it can be asked with this answer.

    For "choice", `about` is the kind of the fact behind it and `answer` that fact's answer.
    """

    kind: str
    answer: str
    about: str = ""


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _name(thing: Thing, attributes: Sequence[str]) -> str:
    """The noun phrase of a thing by some of its attributes: "small red star", "red thing", "star"."""
    words = [getattr(thing, attribute) for attribute in ("size", "colour") if attribute in attributes]
    return " ".join([*words, thing.shape if "shape" in attributes else "thing"])


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


# By how a kind may name its subject. Size is used only where the shorter name fits several things.
_NAMED_BY = {
    "colour": (("shape",), ("shape", "size")),
    "shape": (("colour",), ("colour", "size")),
    "place": (("shape",), ("colour",), ("shape", "colour")),
    "size": (("shape",), ("colour",), ("shape", "colour")),
}


def _same(scene: Scene, thing: Thing, attributes: Sequence[str]) -> list[Thing]:
    return [other for other in scene.things if all(getattr(other, a) == getattr(thing, a) for a in attributes)]


def _alone_there(scene: Scene, thing: Thing) -> bool:
    """Whether "on the left" and the like can mean this thing only: no other thing lies on that side of the grid."""
    row, column = divmod(thing.cell, 3)
    others = [divmod(other.cell, 3) for other in scene.things if other != thing]
    if (row == 1) == (column == 1):  # a corner or the center has a name of its own
        return True
    if column == 1:
        return all(other_row != row for other_row, _ in others)
    return all(other_column != column for _, other_column in others)


def _subjects(scene: Scene, kind: str):
    """Yields (form, subject, thing) for each way to name exactly one thing without giving away what is asked."""
    for thing in scene.things:
        for attributes in _NAMED_BY[kind]:
            if len(_same(scene, thing, attributes)) > 1:
                continue
            if "size" in attributes and len(_same(scene, thing, attributes[:1])) == 1:
                continue
            yield "+".join(attributes), f"the {_name(thing, attributes)}", thing
        if kind != "place" and _alone_there(scene, thing):
            yield "cell", f"the thing {PLACE_PHRASES[thing.place]}", thing
    if len(scene.things) == 1:
        yield "only", "the thing", scene.things[0]


def _colour_facts(scene: Scene) -> list[Fact]:
    found = [
        Fact("colour", form, s, thing.colour, f"{_capital(s)} is {thing.colour} in colour.")
        for form, s, thing in _subjects(scene, "colour")
    ]
    for shape in SHAPES:
        group = [thing for thing in scene.things if thing.shape == shape]
        if len(group) > 1 and len({thing.colour for thing in group}) == 1:
            s, colour = f"the {plural(shape)}", group[0].colour
            found.append(Fact("colour", "plural", s, colour, f"{_capital(s)} are {colour} in colour.", plural=True))
    return found


def _shape_facts(scene: Scene) -> list[Fact]:
    found = [
        Fact("shape", form, s, thing.shape, f"{_capital(s)} is a {thing.shape}.")
        for form, s, thing in _subjects(scene, "shape")
    ]
    for colour in COLOURS:
        group = [thing for thing in scene.things if thing.colour == colour]
        if len(group) > 1 and len({thing.shape for thing in group}) == 1:
            s, shape = f"the {colour} things", group[0].shape
            found.append(Fact("shape", "plural", s, shape, f"{_capital(s)} are {plural(shape)}.", plural=True))
    return found


def _place_facts(scene: Scene) -> list[Fact]:
    return [
        Fact("place", form, s, thing.place, f"{_capital(s)} is {PLACE_PHRASES[thing.place]}.")
        for form, s, thing in _subjects(scene, "place")
    ]


def _size_facts(scene: Scene) -> list[Fact]:
    return [
        Fact("size", form, s, thing.size, f"{_capital(s)} is {thing.size} in size.")
        for form, s, thing in _subjects(scene, "size")
    ]


def _count_facts(scene: Scene) -> list[Fact]:
    def fact(form: str, noun: str, number: int) -> Fact:
        if number == 0:
            statement = f"There are no {plural(noun)} in the image."
        elif number == 1:
            statement = f"There is one {noun} in the image."
        else:
            statement = f"There are {NUMBERS[number]} {plural(noun)} in the image."
        return Fact("count", form, plural(noun), NUMBERS[number], statement)

    found = [fact("shape", shape, sum(thing.shape == shape for thing in scene.things)) for shape in SHAPES]
    found += [fact("colour", f"{c} thing", sum(thing.colour == c for thing in scene.things)) for c in COLOURS]
    # "shapes", not "things": nobody counts the written word among them.
    return [*found, fact("all", "shape", len(scene.things))]


def _exists_facts(scene: Scene, split: str) -> list[Fact]:
    pairs = {thing.pair for thing in scene.things}
    colours, shapes = {colour for colour, _ in pairs}, {shape for _, shape in pairs}
    found = []
    for shape in SHAPES:
        there = shape in shapes
        statement = f"Yes, there is a {shape}." if there else f"No, there is no {shape}."
        found.append(Fact("exists", "shape", f"a {shape}", "yes" if there else "no", statement))
    # Training text never names a pair kept for the held-out scenes: asked only where absent, it would teach "no".
    for colour, shape in scenes.SEEN if split == "train" else scenes.PAIRS:
        noun = f"{colour} {shape}"
        if (colour, shape) in pairs:
            found.append(Fact("exists", "pair", article(noun), "yes", f"Yes, there is {article(noun)}."))
        elif colour in colours or shape in shapes:  # half right: seeing the colour or the shape alone is not enough
            found.append(Fact("exists", "pair", article(noun), "no", f"No, there is no {noun}."))
    return found


def _word_facts(scene: Scene) -> list[Fact]:
    if scene.word is None:
        return []
    return [Fact("word", "word", "", scene.word.text, f"The written word is {scene.word.text}.")]


def _describe_facts(scene: Scene) -> list[Fact]:
    found = []
    for thing in scene.things:
        if _alone_there(scene, thing):
            noun, place = _name(thing, ("size", "colour", "shape")), PLACE_PHRASES[thing.place]
            found.append(Fact("describe", "cell", place, noun, f"{_capital(article(noun))} is {place}."))
    return found


def facts(scene: Scene, kind: str, split: str = "train") -> list[Fact]:
    """All that may be asked of the scene under a kind; each has one true answer. `split` limits the pairs named."""
    if kind == "exists":
        return _exists_facts(scene, split)
    return {
        "colour": _colour_facts,
        "shape": _shape_facts,
        "place": _place_facts,
        "count": _count_facts,
        "size": _size_facts,
        "word": _word_facts,
        "describe": _describe_facts,
    }[kind](scene)


def pick(found: Sequence[Fact], rng: random.Random, answer: str | None = None) -> Fact | None:
    """Picks an answer (unless given), then a form, then a fact; None where nothing fits."""
    if answer is None:
        answers = sorted({fact.answer for fact in found})
        if not answers:
            return None
        answer = rng.choices(answers, [ANSWER_WEIGHTS.get(a, 1.0) for a in answers])[0]
    fitting = [fact for fact in found if fact.answer == answer]
    if not fitting:
        return None
    form = rng.choice(sorted({fact.form for fact in fitting}))
    return rng.choice([fact for fact in fitting if fact.form == form])


def wording(fact: Fact, rng: random.Random) -> str:
    return rng.choice(WORDINGS[fact.kind]).format(s=fact.subject, be="are" if fact.plural else "is")


def short_round(fact: Fact, rng: random.Random) -> Round:
    return Round(fact.kind, wording(fact, rng), fact.answer)


def sentence_round(fact: Fact, rng: random.Random) -> Round:
    return Round(fact.kind, wording(fact, rng), fact.statement)


def choice_round(fact: Fact, rng: random.Random) -> Round:
    """The fact as multiple choice; the wrong options are any other answers of its kind."""
    wrong = [answer for answer in ANSWERS[fact.kind] if answer != fact.answer]
    options = [fact.answer, *rng.sample(wrong, OPTIONS - 1)]
    rng.shuffle(options)
    return Round("choice", wording(fact, rng), fact.answer, tuple(options))


def caption(scene: Scene, rng: random.Random) -> str:
    """A caption with every thing's size, colour, shape and place, and the word."""
    groups: dict[str, list[Thing]] = {}
    for thing in scene.things:
        groups.setdefault(_name(thing, ("size", "colour", "shape")), []).append(thing)
    parts = []
    for noun, group in groups.items():
        places = [PLACE_PHRASES[thing.place] for thing in group]
        parts.append(f"{_number_of(len(group), noun)} {_listed(places)}")
    # No words around it: each would take gradient from the shapes and colours, which are what there is to learn.
    sentence = f"{_capital(_listed(parts))}."
    if scene.word is None:
        return sentence
    place = ROW_PHRASES[scene.word.row]
    written = rng.choice(("The word {w} is written {p}.", "It says {w} {p}.")).format(w=scene.word.text, p=place)
    return f"{sentence} {written}"


def _number_of(number: int, noun: str) -> str:
    return f"a {noun}" if number == 1 else f"{NUMBERS[number]} {plural(noun)}"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def target(index: int, rng: random.Random) -> Target:
    """The question picture `index` is drawn for; kinds and answers take turns, so any long run is balanced."""
    cycle = _cycle()
    turn, slot = divmod(index, len(cycle))
    kind = cycle[slot]
    nth = turn * SHARES[kind] + cycle[:slot].count(kind)
    if kind != "choice":
        return Target(kind, ANSWERS[kind][nth % len(ANSWERS[kind])])
    about = CHOICE_OF[nth % len(CHOICE_OF)]
    return Target("choice", rng.choice(ANSWERS[about]), about)


def _cycle() -> tuple[str, ...]:
    """Kinds in the proportions of `SHARES`, dealt out one after the other."""
    rounds = itertools.zip_longest(*([kind] * share for kind, share in SHARES.items()))
    return tuple(kind for dealt in rounds for kind in dealt if kind is not None)


def target_scene(goal: Target, rng: random.Random, split: str = "train") -> tuple[Scene, Fact]:
    """Draws scenes until one can be asked the question of `goal`; returns it with the fact to ask about."""
    kind = goal.about or goal.kind
    while True:
        scene = scenes.random_scene(rng, split)
        fact = pick(facts(scene, kind, split), rng, goal.answer)
        if fact is not None:
            return scene, fact


_SINGULAR = {plural(noun): noun for noun in (*SHAPES, "thing", "shape")}


def _words(text: str) -> set[str]:
    bare = (word.strip(".,:?") for word in text.split())
    return {_SINGULAR.get(word, word) for word in bare}


_PLAIN = {"a", "an", "the", "thing", "shape"}


def _told(fact: Fact, history: set[str]) -> bool:
    """Whether earlier rounds may give the answer away: the round would teach to read the text instead of the image."""
    revealing = fact.subject if fact.kind in ("exists", "count") else fact.answer
    return bool((_words(revealing) - _PLAIN) & history) or bool(_words(fact.answer) & history)


def _more_rounds(
    scene: Scene,
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
        kinds.remove(kind)  # one of each kind: two rounds about two things
        history = set().union(*(_words(f"{r.question} {r.answer}") for r in rounds))
        left = [fact for fact in facts(scene, kind) if not _told(fact, history)]
        if kind == "exists" and len({fact.answer for fact in left}) < 2:
            continue  # what is there tends to be told already: the rest would be a row of "no"
        fact = pick(left, rng)
        if fact is not None:
            rounds.append(make(fact, rng))
    return rounds


def _some(rng: random.Random) -> int:
    """How many rounds a conversation has."""
    return rng.choices((1, 2), (0.3, 0.7))[0]


def sentence_rounds(scene: Scene, rng: random.Random) -> list[Round]:
    """One or two questions answered by sentences."""
    return _more_rounds(scene, _some(rng), (), SENTENCE_SHARES, rng, sentence_round)


def short_rounds(scene: Scene, first: Fact, rng: random.Random) -> list[Round]:
    """The fact that the picture was drawn for and maybe another one, answered in a word or two."""
    return _more_rounds(scene, _some(rng), (short_round(first, rng),), ROUND_SHARES, rng, short_round)


def choice_rounds(scene: Scene, first: Fact, rng: random.Random) -> list[Round]:
    """The same as multiple choice; another fact comes first where the picture's own has too few other answers."""
    if first.kind in CHOICE_OF:
        return [choice_round(first, rng)]
    return _more_rounds(scene, 1, (), dict.fromkeys(CHOICE_OF, 1), rng, choice_round)
