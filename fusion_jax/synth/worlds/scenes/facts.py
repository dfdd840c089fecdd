"""Lists the facts that may be asked about one scene, each with its only true answer.

`facts` lists them all, so that `claims.py` can look up the answer to a question; `choose` picks a few facts of
different topics.
"""

import dataclasses
import functools
import random

from fusion_jax.synth.worlds.scenes import graph, write
from fusion_jax.synth.worlds.scenes.graph import Group, Scene
from fusion_jax.synth.worlds.scenes.lexicon import COLOURS, COLUMNS, NOUNS, NUMBERS, ROWS, TEXTS
from fusion_jax.synth.worlds.scenes.settings import SETTINGS
from fusion_jax.synth.worlds.scenes.write import be, called, where
from fusion_jax.synth.worlds.words import article, capital

TOPICS = ("colour", "count", "place", "relation", "exists", "absent", "setting", "text", "which", "more")


@dataclasses.dataclass(frozen=True)
class Fact:
    """A fact that can be asked about.

    Attributes:
      topic: one of `TOPICS`. questions: wordings. about: their noun or setting, so that rounds differ.
      short: the answer in a word or phrase. sentence: the answer as a whole sentence.
      wrong: short answers of the same sort that are false here.
      key: the words that every right answer contains.
    """

    topic: str
    questions: tuple[str, ...]
    about: str
    short: str
    sentence: str
    wrong: tuple[str, ...]
    key: str


@functools.lru_cache(maxsize=64)  # used for every question of a sample
def by_question(scene: Scene) -> dict[str, Fact]:
    """{question in lower case: its fact}."""
    return {question.lower(): fact for fact in facts(scene) for question in fact.questions}


def facts(scene: Scene) -> list[Fact]:
    """All facts about a scene, in a fixed order."""
    facts: list[Fact] = []
    for group in scene.groups:
        facts += _of_group(scene, group)
    for a, relation, b in graph.relations(scene):
        facts += _of_relation(scene, a, relation, b)
    return [*facts, *_counts(scene), *_existence(scene), *_setting(scene), *_comparisons(scene)]


def _of_group(scene: Scene, group: Group) -> list[Fact]:
    name = called(scene, group)
    alone = group.colour not in name  # "the apples" means all of them
    facts = []
    if alone:
        wrong = tuple(c for c in COLOURS if c != group.colour)
        questions = (
            f"What color {be(group)} {name}?",
            f"Which color {'do' if group.plural else 'does'} {name} have?",
        )
        facts.append(
            Fact(
                "colour",
                questions,
                group.noun,
                group.colour,
                f"{capital(name)} {be(group)} {group.colour}.",
                wrong,
                group.colour,
            )
        )
    place = where(group)
    others = tuple(
        where(dataclasses.replace(group, row=r, column=c))
        for r in ROWS
        for c in COLUMNS
        if (r, c) != group.slot and (r == "air") == (group.row == "air")
    )
    questions = (f"Where {be(group)} {name}?", f"In which part of the picture {be(group)} {name}?")
    facts.append(Fact("place", questions, group.noun, place, f"{capital(name)} {be(group)} {place}.", others, place))
    if group.text:
        wrong = tuple(text for text in TEXTS if text not in [g.text for g in scene.groups])
        questions = (f"What is written on {name}?", f"What does {name} say?")
        sentence = f'{capital(name)} reads "{group.text}".'
        facts.append(Fact("text", questions, group.noun, group.text, sentence, wrong, group.text.lower()))
        if sum(g.text == group.text for g in scene.groups) == 1:
            carrier = f"{group.colour} {group.words}"
            carriers = [n for n in NOUNS if NOUNS[n].carrier]
            wrong = tuple(
                article(f"{c} {n}")
                for n in carriers
                for c in NOUNS[n].colours
                if scene.count(n, c) == 0 and n != group.noun
            )
            questions = (f'What carries the words "{group.text}"?', f'On what can one read "{group.text}"?')
            sentence = f'The words "{group.text}" are on the {carrier}.'
            facts.append(Fact("text", questions, f"words on {group.noun}", article(carrier), sentence, wrong, carrier))
            letters = write.ink(group)
            questions = (f"In which color are the letters on {name} written?",)
            sentence = f"The letters on {name} are written in {letters}, so they are easy to read."
            wrong = tuple(c for c in COLOURS if c != letters)
            facts.append(Fact("text", questions, f"letters on {group.noun}", letters, sentence, wrong, letters))
    return facts


