"""Parses a caption or a description into a `Draft` of a scene.

`compose.settle` turns a draft into a scene. The draft of a description by `write.py` is complete, and becomes the scene
that the description was written from.
"""

import dataclasses
import re

from fusion_jax.synth.worlds.scenes import language
from fusion_jax.synth.worlds.scenes.language import Mention
from fusion_jax.synth.worlds.scenes.lexicon import CARRIERS
from fusion_jax.synth.worlds.scenes.settings import SETTING_WORDS


@dataclasses.dataclass
class DraftGroup:
    """A group as far as a text describes it; None where it leaves a field open."""

    noun: str
    count: int | None = None
    colour: str | None = None
    size: str | None = None
    row: str | None = None
    column: str | None = None
    text: str = ""


@dataclasses.dataclass
class Draft:
    """A scene as far as a text describes it.

    Attributes:
      setting: a setting, or None. groups: in the text's order. relations: (index of a group, relation, index of
        another).
    """

    setting: str | None
    groups: list[DraftGroup]
    relations: list[tuple[int, str, int]]


def parse(text: str) -> Draft:
    """Parses as much as possible; for a text without a known noun the draft has no groups."""
    draft = Draft(_setting(text), [], [])
    for sentence in language.sentences(text):
        _read(sentence, draft)
    return draft


def _setting(text: str) -> str | None:
    """The backdrop: a setting's own phrase, or one of its words outside quotations and noun phrases."""
    if phrases := language.setting_phrases(language.QUOTE.sub(" ", text)):
        return phrases[0]
    low = language.QUOTE.sub(" ", text.lower())
    matches = [(m.start(), SETTING_WORDS[m[0]]) for m in re.finditer(r"[a-z]+", low) if m[0] in SETTING_WORDS]
    names = [name for _, name in sorted(matches)]
    # "A snowy field", "a street at night": the more specific word wins.
    return next((name for name in ("night", "snow") if name in names), names[0] if names else None)


def _read(sentence: str, draft: Draft) -> None:
    known: list[int | None] = []  # the group of each mention
    mentioned = language.mentions(sentence)
    fresh = []
    for mention in mentioned:
        index, new = _group(mention, draft)
        known.append(index)
        if new:
            fresh.append((mention, index))
    for first, second, a, b in zip(mentioned, mentioned[1:], known, known[1:]):
        relation = language.relation_between(sentence, first, second)
        if relation and a is not None and b is not None and a != b:
            draft.relations.append((a, relation, b))
    _place(sentence, mentioned, fresh, draft)
    for text, start in language.quotes(sentence):
        carrier = _carrier(start, mentioned, known, draft)
        if carrier is None:
            draft.groups.append(DraftGroup("sign", 1, text=text))
        else:
            draft.groups[carrier].text = draft.groups[carrier].text or text


def _group(mention: Mention, draft: Draft) -> tuple[int | None, bool]:
    """The group that a mention means, and whether it is new. None for a negated mention."""
    if mention.negated:
        return None, False
    for i, group in enumerate(draft.groups):
        same_colour = mention.colour is None or group.colour is None or mention.colour == group.colour
        counted = mention.count is not None and group.count is not None and mention.count != group.count
        # "A red apple ... and a green apple" are two; "the apple" and "the three apples" refer to earlier ones.
        if group.noun == mention.noun and same_colour and not counted and (mention.definite or mention.colour):
            group.colour = group.colour or mention.colour
            group.size = group.size if group.size is not None else mention.size
            return i, False
    count = mention.count if mention.count is not None else (2 if mention.plural else 1)
    draft.groups.append(DraftGroup(mention.noun, count, mention.colour, mention.size))
    return len(draft.groups) - 1, True


def _place(sentence: str, mentioned: list[Mention], fresh: list[tuple[Mention, int]], draft: Draft) -> None:
    """Sets the places of new groups: the place that the sentence states for the thing, else that of its clause."""
    for mention, index in fresh:
        if len(fresh) == 1:
            row, column = language.places(sentence)
        else:
            later = [other.start for other in mentioned if other.start > mention.start]
            row, column = language.places(sentence[mention.start : later[0] if later else len(sentence)])
        draft.groups[index].row, draft.groups[index].column = row, column


def _carrier(start: int, mentioned: list[Mention], known: list[int | None], draft: Draft) -> int | None:
    """The group that a quotation is written on: the nearest thing that can carry it, preferably before it."""
    able = [
        (mention, index)
        for mention, index in zip(mentioned, known)
        if index is not None and mention.noun in CARRIERS and draft.groups[index].count == 1
    ]
    before = [index for mention, index in able if mention.start < start]
    after = [index for mention, index in able if mention.start > start]
    return before[-1] if before else (after[0] if after else None)
