"""Cleans the replies of models, JSON or prose, to text without control characters and markup.

A reply may be anything, for instance a megabyte of opening brackets. So everything here takes time in proportion to the
text: repetitions in patterns are bounded wherever a second repetition or a later mark could match the same text.
"""

import html
import itertools
import json
import re
import unicodedata
from typing import Any

from fusion_jax.web.client import check_depth

MAX_TEXT = 200_000  # characters of an answer, without the thoughts before it
_STARTS = 1000  # brackets that are tried as the start of JSON
_TRIED = 2_000_000  # characters that all attempts read together: each may read to the end of the text
# Combining marks on one letter, limited as in Unicode's stream-safe form: more take quadratic time to normalise.
_MARKS = 30

_THINKING = re.compile(r"<(think|thinking|reasoning)>", re.IGNORECASE)
_SCRIPT = re.compile(r"<(script|style)\b", re.IGNORECASE)
_COMMENT = re.compile(r"<!(--)")
_FENCE = re.compile(r"```[\w-]*+\n?+(.*?)```", re.DOTALL)
# Tags as HTML writes them, and the special tokens of chat templates: <|end|>, <image>, [INST]. "x < 5" is neither.
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,200}>|<\|[^|<>]{1,40}\|>|\[/?INST\]")
_REFERENCE = re.compile(r"&#[xX]?[0-9a-fA-F]{9,};?")  # not a character; Python reads numbers of at most 4300 digits
_PREAMBLE = re.compile(
    r"^(?:(?:sure|certainly|of course|okay|ok|absolutely|great)\b[^\n:]{0,80}[!.:,]\s*)?"
    r"(?:here(?:'s| is| are)\b[^\n:]{0,120}:\s*)?",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"^[\s>*_#-]*(?:(?:the )?(?:new |image |final )?(?:caption|description)\**\s*:)\**\s*", re.IGNORECASE
)
_REFUSAL = re.compile(
    r"^\W*(?:(?:i'?m|i am)\s+(?:very\s+|so\s+)?(?:sorry|unable|not able)"
    r"|i\s+(?:can(?:no|')t|can not|won'?t|must decline)\b"
    r"|(?:sorry|apologies|unfortunately),?\s+(?:but\s+)?(?:i|as an)\b|as an ai\b)",
    re.IGNORECASE,
)
_QUESTION = r"(?:\d{1,6}[.)]\s{0,8})?(?:question|q)\s{0,8}\d{0,6}\s{0,8}[:.)]"
_ANSWER = r"(?:answer|a)\s{0,8}\d{0,6}\s{0,8}:"
_QUESTION_LINE = re.compile(rf"^{_QUESTION}", re.IGNORECASE | re.MULTILINE)
_ANSWER_LINE = re.compile(rf"\n{_ANSWER}", re.IGNORECASE)
_NUMBERED = re.compile(r"^(?:\d{1,6}[.)]|[-*•])\s+")
_NUMBERED_QUESTION = re.compile(rf"(?:\d{{1,6}}[.)]|[-*•])\s{{1,8}}\W{{0,8}}{_QUESTION}", re.IGNORECASE)
_OPTION = re.compile(r"^\(?([A-Da-d])[.):]\)?[ \t]+(.+)$", re.MULTILINE)
_BOLD = re.compile(r"(\*\*|__)(?=\S)(.{1,200}?)(?<=\S)\1")


