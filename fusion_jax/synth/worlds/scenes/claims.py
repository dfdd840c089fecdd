"""Checks whether an answer is true of a scene, as the oracle that verifies answers.

There are two tests, and both must pass:
1. If `facts.py` knows the question, the answer must contain the words that make it right.
2. All claims of its sentences must hold: what there is, how many, in which colour, where, in what relation, with what
   text.

A sentence without claims that this module can read passes. With two scenes, sentences name the picture that they are
about: "in the left image", "in the right image", "both images", "neither image".
"""

import re
from collections.abc import Sequence

from fusion_jax.synth.worlds.scenes import contrast, facts, graph, language
from fusion_jax.synth.worlds.scenes.graph import Group, Scene
from fusion_jax.synth.worlds.scenes.language import COUNT_WORDS, Mention
from fusion_jax.synth.worlds.scenes.lexicon import COLOUR_WORDS, NOUNS, NUMBERS

_COLOUR = "|".join(COLOUR_WORDS)
_IS_COLOUR = re.compile(rf"^\s*(?:,\s*which\s+)?(?:is|are)\s+(?:all\s+|both\s+)?({_COLOUR})\b(?!\s++[a-z]*\s*+letters)")
_THINGS = re.compile(rf"\b({'|'.join(NUMBERS)}) things\b")
_LESS = re.compile(r"\b({0}) less ({0}) leaves ({0})\b".format("|".join(NUMBERS)))
_IMAGES = re.compile(r"\b(?:(only )?the (left|right) image|(both|neither) (?:of the )?images?)\b")


def correct(question: str, answer: str, scenes: Sequence[Scene]) -> bool:
    """Whether an answer is right by the scene graph of one picture, or of a left and a right one."""
    known = facts.by_question(scenes[0]) if len(scenes) == 1 else contrast.by_question(*scenes)
    fact = known.get(" ".join(question.split("\n")[0].split()).lower())
    if fact is not None:
        text = " ".join(answer.lower().split()).rstrip(".").strip('"')
        if text == fact.short.lower():
            return True
        if text in {wrong.lower() for wrong in fact.wrong}:
            return False
        # "Yes" and "no" must be at the beginning; any other word may be anywhere.
        anywhere = "^" if fact.key in ("yes", "no") else r"(?<!\w)"
        if not re.search(rf"{anywhere}{re.escape(fact.key.lower())}(?!\w)", text):
            return False
    return true(answer, scenes)


def true(text: str, scenes: Sequence[Scene]) -> bool:
    """Whether every claim that can be read in a text holds."""
    last: list[list[Group]] = [[] for _ in scenes]
    for sentence in language.sentences(text):
        for part, which, negated in _parts(sentence, len(scenes)):
            for k in which:
                holds, named = _holds(part, scenes[k], last[k], negated)
                if not holds:
                    return False
                last[k] = named or last[k]
    return True


def _parts(sentence: str, scenes: int) -> list[tuple[str, tuple[int, ...], bool]]:
    """Yields the clauses of a sentence, with the scenes that each is about and whether it denies what it names."""
    if scenes == 1:
        return [(sentence, (0,), False)]
    parts = []
    for clause in re.split(r", (?:while|but|and|whereas) |; ", sentence):
        match = _IMAGES.search(clause.lower())
        if match is None:
            continue
        if match[3]:
            parts.append((clause, (0, 1), match[3] == "neither"))
        else:
            side = 0 if match[2] == "left" else 1
            parts.append((clause, (side,), False))
            if match[1]:
                parts.append((clause, (1 - side,), True))
    return parts


def _matching(mention: Mention, scene: Scene) -> list[Group]:
    return [
        group
        for group in scene.groups
        if group.noun == mention.noun
        and mention.colour in (None, group.colour)
        and (mention.size is None or mention.size == group.size)
    ]


