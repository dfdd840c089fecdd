"""Writes questions that need several steps, with answers of at least a hundred words.

Every sentence is based on the scene graph, so that each can be checked separately (`claims.py`).
"""

import dataclasses
import itertools
import random
from collections.abc import Callable

from fusion_jax.synth.worlds.scenes import graph, language, write
from fusion_jax.synth.worlds.scenes.graph import Scene
from fusion_jax.synth.worlds.scenes.lexicon import COLUMNS, NOUNS, NUMBERS
from fusion_jax.synth.worlds.scenes.write import be, called, count_words, where
from fusion_jax.synth.worlds.words import article, capital

LOW, HIGH = 100, 500


@dataclasses.dataclass(frozen=True)
class Thought:
    """A question, the steps that answer it and the conclusion."""

    question: str
    steps: tuple[str, ...]
    conclusion: str


def _observe(scene: Scene, rng: random.Random) -> list[str]:
    place = scene.place
    observations = [f"The scene is set {place.preposition} {article(place.phrase)}."]
    for group in rng.sample(scene.groups, len(scene.groups)):
        verb = write.stands(group, rng)
        observations.append(
            rng.choice(
                (
                    f"{capital(where(group, rng))} {verb} {group.full}.",
                    f"{capital(group.full)} {verb} {where(group, rng)}.",
                    f"{capital(where(group, rng))} I can see {group.full}.",
                )
            )
        )
    return observations


def _uses(scene: Scene, rng: random.Random) -> Thought | None:
    group = rng.choice(scene.groups)
    use = NOUNS[group.noun].use
    if sum(NOUNS[g.noun].use == use for g in scene.groups) > 1:
        return None
    steps = [f"{capital(article(NOUNS[g.noun].name))} {NOUNS[g.noun].use}." for g in scene.groups if g is not group]
    steps.insert(0, "To answer, I ask of one thing after the other what it is good for or what it does.")
    steps.append(f"That leaves {group.full}: {article(NOUNS[group.noun].name)} {use}.")
    return Thought(
        f"Which thing in the picture {use}?",
        tuple(steps),
        f"So the question is answered by {called(scene, group)}.",
    )


def _order(scene: Scene, rng: random.Random) -> Thought | None:
    columns = [[g for g in scene.groups if g.column == column] for column in COLUMNS]
    if any(len(groups) > 1 for groups in columns) or sum(map(len, columns)) < 2:
        return None
    order = [groups[0] for groups in columns if groups]
    steps = ["To find the order, I compare the things by how far to the left they are, not by how near they are."]
    for a, b in itertools.pairwise(order):
        steps.append(f"{capital(called(scene, a))} {be(a)} to the left of {called(scene, b)}.")
    names = [called(scene, g) for g in order]
    listed = ", then ".join(names)
    return Thought(
        "In which order would someone who crosses the picture from left to right pass the things?",
        tuple(steps),
        f"From one side to the other one would therefore pass {listed}.",
    )


def _take_away(scene: Scene, rng: random.Random) -> Thought | None:
    total = sum(group.count for group in scene.groups)
    group = rng.choice(scene.groups)
    left = total - group.count
    if left == 0:
        return None
    steps = ["First I count everything that is not part of the surroundings."]
    running = 0
    for g in scene.groups:
        running += g.count
        steps.append(f"With {NUMBERS[g.count]} {g.colour} {g.words} the count comes to {NUMBERS[running]}.")
    steps.append(f"There are {NUMBERS[total]} things in all.")
    steps.append(f"Taking away {called(scene, group)} means taking away {NUMBERS[group.count]}.")
    return Thought(
        f"How many things would be left, apart from the surroundings, if {called(scene, group)} were taken away?",
        tuple(steps),
        f"{capital(NUMBERS[total])} less {NUMBERS[group.count]} leaves {NUMBERS[left]}.",
    )


def _near(scene: Scene, rng: random.Random) -> Thought | None:
    front = [g for g in scene.groups if g.row == "front"]
    back = [g for g in scene.groups if g.row == "back"]
    if len(front) != 1 or not back:
        return None
    near = front[0]
    steps = [
        "What stands lower in the picture is nearer to the viewer, and near things cover the feet of those behind them."
    ]
    for g in back:
        steps.append(f"{capital(called(scene, near))} {be(near)} in front of {called(scene, g)}.")
    return Thought(
        "Of everything that stands on the ground, what could the viewer reach first, and how can one tell?",
        tuple(steps),
        f"The viewer would reach {called(scene, near)} first.",
    )


