"""Measures how much of a caption its scenes show, and lists what else they show.

    caption              "A man with a red umbrella at the beach"      scene: red umbrella, beach, blue bucket
    content words        man  red  umbrella  beach                     function words and "picture", "shown" are none
    kept                      red  umbrella  beach                     kept_share 3/4
    invented             a blue bucket

A noun is kept where the scene has such a thing, its colour, size and number where it has such things with them, "left
of" where that holds, a quoted text where it is written on something. Everything else is missed: "man", "rainy", words
of another language, "on" in "a cat on a chair". A quotation counts as one word, and a repeated word counts once.
"""

import dataclasses
import itertools
import re
from typing import Any

from fusion_jax.synth.worlds.scenes import graph, language
from fusion_jax.synth.worlds.scenes.graph import Scene
from fusion_jax.synth.worlds.scenes.language import COUNT_WORDS, Mention
from fusion_jax.synth.worlds.scenes.lexicon import COLOUR_WORDS, SIZE_WORDS
from fusion_jax.synth.worlds.scenes.settings import SETTING_WORDS
from fusion_jax.synth.worlds.scenes.write import ink
from fusion_jax.synth.worlds.words import article

KEPT_MIN = 0.6  # captions of which less is kept are dropped; config.filters may change it
PARAGRAPH_MIN = 0.1  # the same for paragraphs by another model; this backend's own have 0.14 to 0.5
SHOWN = 20  # words of a list that are kept with a sample

_FUNCTION = """
    a an the this that these those some any each both all its his her their my our your it they he she we i you one who
    which what there here in on at by of to from with without and or but nor as for into onto near beside next along
    across around is are was were be been being has have had do does did can could not no than then
    so very just also while where when it's s t
    picture image photo photograph photography painting drawing illustration view scene shot closeup close-up close up
    stands stand standing stood sits sit sitting lies lie lying rests rest hangs hang hanging flies fly flying floats
    float floating placed seen see shows show shown showing appears visible set located reads read reading says say
    saying written words word letters text labeled labelled bearing carrying containing featuring side hand
"""
_FUNCTION_WORDS = frozenset(_FUNCTION.split())
_PLACE_WORDS = ("left", "right", "middle", "center", "foreground", "background", "front", "back", "top", "further")
_RELATIONS = ("left", "right", "above", "over", "below", "under", "beneath", "underneath", "front", "behind")
_WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")


@dataclasses.dataclass(frozen=True)
class Reading:
    """Which words of a caption its scene keeps.

    Attributes:
      understood, missed: its content words, in their order. invented: what else the scenes show, as phrases.
    """

    understood: tuple[str, ...]
    missed: tuple[str, ...]
    invented: tuple[str, ...]

    @property
    def kept_share(self) -> float:
        """Understood words among the content words; 0 where there is none."""
        return round(len(self.understood) / max(len(self.understood) + len(self.missed), 1), 4)

    def to_json(self) -> dict[str, Any]:
        """Lists of at most `SHOWN` words."""
        lists = {key: list(getattr(self, key)[:SHOWN]) for key in ("understood", "missed", "invented")}
        return lists | {"kept_share": self.kept_share}


def read(caption: str, scene: Scene) -> Reading:
    """Compares a caption with its scene."""
    kept, inside = _kept_spans(caption, scene), _inside(caption)
    understood, missed = [], []
    for quote in language.QUOTE.finditer(caption):
        text = " ".join(quote[1].split())
        if text:
            there = any(text.lower() == group.text.lower() for group in scene.groups)
            (understood if there else missed).append(f'"{text}"')
    bare = language.QUOTE.sub(lambda quote: " " * len(quote[0]), caption)
    for match in _WORD.finditer(bare):
        word = match[0].lower()
        if (match.start(), match.end()) in kept:
            understood.append(word)
        elif word not in _FUNCTION_WORDS or match.start() in inside:
            missed.append(word)
    # Each word counts once, even where a caption repeats "an apple" forty times.
    return Reading(tuple(dict.fromkeys(understood)), tuple(dict.fromkeys(missed)), _invented(caption, scene))