class Invalid(Exception):
    """An answer that cannot be used; `reason` is the short name under which it is counted."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(detail or reason)
        self.reason = reason


def clean_text(text: Any) -> str:
    """Removes markup, chat tokens, control and invisible characters and double spaces; line breaks are kept.

    Raises:
      Invalid: the value is not a text, or nothing is left of it.
    """
    if not isinstance(text, str):
        raise Invalid("malformed", f"a text was expected, not {type(text).__name__}")
    for _ in range(8):  # markup in two layers, such as "<<b>script>" or "&amp;lt;b>", takes as many passes
        stripped = html.unescape(_REFERENCE.sub(" ", text))
        stripped = _without(_without(stripped, _SCRIPT, r"</{}\s{{0,8}}>", " "), _COMMENT, "-->", " ")
        stripped = _TAG.sub(" ", stripped)
        if stripped == text:
            break
        text = stripped
    text = unicodedata.normalize("NFC", _few_marks(text).replace("\r\n", "\n").replace("\r", "\n"))
    # This drops control, invisible format (zero width, right-to-left overrides), surrogates, private and unassigned.
    text = "".join(
        c if c == "\n" or unicodedata.category(c)[0] != "C" else " " if c == "\t" or ord(c) < 32 else "" for c in text
    )
    text = _BOLD.sub(r"\2", text)
    lines = (" ".join(line.split()) for line in text.split("\n"))
    text = "\n".join(line for line in lines if line)
    if not text:
        raise Invalid("empty_answer")
    return text


def _without(text: str, opening: re.Pattern, closing: str, instead: str) -> str:
    """The text with `instead` in place of each part from an opening mark to the next closing mark of the same name.

    A mark that is never closed stays.

    Args:
      closing: pattern, with the first group of the opening for {}.
    """
    kept, at, start = [], 0, 0
    unclosed: set[str] = set()
    while match := opening.search(text, start):
        name, start = match[1].lower(), match.end()
        if name in unclosed:
            continue
        end = re.compile(closing.format(name), re.IGNORECASE).search(text, start)
        if end is None:
            unclosed.add(name)
            continue
        kept += [text[at : match.start()], instead]
        at = start = end.end()
    return "".join(kept) + text[at:]


def _few_marks(text: str) -> str:
    if text.isascii():
        return text
    kept, run = [], 0
    for c in text:
        run = run + 1 if unicodedata.combining(c) else 0
        if run <= _MARKS:
            kept.append(c)
    return "".join(kept)


def without_thinking(text: str) -> str:
    """A reply without the thoughts that some models write first."""
    return _without(text, _THINKING, "</{}>", "")


def one_line(text: Any) -> str:
    """`clean_text` without line breaks and enclosing quotation marks."""
    text = " ".join(clean_text(text).split("\n"))
    for opening, closing in ('""', "“”", "''", "``"):
        if len(text) > 2 and text[0] == opening and text[-1] == closing and opening not in text[1:-1]:
            text = text[1:-1].strip()
    if not text:
        raise Invalid("empty_answer")
    return text


def words(text: str) -> list[str]:
    """The words of a text: runs of letters, digits, apostrophes and hyphens between them."""
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def refuses(text: str) -> bool:
    """Whether a reply is a refusal rather than an answer."""
    return bool(_REFUSAL.match(without_thinking(text).strip()))


def find_json(text: str) -> Any:
    """The first JSON object or list anywhere in a reply; None if there is none, or if it is nested too deep."""
    text = without_thinking(text)
    fenced = [match[1] for match in itertools.islice(_FENCE.finditer(text), 8)]
    decoder = json.JSONDecoder(strict=False)
    left = _TRIED
    for part in (*fenced, text):
        for match in itertools.islice(re.finditer(r"[\[{]", part), _STARTS):
            start, end = match.start(), len(part)  # an open string or a long number may be read to the end
            try:
                value, end = decoder.raw_decode(part, start)
                if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
                    check_depth(value)
                    return value
            except RecursionError:  # this is not an answer, and each further bracket of it would take as long
                return None
            except json.JSONDecodeError as error:
                end = end if error.msg.startswith("Unterminated string") else error.pos
            except ValueError:
                pass
            left -= end - start
            if left < 0:
                return None
    return None


def prose(text: str) -> str:
    """A reply without thoughts, code fences, "Sure, here is ...:" and "Caption:"."""
    text = without_thinking(text).strip()
    if fenced := _FENCE.search(text):
        text = fenced[1].strip()
    text = _PREAMBLE.sub("", text, count=1).strip()
    return _LABEL.sub("", text).strip()


def pairs_from_prose(text: str) -> list[dict[str, Any]]:
    """Parses questions and answers from "Q: ... A: ..." in its usual spellings, and options from lettered lines."""
    lines = (line.strip() for line in _BOLD.sub(r"\2", prose(text)).split("\n"))
    text = "\n".join(_NUMBERED.sub("", line) if _NUMBERED_QUESTION.match(line) else line for line in lines if line)
    pairs, at = [], 0
    while (q := _QUESTION_LINE.search(text, at)) and (a := _ANSWER_LINE.search(text, q.end())):
        following = _QUESTION_LINE.search(text, a.end() + 1)
        at = following.start() if following else len(text)
        question, answer = text[q.end() : a.start()].strip(), text[a.end() : at].strip()
        if not (question and answer):
            continue
        options = {letter.upper(): option for letter, option in _OPTION.findall(question)}
        pair: dict[str, Any] = {"question": question, "answer": answer}
        if len(options) >= 2:
            pair["question"] = _OPTION.sub("", question).strip()
            pair["options"] = list(options.values())
            letter = re.match(r"\(?([A-Da-d])(?:[.):]|\s*$)", answer)
            if letter and letter[1].upper() in options:
                pair["answer"] = options[letter[1].upper()]
        pairs.append(pair)
    return pairs
