"""Reads the English of captions, descriptions and answers: things, places and relations.

    "In the foreground on the left stand two small red apples, to the left of the mug."
     place front, left               mention: 2 small red apple    left of   mention: the mug

Words outside the lexicon are ignored. Both `parse.py` (text to scene) and `claims.py` (is this sentence true?) are
built on this module.
"""

import dataclasses
import functools
import itertools
import re

from fusion_jax.synth.worlds.scenes.lexicon import COLOUR_WORDS, NOUN_WORDS, NUMBERS, SIZE_WORDS
from fusion_jax.synth.worlds.scenes.settings import SETTINGS

COUNT_WORDS = {word: i for i, word in enumerate(NUMBERS)} | {str(i): i for i in range(1, 10)}
COUNT_WORDS |= {"seven": 7, "eight": 8, "nine": 9, "ten": 10, "several": 3, "some": 3, "pair": 2, "couple": 2}
_ARTICLES = ("a", "an", "the", "no", "another", "this", "that", "its", "their", "neither", "any")
# A noun phrase does not extend back over these.
_STOPWORDS = """
    in on at by of to from with without and or but is are was were has have there stands stand sits sit lies lie hangs
    hang floats float while which who where above below behind over under near beside next that reads read says say it
    they as than one can see seen be not nor for into also both
"""
_STOPS = frozenset(_STOPWORDS.split())

# Words that may follow a noun without making it the first half of a compound: "a cat asleep", unlike "a bus stop".
_AFTER_WORDS = """
    about across after against ago alone along already always among amid around asleep atop away back because before
    being between beyond bigger bright closed close covered day dark down during each early empty entirely even ever
    every facing far farther fast for full further half halfway hanging here high his her if inside just left like lit
    loaded low made many most much never new next now of off old on once only onto open opposite out outdoors indoors
    outside past plus quite ready right same seem set side similar since small large so some standing still surrounded
    taller than then there these those through throughout till today together too toward towards until up upon upside
    very via we when where while whose will within without would yesterday you your my our i he she can could may might
    must shall should do does did sat stood lay ran ate flew fell grew hung went came got took saw held kept slept swam
    wore drove rode rose shone sleep sit run eat fly hang swim grow
"""
_AFTER = _STOPS | frozenset(_AFTER_WORDS.split()) | frozenset(COLOUR_WORDS) | frozenset(SIZE_WORDS)
_HEADS = ("stops", "shops", "stations", "pies", "lots", "shelves", "stores", "drivers", "seats", "wheels", "covers")

RELATION_WORDS = {
    r"\bleft of\b": "left of",
    r"\bright of\b": "right of",
    r"\b(?:above|over)\b": "above",
    r"\b(?:below|under|beneath|underneath)\b": "below",
    r"\bin front of\b": "in front of",
    r"\bbehind\b": "behind",
}
ROW_WORDS = {
    "front": r"\bforeground\b|\bnear the viewer\b|\bat the front\b|\bclose by\b",
    "back": r"\bfurther back\b|\bin the background\b|\bfarther away\b|\bat the back\b",
    "air": r"\bin the air\b|\bhigh up\b|\boverhead\b|\bnear the top\b",
}
COLUMN_WORDS = {
    "left": r"\bon the left\b(?! of)|\bat the left\b(?! of)|\bleft-hand side\b",
    "center": r"\bin the middle\b|\bat the center\b|\bin the center\b|\bhalfway across\b",
    "right": r"\bon the right\b(?! of)|\bat the right\b(?! of)|\bright-hand side\b",
}
QUOTE = re.compile(r'["“]([^"“”]*)["”]')
_TOKEN = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*|[,;:.!?()]")


@dataclasses.dataclass(frozen=True)
class Mention:
    """A noun phrase.

    Attributes:
      noun: key of `NOUNS`. start, end: its place in the sentence. definite: with "the" or the like.
      negated: "no apple", "not ... an apple".
      count: the number in words or digits ("a" is not one), or None. plural: the noun's number.
      colour, size: where named, or None.
    """

    noun: str
    start: int
    end: int
    definite: bool
    negated: bool
    count: int | None
    plural: bool
    colour: str | None
    size: str | None


def sentences(text: str) -> list[str]:
    """Splits at full stops outside quotation marks."""
    hidden = QUOTE.sub(lambda quote: '"' + re.sub(r"[.!?;]", "\x00", quote[1]) + '"', text)
    ends = [0, *(stop.end() for stop in re.finditer(r"[.!?;](?:\s+|$)", hidden)), len(text)]
    return [text[a:b].strip() for a, b in itertools.pairwise(ends) if text[a:b].strip()]