def _inside(scene: Scene, rng: random.Random) -> Thought | None:
    place = scene.place
    side = "indoors" if place.indoors else "outdoors"
    steps = [
        "The things alone do not settle this, since they could be carried anywhere; the surroundings have to tell.",
        f"The lower part of the picture shows {place.ground}.",
        f"At the far end one sees {place.behind}.",
        place.mood,
        f"All of this belongs to {article(place.phrase)}.",
    ]
    return Thought(
        "Was this scene set up indoors or outdoors, and what gives it away?",
        tuple(steps),
        f"Taken together, the surroundings show that the scene is {side}.",
    )


def _claimed(scene: Scene, rng: random.Random) -> Thought | None:
    right = rng.random() < 0.5
    noun = rng.choice([g.noun for g in scene.groups] if right else graph.absent_nouns(scene))
    question = f"Someone claims to see {article(noun)} in this picture. Is that right, and how would you check?"
    steps = ["The way to check is to go through the picture row by row and name all there is."]
    rows = {"air": "in the upper part", "back": "further back", "front": "in the foreground"}
    for row, words in rows.items():
        groups = [g for g in scene.groups if g.row == row]
        if groups:
            steps.append(f"There {be(groups[0])} {write.listed([g.full for g in groups])} {words}, and nothing else.")
    if right:
        return Thought(question, tuple(steps), f"There {_amount(scene, noun)} among them, so the claim is right.")
    return Thought(question, tuple(steps), f"No {noun} is among them, so the claim is not right: there is no {noun}.")


def _amount(scene: Scene, noun: str) -> str:
    """ "is one apple", "are three apples"."""
    count = scene.count(noun)
    return f"is one {noun}" if count == 1 else f"are {NUMBERS[count]} {NOUNS[noun].plural}"


_THOUGHTS: tuple[Callable[[Scene, random.Random], Thought | None], ...] = (
    _uses,
    _order,
    _take_away,
    _near,
    _inside,
    _claimed,
)


def _spare(scene: Scene, rng: random.Random) -> list[str]:
    """True sentences that lengthen an answer."""
    pairs = [(a, r, b) for a, r, b in graph.relations(scene)]
    rng.shuffle(pairs)
    spare, seen = [], set()
    for a, relation, b in pairs:
        if frozenset((a, b)) not in seen:
            seen.add(frozenset((a, b)))
            spare.append(write.relation_sentence(scene, a, relation, b, rng))
    absent = rng.sample(graph.absent_nouns(scene), 4)
    spare = spare[:5]
    spare += [f"There is no {noun} that could change this." for noun in absent[:1]]
    spare += [f"I also made sure that there is no {absent[1]} and no {absent[2]}.", scene.place.mood]
    spare += [
        "Nothing else in the picture speaks against it.",
        "The shapes are clear enough to name each thing with confidence.",
        "Colors and outlines leave no doubt about what is what.",
        "None of this depends on anything outside the frame of the picture.",
        "Each of these steps can be checked by looking again.",
    ]
    return spare


def answers(scene: Scene, rng: random.Random, most: int) -> list[tuple[str, str]]:
    """Up to `most` questions with their answers."""
    pairs = []
    for think in rng.sample(_THOUGHTS, len(_THOUGHTS)):
        thought = think(scene, rng)
        if thought is None or len(pairs) == most:
            continue
        pairs.append((thought.question, _at_length(scene, thought, rng)))
    return pairs


def _at_length(scene: Scene, thought: Thought, rng: random.Random) -> str:
    """Joins enough observations to make the answer long enough, then the steps, without repeating a relation."""
    sentences = _observe(scene, rng)
    related = {_pair_of(step) for step in thought.steps} - {None}
    goal = rng.randint(LOW + 5, LOW + 40)
    for extra in _spare(scene, rng):
        if count_words(" ".join([*sentences, *thought.steps, thought.conclusion])) >= goal:
            break
        if extra not in thought.steps and _pair_of(extra) not in related:
            sentences.append(extra)
    return " ".join([*sentences, *thought.steps, thought.conclusion])


def _pair_of(sentence: str) -> frozenset[str] | None:
    """The two nouns that a sentence puts in relation."""
    named = language.mentions(sentence)
    related = len(named) == 2 and language.relation_between(sentence, *named)
    return frozenset(mention.noun for mention in named) if related else None
