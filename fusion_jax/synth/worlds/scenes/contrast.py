"""Lists the facts that may be asked about a left and a right picture together."""

import functools
import random

from fusion_jax.synth.worlds.scenes.facts import Fact
from fusion_jax.synth.worlds.scenes.graph import Group, Scene
from fusion_jax.synth.worlds.scenes.lexicon import NOUNS, NUMBERS
from fusion_jax.synth.worlds.scenes.settings import SETTINGS
from fusion_jax.synth.worlds.scenes.write import be, where
from fusion_jax.synth.worlds.words import article

SIDES = ("left", "right")
IMAGES = ("the left image", "the right image", "both images", "neither image")


def _number(count: int, noun: str) -> str:
    return f"one {noun}" if count == 1 else f"{NUMBERS[count]} {NOUNS[noun].plural}"


@functools.lru_cache(maxsize=64)  # used for every question of a sample
def by_question(left: Scene, right: Scene) -> dict[str, Fact]:
    """{question in lower case: its fact}."""
    return {question.lower(): fact for fact in facts(left, right) for question in fact.questions}


def facts(left: Scene, right: Scene) -> list[Fact]:
    """All facts about the two pictures, in a fixed order."""
    scenes = (left, right)
    facts = [*_settings(scenes)]
    nouns = dict.fromkeys(group.noun for scene in scenes for group in scene.groups)
    hidden = {*left.place.shows, *right.place.shows}
    for noun in nouns:
        counts = [scene.count(noun) for scene in scenes]
        if all(counts):
            facts += _colours(scenes, noun)
            facts += _places(scenes, noun)
        if noun in hidden:
            continue
        facts += _which_image(noun, counts)
        if all(counts) and counts[0] != counts[1]:
            facts += _more(noun, counts)
        for side, count in zip(SIDES, counts):
            if count:
                question = f"How many {NOUNS[noun].plural} are there in the {side} image?"
                sentence = f"In the {side} image there {'is' if count == 1 else 'are'} {_number(count, noun)}."
                wrong = tuple(n for n in NUMBERS[1:5] if n != NUMBERS[count])
                facts.append(Fact("count", (question,), noun, NUMBERS[count], sentence, wrong, NUMBERS[count]))
    for noun in NOUNS:
        if noun not in nouns and noun not in hidden:
            facts += _which_image(noun, [0, 0])
    return facts


def _only(scene: Scene, noun: str) -> Group | None:
    groups = [group for group in scene.groups if group.noun == noun]
    return groups[0] if len(groups) == 1 else None


def _settings(scenes) -> list[Fact]:
    left, right = (f"{s.place.preposition} {article(s.place.phrase)}" for s in scenes)
    if left == right:
        sentence = f"Yes, both images are set {left}."
        same = Fact(
            "same", ("Are both images set in the same surroundings?",), "setting", "yes", sentence, ("no",), "yes"
        )
    else:
        sentence = f"No, the left image is set {left}, while the right image is set {right}."
        same = Fact(
            "same", ("Are both images set in the same surroundings?",), "setting", "no", sentence, ("yes",), "no"
        )
    facts = [same]
    for side, scene, here in zip(SIDES, scenes, (left, right)):
        question = f"Where does the scene in the {side} image take place?"
        wrong = tuple(f"{s.preposition} {article(s.phrase)}" for s in SETTINGS.values() if s is not scene.place)
        sentence = f"The scene in the {side} image takes place {here}."
        facts.append(Fact("setting", (question,), side, here, sentence, wrong, scene.place.phrase))
    return facts


def _which_image(noun: str, counts: list[int]) -> list[Fact]:
    named = article(noun)
    short = IMAGES[(0 if counts[0] else 1) if bool(counts[0]) != bool(counts[1]) else (2 if counts[0] else 3)]
    if short == "both images":
        sentence = f"Both images show {named}."
    elif short == "neither image":
        sentence = f"Neither image shows {named}."
    else:
        sentence = f"Only {short} shows {named}."
    question = f"Which image shows {named}: the left one, the right one, both or neither?"
    wrong = tuple(image for image in IMAGES if image != short)
    key = short.replace(" images", "").replace(" image", "").replace("the ", "")
    return [Fact("image", (question,), noun, short, sentence, wrong, key)]