@functools.cache
def _backdrop_phrases() -> re.Pattern:
    phrases = [p for s in SETTINGS.values() for p in (s.mood, s.behind, s.ground, s.phrase)]
    return re.compile("|".join(re.escape(p.lower()) for p in sorted(phrases, key=len, reverse=True)))


def setting_phrases(text: str) -> list[str]:
    """The settings whose phrase occurs in a text."""
    return [name for name, s in SETTINGS.items() if re.search(rf"\b{s.phrase}\b", text, re.IGNORECASE)]


def mask(sentence: str) -> str:
    """The sentence in lower case, with quotations and phrases about the backdrop replaced by blanks."""
    low = QUOTE.sub(lambda quote: " " * len(quote[0]), sentence.lower())
    return _backdrop_phrases().sub(lambda phrase: " " * len(phrase[0]), low)


def mentions(sentence: str) -> list[Mention]:
    """The things that a sentence names, in order. A run of nouns counts as its last one, as in "apple tree". A noun
    before an unknown noun, as in "bus stop", names nothing."""
    low = mask(sentence)
    tokens = [(token[0], token.start(), token.end()) for token in _TOKEN.finditer(low)]
    mentions_ = []
    for i, (word, _, end) in enumerate(tokens):
        if word not in NOUN_WORDS or (i + 1 < len(tokens) and tokens[i + 1][0] in NOUN_WORDS):
            continue
        noun, plural = NOUN_WORDS[word]
        if not plural and i + 1 < len(tokens) and _is_first_half(low[end : tokens[i + 1][1]], tokens[i + 1][0]):
            continue
        before = []
        for j in range(i - 1, max(-1, i - 7), -1):
            earlier = tokens[j][0]
            if not earlier[0].isalnum() or (earlier in _STOPS and not (earlier == "of" and tokens[j - 1][0] in _PAIRS)):
                break
            before.append(j)
            if earlier in _ARTICLES:
                break
        words = [tokens[j][0] for j in before[::-1]]
        # "One" after "the" or in "one of" is not a number of things.
        count = next((COUNT_WORDS[w] for w in words if w in COUNT_WORDS), None)
        article = next((w for w in words if w in _ARTICLES), None)
        negated = (
            article in ("no", "neither", "any")
            or count == 0
            or bool(re.search(r"\bnor\s+(?:is|are)?", _lead(low, tokens, before, i)))
        )
        mentions_.append(
            Mention(
                noun=noun,
                start=tokens[before[-1] if before else i][1],
                end=end,
                definite=article in ("the", "this", "that", "its", "their"),
                negated=negated,
                count=count,
                plural=plural,
                colour=next((COLOUR_WORDS[w] for w in words if w in COLOUR_WORDS), None),
                size=next((SIZE_WORDS[w] for w in words if w in SIZE_WORDS), None),
            )
        )
    return mentions_


def _is_first_half(between: str, word: str) -> bool:
    """Whether the word after a noun, with `between` in between, makes it part of a compound: "bus" before "stop"."""
    if between != " " or not word.isalpha() or word in _AFTER or word in COUNT_WORDS or word in _ARTICLES:
        return False
    return word in _HEADS or not word.endswith(("ing", "ed", "ly", "s"))


_PAIRS = ("pair", "couple")


def _lead(low: str, tokens: list, before: list[int], i: int) -> str:
    """The two words before a noun phrase."""
    first = before[-1] if before else i
    return " ".join(tokens[j][0] for j in range(max(0, first - 2), first)) + " "


def relation_between(sentence: str, first: Mention, second: Mention) -> str | None:
    """The relation that the words between two neighbouring mentions express."""
    between = mask(sentence)[first.end : second.start]
    for pattern, relation in RELATION_WORDS.items():
        if re.search(pattern, between):
            return relation
    return None


def places(text: str) -> tuple[str | None, str | None]:
    """The row and the column that a piece of text names, each None where it names none or several."""
    low = mask(text)
    rows = [row for row, pattern in ROW_WORDS.items() if re.search(pattern, low)]
    columns = [column for column, pattern in COLUMN_WORDS.items() if re.search(pattern, low)]
    return (rows[0] if len(rows) == 1 else None), (columns[0] if len(columns) == 1 else None)


def quotes(sentence: str) -> list[tuple[str, int]]:
    """The quoted texts and their positions."""
    return [(" ".join(quote[1].split()), quote.start()) for quote in QUOTE.finditer(sentence) if quote[1].strip()]