def _of_relation(scene: Scene, a: Group, relation: str, b: Group) -> list[Fact]:
    first, second = called(scene, a), called(scene, b)
    opposite = graph.OPPOSITES[relation]
    facts = []

    def phrase(r: str) -> str:
        return f"to the {r}" if r in ("left of", "right of") else r

    sentence = f"{capital(first)} {be(a)} {phrase(relation)} {second}."
    about = f"{a.noun} and {b.noun}"
    if relation in ("left of", "right of"):
        sides = ("to the left", "to the right")
        right = sides[relation == "right of"]
        question = f"{capital(be(a))} {first} to the left or to the right of {second}?"
        facts.append(
            Fact("relation", (question,), about, right, sentence, tuple(s for s in sides if s != right), right)
        )
    yes = f"{capital(be(a))} {first} {phrase(relation)} {second}?"
    no = f"{capital(be(a))} {first} {phrase(opposite)} {second}?"
    facts.append(Fact("relation", (yes,), about, "yes", f"Yes, {sentence[0].lower()}{sentence[1:]}", ("no",), "yes"))
    facts.append(Fact("relation", (no,), about, "no", f"No, {sentence[0].lower()}{sentence[1:]}", ("yes",), "no"))
    alone = sum(graph.holds(relation, other, b) for other in scene.groups) == 1
    if alone and relation in ("above", "below", "in front of", "behind"):
        question = f"What is {relation} {second}?"
        wrong = tuple(g.full for g in scene.groups if g not in (a, b))
        wrong += tuple(
            article(f"{a.colour} {n}") for n in graph.absent_nouns(scene) if NOUNS[n].air == NOUNS[a.noun].air
        )
        full = f"{capital(a.full)} {be(a)} {relation} {second}."
        facts.append(Fact("relation", (question,), about, a.full, full, wrong[:8], f"{a.colour} {a.words}"))
    return facts


def _counts(scene: Scene) -> list[Fact]:
    facts = []
    for noun in dict.fromkeys(group.noun for group in scene.groups):
        number = scene.count(noun)
        plural = NOUNS[noun].plural
        clause = f"is one {noun}" if number == 1 else f"are {NUMBERS[number]} {plural}"
        questions = (f"How many {plural} are there?", f"How many {plural} can you count?")
        wrong = tuple(n for n in NUMBERS[1:6] if n != NUMBERS[number])
        facts.append(
            Fact("count", questions, noun, NUMBERS[number], f"There {clause} in the picture.", wrong, NUMBERS[number])
        )
    total = sum(group.count for group in scene.groups)
    if total > 1:
        question = "How many things are there in all, not counting the surroundings?"
        wrong = tuple(n for n in NUMBERS[1:] if n != NUMBERS[total])
        sentence = f"There are {NUMBERS[total]} things in all."
        facts.append(Fact("count", (question,), "all", NUMBERS[total], sentence, wrong, NUMBERS[total]))
    return facts


def _existence(scene: Scene) -> list[Fact]:
    facts = []
    for group in scene.groups:
        named = article(group.noun)
        questions = (f"Is there {named} in the picture?", f"Can you see {named}?")
        sentence = f"Yes, there {be(group)} {group.full} {where(group)}."
        facts.append(Fact("exists", questions, group.noun, "yes", sentence, ("no",), "yes"))
        question = f"Is there {article(f'{group.colour} {group.noun}')} in the picture?"
        facts.append(Fact("exists", (question,), group.noun, "yes", sentence, ("no",), "yes"))
        for colour in COLOURS:
            if scene.count(group.noun, colour) == 0 and colour in NOUNS[group.noun].colours:
                question = f"Is there {article(f'{colour} {group.noun}')} in the picture?"
                sentence = f"No, there is no {colour} {group.noun} in the picture."
                facts.append(Fact("absent", (question,), group.noun, "no", sentence, ("yes",), "no"))
    for noun in graph.absent_nouns(scene):
        questions = (f"Is there {article(noun)} in the picture?", f"Can you see {article(noun)}?")
        facts.append(Fact("absent", questions, noun, "no", f"No, there is no {noun} in the picture.", ("yes",), "no"))
    return facts