def _kept_spans(caption: str, scene: Scene) -> set[tuple[int, int]]:
    """The positions of those words of a caption that the scene keeps."""
    low = language.QUOTE.sub(lambda quote: " " * len(quote[0]), caption.lower())
    words = [(match[0], match.start(), match.end()) for match in _WORD.finditer(low)]
    kept = set()
    named = [mention for mention in language.mentions(caption) if not mention.negated]
    for mention in named:
        inside = [one for one in words if mention.start <= one[1] and one[2] <= mention.end]
        kept |= {(start, end) for word, start, end in inside if _fits(word, mention, scene)}
    for first, second in itertools.pairwise(named):
        relation = language.relation_between(caption, first, second)
        pairs = [(a, b) for a in _groups(first, scene) for b in _groups(second, scene)]
        if relation and any(graph.holds(relation, a, b) for a, b in pairs):
            between = [one for one in words if first.end <= one[1] < second.start]
            kept |= {(start, end) for word, start, end in between if word in _RELATIONS}
    inks = {ink(group) for group in scene.texts}
    rows, columns = {group.row for group in scene.groups}, {group.column for group in scene.groups}
    row, column = language.places(caption)
    setting = {*scene.place.phrase.split(), "indoors" if scene.place.indoors else "outdoors"} - _FUNCTION_WORDS
    for k, (word, start, end) in enumerate(words):
        letters = k + 1 < len(words) and words[k + 1][0] == "letters"
        place = word in _PLACE_WORDS and (row in rows or column in columns)
        place = place or (word in ("over", "above") and "air" in rows)  # over a beach
        if SETTING_WORDS.get(word) == scene.setting or word in setting or place or (letters and word in inks):
            kept.add((start, end))
    return kept


def _inside(caption: str) -> set[int]:
    """The positions of "on", "in" and "of" that put one thing on or into another: things are drawn side by side."""
    low = caption.lower()
    places = set()
    for first, second in itertools.pairwise(language.mentions(caption)):
        between = re.search(r"\b(?:on|in|inside|into|onto)\s+$|^\s+of\s+$", low[first.end : second.start])
        if between:
            places.add(first.end + between.end() - len(between[0].lstrip()))
    return places


def _groups(mention: Mention, scene: Scene) -> list[graph.Group]:
    return [group for group in scene.groups if group.noun == mention.noun]


def _fits(word: str, mention: Mention, scene: Scene) -> bool:
    """Whether a word of a noun phrase is true of the things of that noun in the scene."""
    groups = _groups(mention, scene)
    colour = [group for group in groups if mention.colour in (None, group.colour)]
    if word in COUNT_WORDS:
        return bool(groups) and sum(group.count for group in colour or groups) == COUNT_WORDS[word]
    if word in COLOUR_WORDS and word != mention.noun:
        return any(group.colour == COLOUR_WORDS[word] for group in groups)
    if word in SIZE_WORDS:
        return any(group.size == SIZE_WORDS[word] for group in colour)
    return bool(groups) and _is_name(word, mention)


def _is_name(word: str, mention: Mention) -> bool:
    return language.NOUN_WORDS.get(word, ("",))[0] == mention.noun


def _invented(caption: str, scene: Scene) -> tuple[str, ...]:
    """What the scene shows and the caption does not name: things, colours of things that it names, the setting."""
    named: dict[str, list[Mention]] = {}
    for mention in language.mentions(caption):
        named.setdefault(mention.noun, []).append(mention)
    invented = []
    quotes = {text.lower() for text, _ in language.quotes(caption)}
    for group in scene.groups:
        written = f', reading "{group.text}"' if group.text and group.text.lower() not in quotes else ""
        if group.noun not in named:
            invented.append(group.full + written)
            continue
        if written:
            invented.append(f'the text "{group.text}" on the {group.words}')
        if group.colour not in [mention.colour for mention in named[group.noun]]:
            invented.append(f"{group.colour} for the {group.words}")
    if not language.setting_phrases(caption) and not any(
        SETTING_WORDS.get(word) == scene.setting for word in _WORD.findall(caption.lower())
    ):
        invented.append(f"{scene.place.preposition} {article(scene.place.phrase)}")
    return tuple(invented)


def complaint(reading: dict[str, Any]) -> str:
    """The reason for dropping a caption, from the mapping of `Reading.to_json`."""
    kept, missed = (", ".join(reading[key]) or "nothing" for key in ("understood", "missed"))
    return f"{reading['kept_share']:.0%} of its words can be drawn ({kept}); not: {missed}"