def _colours(scenes, noun: str) -> list[Fact]:
    groups = [_only(scene, noun) for scene in scenes]
    if None in groups:
        return []
    facts = []
    for side, group in zip(SIDES, groups):
        question = f"What color {be(group)} the {group.words} in the {side} image?"
        wrong = tuple(c for c in NOUNS[noun].colours if c != group.colour)
        sentence = f"In the {side} image the {group.words} {be(group)} {group.colour}."
        facts.append(Fact("colour", (question,), noun, group.colour, sentence, wrong, group.colour))
    a, b = groups
    if a.plural == b.plural:
        question = f"{'Do' if a.plural else 'Does'} the {a.words} have the same color in both images?"
        if a.colour == b.colour:
            short, sentence = "yes", f"Yes, in both images the {a.words} {be(a)} {a.colour}."
        else:
            short = "no"
            sides = [f"in the {s} image the {g.words} {be(g)} {g.colour}" for s, g in zip(SIDES, groups)]
            sentence = f"No, {sides[0]}, while {sides[1]}."
        wrong = ("no",) if short == "yes" else ("yes",)
        facts.append(Fact("same", (question,), noun, short, sentence, wrong, short))
    return facts


def _places(scenes, noun: str) -> list[Fact]:
    groups = [_only(scene, noun) for scene in scenes]
    if None in groups or groups[0].slot == groups[1].slot:
        return []
    a, b = groups
    question = f"Where {be(a)} the {a.words} in the left image?"
    sentence = f"In the left image the {a.words} {be(a)} {where(a)}."
    facts = [Fact("place", (question,), noun, where(a), sentence, (where(b),), where(a))]
    question = f"Where {be(b)} the {b.words} in the right image?"
    sentence = f"In the right image the {b.words} {be(b)} {where(b)}."
    return [*facts, Fact("place", (question,), noun, where(b), sentence, (where(a),), where(b))]


def _more(noun: str, counts: list[int]) -> list[Fact]:
    most = SIDES[counts[1] > counts[0]]
    question = f"Which image shows more {NOUNS[noun].plural}?"
    sentence = (
        f"There {_there(counts[0], noun)} in the left image, while there {_there(counts[1], noun)} in the right image, "
        f"so the {most} image shows more."
    )
    short = f"the {most} image"
    other = f"the {SIDES[counts[1] <= counts[0]]} image"
    return [Fact("more", (question,), noun, short, sentence, (other,), f"{most} image")]


def _there(count: int, noun: str) -> str:
    return f"{'is' if count == 1 else 'are'} {_number(count, noun)}"


def choose(left: Scene, right: Scene, rng: random.Random, most: int) -> list[Fact]:
    """Chooses up to `most` facts, each about a different thing, differences before similarities."""
    listed = facts(left, right)
    rng.shuffle(listed)
    there = {group.noun for scene in (left, right) for group in scene.groups} | {"setting", *SIDES}
    chosen: list[Fact] = []
    topics = ["image", "same", "count", "colour", "more", "place", "setting"]
    rng.shuffle(topics)
    for topic in topics * 2:
        pool = [f for f in listed if f.topic == topic and f.about not in {c.about for c in chosen}]
        # One question in four about what is in neither picture is enough.
        pool = [f for f in pool if f.about in there or rng.random() < 0.02]
        # Most things keep their colour, and most occur once: with this probability another answer comes first.
        usual, often = {"same": ("yes", 0.6), "count": ("one", 0.5)}.get(topic, ("", 0.0))
        if rng.random() < often:
            pool.sort(key=lambda f, usual=usual: f.short == usual)
        if pool and len(chosen) < most:
            chosen.append(pool[0])
    return chosen


def details(scene: Scene, side: str, fact: Fact) -> list[str]:
    """True sentences about one picture's part in an answer, none of which repeats the fact's own sentence."""
    group = _only(scene, fact.about) if fact.about in NOUNS else None
    if group is None or fact.topic == "place":
        return []
    # The sentence of a fact about number or colour already names both.
    named = f"the {group.words}" if fact.topic in ("colour", "same", "count", "more") else group.full
    return [f"In the {side} image, {named} {be(group)} {where(group)}."]