def _setting(scene: Scene) -> list[Fact]:
    place = scene.place
    here = f"{place.preposition} {article(place.phrase)}"
    wrong = tuple(f"{s.preposition} {article(s.phrase)}" for s in SETTINGS.values() if s is not place)
    questions = ("Where does the scene take place?", "In what surroundings are the things shown?")
    facts = [Fact("setting", questions, "setting", here, f"The scene takes place {here}.", wrong, place.phrase)]
    side, other = ("indoors", "outdoors") if place.indoors else ("outdoors", "indoors")
    question = "Is the scene indoors or outdoors?"
    sentence = f"The scene is {side}, {here}."
    facts.append(Fact("setting", (question,), "side", side, sentence, (other,), side))
    wrong = tuple(s.ground for s in SETTINGS.values() if s is not place)
    question = "What does the lower part of the picture show, apart from the things?"
    sentence = f"The lower part of the picture shows {place.ground}."
    facts.append(Fact("setting", (question,), "ground", place.ground, sentence, wrong, place.ground))
    return facts


def _comparisons(scene: Scene) -> list[Fact]:
    facts = []
    alone = [group for group in scene.groups if scene.count(group.noun) == group.count]
    for a in alone:
        for b in alone:
            if a is b:
                continue
            first, second = f"the {a.words}", f"the {b.words}"
            if a.colour != b.colour:
                questions = tuple(
                    f"Which of these is {a.colour}: {x} or {y}?" for x, y in ((first, second), (second, first))
                )
                sentence = f"{capital(first)} {be(a)} {a.colour}, and {second} {be(b)} {b.colour}."
                facts.append(Fact("which", questions, f"{a.noun} or {b.noun}", first, sentence, (second,), first))
            if a.count > b.count:
                one, other = NOUNS[a.noun].plural, NOUNS[b.noun].plural
                questions = tuple(f"Are there more {x} or more {y}?" for x, y in ((one, other), (other, one)))
                sentence = f"There are more {one} than {other}: {NUMBERS[a.count]} against {NUMBERS[b.count]}."
                facts.append(
                    Fact("more", questions, f"{a.noun} and {b.noun}", f"more {one}", sentence, (f"more {other}",), one)
                )
    return facts


# Answers to "how many" that are true of most pictures: with this probability a fact with another answer comes first.
_TOO_OFTEN = {"one": 0.75, "six": 0.8}


def choose(scene: Scene, rng: random.Random, most: int, topics: tuple[str, ...] = TOPICS) -> list[Fact]:
    """Chooses up to `most` facts: topics take turns in a random order, and no topic asks about one thing twice."""
    pools: dict[str, list[Fact]] = {topic: [] for topic in topics}
    for fact in facts(scene):
        if fact.topic in pools:
            pools[fact.topic].append(fact)
    order = [topic for topic in topics if pools[topic]]
    rng.shuffle(order)
    for pool in pools.values():
        rng.shuffle(pool)
        pool.sort(key=lambda fact: rng.random() < _TOO_OFTEN.get(fact.short, 0.0) and fact.topic == "count")
    chosen: list[Fact] = []
    while order and len(chosen) < most:
        for topic in list(order):
            pool = pools[topic]
            fresh = next((f for f in pool if (topic, f.about) not in {(c.topic, c.about) for c in chosen}), None)
            if fresh is None:
                order.remove(topic)
            elif len(chosen) < most:
                pool.remove(fresh)
                chosen.append(fresh)
    return chosen


# What the sentence of a topic already states; details add something else.
_COVERED = {
    "colour": ("colour",),
    "place": ("place",),
    "exists": ("colour", "place"),
    "relation": ("relation",),
    "text": ("colour",),
    "which": ("colour",),
}


def details(scene: Scene, fact: Fact, rng: random.Random) -> list[str]:
    """True sentences about the things of a fact, for long answers; none of them repeats the fact."""
    sentences = []
    covered = _COVERED.get(fact.topic, ())
    for group in scene.groups:
        if group.noun not in fact.about.split():
            continue
        name = called(scene, group)
        if "place" not in covered:
            sentences.append(f"{capital(name)} {write.stands(group, rng)} {where(group, rng)}.")
        if "colour" not in covered and group.colour not in name:
            sentences.append(f"{'They are' if group.plural else 'It is'} {group.colour}.")
        others = [(a, r, b) for a, r, b in graph.relations(scene) if a == group]
        if others and "relation" not in covered:
            sentences.append(write.relation_sentence(scene, *rng.choice(others), rng))
    return sentences
