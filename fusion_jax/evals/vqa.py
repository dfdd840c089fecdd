"""Computes VQA accuracy over ten people's answers, with the normaliser that decides which agree.

The normaliser is that of EvalAI's TextVQA server (facebookresearch/mmf), with its errors, because figures are only
comparable with them: at most 32 periods are removed, and a period before a digit is kept wherever it is.
"""

import re
from collections.abc import Mapping, Sequence

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(n) for n, word in enumerate(_DIGITS)}}
_ARTICLES = {"a", "an", "the"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"(?<=\d),+(?=\d)")
ONE_COMMA = re.compile(r"\d,\d")
_FORMS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""


def _slips(form: str) -> list[str]:
    """All spellings of the form with one of its apostrophes left out."""
    return [form[:i] + form[i + 1 :] for i, letter in enumerate(form) if letter == "'"]


_CONTRACTIONS = {slip: form for form in _FORMS.split() for slip in _slips(form)} | {"somebody'd": "somebodyd"}


# VizWiz's table has curly apostrophes, except in these forms and these misspellings.
_STRAIGHT = ("ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've")
_STRAIGHT_SLIPS = ("couldn'tve", "hadn'tve")
_CURLY = {
    slip if slip in _STRAIGHT_SLIPS else slip.replace("'", "’"): form if form in _STRAIGHT else form.replace("'", "’")
    for slip, form in _CONTRACTIONS.items()
}


def punctuation(text: str, thousands: re.Pattern = _THOUSANDS) -> str:
    """Replaces marks by spaces; removes those that occur beside a space, or all where digits surround a comma."""
    squeeze = thousands.search(text) is not None
    out = text
    for mark in _MARKS:
        out = out.replace(mark, "" if squeeze or f"{mark} " in text or f" {mark}" in text else " ")
    return _PERIOD.sub("", out, count=32)


def digits_and_articles(text: str, contractions: Mapping[str, str] = _CONTRACTIONS) -> str:
    """The text in lower case, with numbers up to ten as digits, without articles, with apostrophes restored."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


def normalise(text: str) -> str:
    """An answer as TextVQA's server compares it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return digits_and_articles(punctuation(text))


def normalise_for_vizwiz(text: str) -> str:
    """An answer as VizWiz's own evaluation compares it, which treats two commas between digits like other marks."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return digits_and_articles(punctuation(text, ONE_COMMA), _CURLY)


def accuracy(answer: str, people: Sequence[str]) -> float:
    """Mean over the people of min(1, agreeing others / 3): for ten people 1 if four or more agree, 0.9, 0.6 and 0.3 for
    three, two and one.

    Both sides are compared as they are, so normalise them before.
    """
    agreeing = [person == answer for person in people]
    return sum(min(1.0, (sum(agreeing) - own) / 3) for own in agreeing) / len(agreeing)