def _holds(sentence: str, scene: Scene, last: list[Group], negated: bool) -> tuple[bool, list[Group]]:
    """Whether a clause is true of a scene, and the groups that it names."""
    low = language.mask(sentence)
    mentioned = language.mentions(sentence)
    groups = [_matching(mention, scene) for mention in mentioned]
    if not negated and not _surroundings_hold(sentence, low, scene):
        return False, []
    for mention, fitting in zip(mentioned, groups):
        if mention.negated or negated:
            if fitting:
                return False, []
            continue
        if not fitting and not (mention.noun in scene.place.shows and mention.colour is None):
            return False, []
        if mention.count is not None and fitting and sum(g.count for g in fitting) != mention.count:
            return False, []
    if negated:
        return True, []
    for mention, fitting in zip(mentioned, groups):
        colour = _IS_COLOUR.match(low[mention.end :])
        if colour and fitting and {g.colour for g in fitting} != {COLOUR_WORDS[colour[1]]}:
            return False, []
    if not mentioned and last:
        colour = re.match(rf"^(?:it is|they are)\s+({_COLOUR})\b", low.strip())
        if colour and {g.colour for g in last} != {COLOUR_WORDS[colour[1]]}:
            return False, []
    positive = [fitting for mention, fitting in zip(mentioned, groups) if not mention.negated]
    if not (
        _places_hold(sentence, positive, last)
        and _relations_hold(sentence, mentioned, groups)
        and _texts_hold(sentence, mentioned, groups, scene)
        and _numbers_hold(low, mentioned, groups, scene)
    ):
        return False, []
    return True, positive[-1] if positive else []


def _surroundings_hold(sentence: str, low: str, scene: Scene) -> bool:
    named = language.setting_phrases(language.QUOTE.sub(" ", sentence))
    if named and scene.setting not in named and not re.search(r"\bnot\b", low):
        return False
    sides = [side for side in ("indoors", "outdoors") if re.search(rf"(?<!not )\b{side}\b", low)]
    return len(sides) != 1 or (sides[0] == "indoors") == scene.place.indoors


def _places_hold(sentence: str, groups: list[list[Group]], last: list[Group]) -> bool:
    row, column = language.places(sentence)
    about = groups[0] if len(groups) == 1 else (last if not groups else [])
    if not about or (row is None and column is None):
        return True
    return any(row in (None, g.row) and column in (None, g.column) for g in about)


def _relations_hold(sentence: str, mentioned: list[Mention], groups: list[list[Group]]) -> bool:
    for first, second, a, b in zip(mentioned, mentioned[1:], groups, groups[1:]):
        if first.negated or second.negated:
            continue
        relation = language.relation_between(sentence, first, second)
        if relation is None or " not " in language.mask(sentence)[first.end : second.start]:
            continue
        if not any(graph.holds(relation, x, y) for x in a for y in b):
            return False
    return True


def _texts_hold(sentence: str, mentioned: list[Mention], groups: list[list[Group]], scene: Scene) -> bool:
    for text, start in language.quotes(sentence):
        able = [(m, g) for m, g in zip(mentioned, groups) if NOUNS[m.noun].carrier and not m.negated]
        before = [g for m, g in able if m.start < start]
        after = [g for m, g in able if m.start > start]
        carriers = before[-1] if before else (after[0] if after else scene.groups)
        if text.lower().rstrip(".,") not in {g.text.lower() for g in carriers}:
            return False
    return True


def _numbers_hold(low: str, mentioned: list[Mention], groups: list[list[Group]], scene: Scene) -> bool:
    stated = _THINGS.search(low)
    total = sum(g.count for g in scene.groups)
    if stated and re.search(r"\bin all\b|\btogether\b", low) and COUNT_WORDS[stated[1]] != total:
        return False
    less = _LESS.search(low)
    if less and COUNT_WORDS[less[1]] - COUNT_WORDS[less[2]] != COUNT_WORDS[less[3]]:
        return False
    if _compares(low) and len(mentioned) >= 2:
        first, second = (sum(g.count for g in fitting) for fitting in groups[:2])
        return first > second
    return True


def _compares(low: str) -> bool:
    """Whether a line says "more" and later "than"."""
    lines = ((re.search(r"\bmore\b", line), line) for line in low.split("\n"))
    return any(more and re.search(r"\bthan\b", line[more.end() :]) for more, line in lines)
