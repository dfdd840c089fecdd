"""From what a model said to clean values: JSON or prose in, text without control characters and markup out."""

import html
import json
import re
import unicodedata
from typing import Any

_THINKING = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"```[\w-]*\n?(.*?)```", re.DOTALL)
# Tags as HTML writes them, and the special tokens of chat templates: <|end|>, <image>, [INST]. "x < 5" is neither.
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,200}>|<!--.*?-->|<\|[^|<>]{1,40}\|>|\[/?INST\]", re.DOTALL)
_SCRIPT = re.compile(r"<(script|style)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
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
_QUESTION = r"(?:\d+[.)]\s*)?(?:question|q)\s*\d*\s*[:.)]"
_ANSWER = r"(?:answer|a)\s*\d*\s*:"
_PAIR = re.compile(
    rf"^{_QUESTION}\s*(?P<q>.+?)\n+\s*{_ANSWER}\s*(?P<a>.+?)(?=^{_QUESTION}|\Z)",
    re.DOTALL | re.IGNORECASE | re.MULTILINE,
)
_NUMBERED = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s+")
_OPTION = re.compile(r"^\s*\(?([A-Da-d])[.):]\)?\s+(.+?)\s*$", re.MULTILINE)
_BOLD = re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1")


class Invalid(Exception):
    """An answer that cannot be used; `reason` is what it is counted under."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(detail or reason)
        self.reason = reason


def clean_text(text: Any) -> str:
    """One clean text: no markup, no chat tokens, no control or invisible characters, single spaces, lines kept.

    Raises:
      Invalid: not a text, or nothing is left of it.
    """
    if not isinstance(text, str):
        raise Invalid("malformed", f"a text was expected, not {type(text).__name__}")
    for _ in range(8):  # what is hidden in two layers, "<<b>script>" or "&amp;lt;b>", takes as many passes
        stripped = _TAG.sub(" ", _SCRIPT.sub(" ", html.unescape(text)))
        if stripped == text:
            break
        text = stripped
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    # Not kept: control, invisible format (zero width, right-to-left overrides), surrogates, private, unassigned.
    text = "".join(
        c if c == "\n" or unicodedata.category(c)[0] != "C" else " " if c == "\t" or ord(c) < 32 else "" for c in text
    )
    text = _BOLD.sub(r"\2", text)
    lines = (" ".join(line.split()) for line in text.split("\n"))
    text = "\n".join(line for line in lines if line)
    if not text:
        raise Invalid("empty_answer")
    return text


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
    return bool(_REFUSAL.match(_THINKING.sub("", text).strip()))


def find_json(text: str) -> Any:
    """The first JSON object or list in a reply, wherever it stands; None if there is none."""
    text = _THINKING.sub("", text)
    fenced = _FENCE.findall(text)
    decoder = json.JSONDecoder(strict=False)
    for part in (*fenced, text):
        for match in re.finditer(r"[\[{]", part):
            try:
                value, _ = decoder.raw_decode(part, match.start())
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
                return value
    return None


def prose(text: str) -> str:
    """A reply without thinking, code fences, "Sure, here is ...:" and "Caption:"."""
    text = _THINKING.sub("", text).strip()
    if fenced := _FENCE.search(text):
        text = fenced[1].strip()
    text = _PREAMBLE.sub("", text, count=1).strip()
    return _LABEL.sub("", text).strip()


def pairs_from_prose(text: str) -> list[dict[str, Any]]:
    """Questions and answers out of "Q: ... A: ..." in its usual spellings; options out of lettered lines."""
    text = "\n".join(
        _NUMBERED.sub("", line) if re.match(rf"\s*(?:\d+[.)]|[-*•])\s+\W*{_QUESTION}", line, re.IGNORECASE) else line
        for line in _BOLD.sub(r"\2", prose(text)).split("\n")
    )
    text = "\n".join(line.strip() for line in text.split("\n"))
    found = []
    for match in _PAIR.finditer(text):
        question, answer = match["q"].strip(), match["a"].strip()
        options = {letter.upper(): option for letter, option in _OPTION.findall(question)}
        pair: dict[str, Any] = {"question": question, "answer": answer}
        if len(options) >= 2:
            pair["question"] = _OPTION.sub("", question).strip()
            pair["options"] = list(options.values())
            letter = re.match(r"\(?([A-Da-d])(?:[.):]|$|\s*$)", answer)
            if letter and letter[1].upper() in options:
                pair["answer"] = options[letter[1].upper()]
        found.append(pair)
    return found
