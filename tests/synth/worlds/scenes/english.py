"""Rules of English that generated text must keep, as far as a few patterns over a known vocabulary can tell."""

import itertools
import re

from fusion_jax.synth.worlds.scenes import graph, language
from fusion_jax.synth.worlds.scenes.lexicon import COLOURS, NOUNS
from fusion_jax.synth.worlds.scenes.settings import SETTINGS

_ONE = "|".join([*NOUNS, "image", "scene", "picture"])
_MANY = "|".join([*(noun.plural for noun in NOUNS.values()), "things", "letters", "images"])
_ADJECTIVES = rf"(?:(?:small|large|{'|'.join(COLOURS)}) )*"
_VERBS_ONE = "is|stands|lies|sits|hangs|flies|floats|rests|reads|says|does|has|carries|shows"
_VERBS_MANY = "are|stand|lie|sit|hang|fly|float|rest|read|say|do|have|carry|show"
_NUMBERS = "[Tt]wo|[Tt]hree|[Ff]our|[Ff]ive|[Ss]ix"
_PATTERNS = {
    "a for an": r"\b[Aa] (?!one\b)[aeiou]",
    "an for a": r"\b[Aa]n [^aeiou\"]",
    "British spelling": r"(?i)\b(?:colou|grey|centre|neighbou|favou)\w*",
    "a word twice": r"(?i)\b(\w+) \1\b",
    "are before one": r"\b[Tt]here are (?:a|an|no|one) (?!.* and )",
    "is before several": rf"\b[Tt]here is (?:{_NUMBERS})\b",
    "several with a singular verb": rf"\b(?:[Tt]he|{_NUMBERS}) {_ADJECTIVES}(?:{_MANY}) (?:{_VERBS_ONE})\b",
    "one with a plural verb": (
        r"^(?!.* and |.*\b[Dd]oes )(?:.*\b)?(?<!on )(?<!of )(?:[Tt]he|[Aa]n?|[Oo]ne) "
        rf"{_ADJECTIVES}(?:{_ONE}) (?:{_VERBS_MANY})\b"
    ),
    "is asked of several": rf"\b(?:Is|Does|is|does) (?:the|{_NUMBERS}) {_ADJECTIVES}(?:{_MANY})\b",
    "are asked of one": rf"\b(?:Are|Do|are|do) the {_ADJECTIVES}(?:{_ONE})\b",
    "one of several": rf"\b(?:{_NUMBERS}) {_ADJECTIVES}(?:{_ONE})\b",
    "several of one": rf"\b(?:[Aa]n?|[Oo]ne) {_ADJECTIVES}(?:{_MANY})\b",
    "and and": r"(?:\ban? [a-z ]+ and ){2}an? ",
    "two stops": r"[.?!,;:]{2}|\s[.,;?]|  ",
}
_FORMS = {name: re.compile(pattern) for name, pattern in _PATTERNS.items()}
_PLURAL_GROUNDS = [s.ground for s in SETTINGS.values() if re.search(r"[^s]s$", s.ground) and s.ground[:2] != "a "]


def faults(text: str, sentences: bool = True) -> list[str]:
    """What is wrong with a text; `sentences`: it is made of whole ones, not a word or phrase for an answer."""
    found = []
    said = [text[slice(*found)].strip() for found in _spans(text)]
    for sentence in said:
        bare = language.QUOTE.sub('"X"', sentence)
        found += [f"{name}: {sentence}" for name, form in _FORMS.items() if form.search(bare)]
        found += [f"plural ground: {sentence}" for g in _PLURAL_GROUNDS if re.search(rf"\b(?:is|a) {g}", bare)]
        if sentences and not (sentence[0].isupper() or sentence[0] == '"'):
            found.append(f"no capital: {sentence}")
        if sentences and sentence[-1] not in '.?!;"':
            found.append(f"no stop: {sentence}")
    found += [f"a sentence twice: {one}" for one in {s for s in said if said.count(s) > 1}]
    return found + [f"said again: {one}" for one in _repeated(said)]


def _spans(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a text begin and end; stops in quotations end none."""
    hidden = language.QUOTE.sub(lambda quote: '"' + "x" * len(quote[1]) + '"', text)
    ends = [0, *(found.end() for found in re.finditer(r"[.!?](?:\s+|$)", hidden))]
    ends += [len(text)] if ends[-1] < len(text) else []
    return list(itertools.pairwise(ends))


def _repeated(said: list[str]) -> list[str]:
    """Sentences that add nothing: "It is blue." after "The sign is blue.", a place given twice, "The cat is left of the
    duck." beside "The duck is right of the cat."."""
    found, places, related = [], set(), set()
    for before, sentence in zip(["", *said], said):
        again = re.fullmatch(r"(?:It is|They are) (\w+)\.", sentence)
        if again and re.search(rf"\b{again[1]}\b", before):
            found.append(sentence)
        named = language.mentions(sentence)
        if len(named) == 2 and (relation := language.relation_between(sentence, *named)):
            a, b = ((mention.noun, mention.colour) for mention in named)
            same = {(x[0], r, y[0]) for x, r, y in ((a, relation, b), (b, graph.OPPOSITES[relation], a))}
            if a[0] != b[0] and same & related:
                found.append(sentence)
            related |= same if a[0] != b[0] else set()
        if len(named) == 1 and not named[0].negated and None not in (place := language.places(sentence)):
            side = re.search(r"in the (?:left|right) image", sentence.lower())
            key = (named[0].noun, place, side and side[0], named[0].colour)
            if key in places or (*key[:3], None) in places:
                found.append(sentence)
            places.add(key)
    return found
